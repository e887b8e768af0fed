"""8.2.3 料金の行と、この節の例外(本書にリストなし)。

料金は日付で変わるので、行に期間と出典を持たせる。料金表(``table``)も、料金表のファイルの
読み取り(``file``)も、この行を作る。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from decimal import Decimal
from itertools import pairwise


class CostError(ValueError):
    """この節の例外の親。"""


class NoPriceError(CostError, LookupError):
    """料金が決められない。0 として扱ってはならない。"""


class UnknownModelError(NoPriceError):
    """料金表にないモデル。``suggestions`` は綴りの近い名前。"""

    def __init__(self, model: str, suggestions: Sequence[str] = ()) -> None:
        hint = f" (did you mean: {', '.join(suggestions)})" if suggestions else ""
        super().__init__(f"no price for model {model!r}{hint}; add a row or an alias")
        self.model = model
        self.suggestions = tuple(suggestions)


class PriceNotEffectiveError(NoPriceError):
    """モデルの行はあるが、その日に有効なものがない。"""


class PriceTableError(CostError):
    """料金表の誤り。``problems`` に、見つかったものをすべて持つ。"""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("invalid price table: " + "; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True)
class PriceTier:
    """長い入力の段。入力がこの数を超えたリクエストは、全トークンがこの単価になる。"""

    above_input_tokens: int
    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPrice:
    """あるモデルの、ある期間の料金。単価はすべて USD / 100 万トークン。

    ``None`` の単価は「割引がない」ことを表す。キャッシュは入力と同じ単価で数える。
    ``effective_to`` の日は含まない。
    """

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None
    batch_input: Decimal | None = None
    batch_output: Decimal | None = None
    tiers: tuple[PriceTier, ...] = ()
    effective_from: date | None = None
    effective_to: date | None = None
    provider: str = ""
    source: str = ""

    @property
    def period(self) -> str:
        """エラーに出す期間の表示。"""
        return f"{self.effective_from or '...'} to {self.effective_to or '...'}"

    def covers(self, day: date) -> bool:
        """その日に有効か。"""
        after_start = self.effective_from is None or self.effective_from <= day
        return after_start and (self.effective_to is None or day < self.effective_to)

    def tier_for(self, input_tokens: int) -> ModelPrice:
        """入力の長さに応じた単価の行。段がなければ自分自身。"""
        reached = [tier for tier in self.tiers if input_tokens > tier.above_input_tokens]
        if not reached:
            return self
        top = max(reached, key=lambda tier: tier.above_input_tokens)
        return replace(self, input=top.input, output=top.output, cached_input=top.cached_input)


def row_problems(name: str, rows: Sequence[ModelPrice]) -> list[str]:
    """あるモデルの行の並びの誤り。行がない、期間が逆、期間が重なる。"""
    problems = [] if rows else [f"{name}: no rows"]
    problems += [
        f"{name}: effective_to is not after effective_from ({row.period})"
        for row in rows
        if (row.effective_from or date.min) >= (row.effective_to or date.max)
    ]
    for earlier, later in pairwise(rows):
        if (earlier.effective_to or date.max) > (later.effective_from or date.min):
            problems.append(f"{name}: rows overlap ({earlier.period} / {later.period})")
    return problems
