"""8.2.3 料金の行と、この節の例外(本書にリストなし)。単価はすべて USD / 100 万トークン。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from decimal import Decimal
from typing import Any, ClassVar

LEAST = {"input": Decimal("0.002"), "output": Decimal("0.002")}  # いちばん安いモデルより安い
AMOUNTS = ("input", "output", "cached_input", "cache_write", "cache_write_1h")
_PACKAGE = __name__.rpartition(".prices.")[0]
IMPORT_COMMAND = f"python -m {_PACKAGE} prices import genai-prices -o prices.json"


class CostError(ValueError):
    """この節の例外の親。"""


class NoPriceError(CostError, LookupError):
    """料金が決められない。0 として扱ってはならない。"""


class UnknownModelError(NoPriceError):
    """料金表にないモデル。``suggestions`` は、打ち間違いと思われるときの正しい名前。"""

    def __init__(self, model: str, suggestions: Sequence[str] = (), table: str = "") -> None:
        hint = f" (did you mean: {', '.join(suggestions)})" if suggestions else ""
        super().__init__(
            f"no price for model {model!r} in price table {table}{hint}; today's prices: "
            f"{IMPORT_COMMAND}; then pricing_file='prices.json', or add your own with pricing="
        )
        self.model = model
        self.suggestions = tuple(suggestions)


class PriceNotEffectiveError(NoPriceError):
    """モデルの行はあるが、その日に有効なものがない。"""


class PriceTableError(CostError):
    """料金表の誤り。``problems`` にすべて持ち、表示は最初の数件だけにする。"""

    def __init__(self, problems: Sequence[str]) -> None:
        more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        super().__init__("invalid price table: " + "; ".join([*problems[:8], *more]))
        self.problems = tuple(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """単価。``None`` は割引がないことを表し、入力と同じ単価で数える。

    1 時間の書き込みだけは、``None`` なら 5 分の書き込みの 1.6 倍とする(Anthropic の規則)。
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}  # ファイルの検査で使う

    input: Decimal
    output: Decimal
    cached_input: Decimal | None = None
    cache_write: Decimal | None = None
    cache_write_1h: Decimal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Level(Rates):
    """標準の単価と、サービスティア(``batch``、``priority``、``flex`` など)ごとの単価。"""

    service_tiers: Mapping[str, Rates] = field(default_factory=dict[str, Rates])


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTier(Level):
    """長い入力の段。入力がこの数を超えたリクエストは、全トークンがこの単価になる。"""

    above_input_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPrice(Level):
    """あるモデルの、ある期間の料金。``effective_to`` の日は含まない。"""

    tiers: tuple[PriceTier, ...] = ()
    effective_from: date | None = None
    effective_to: date | None = None
    aliases: tuple[str, ...] = field(default=(), compare=False)
    provider: str = field(default="", compare=False)
    source: str = field(default="", compare=False)

    @property
    def period(self) -> str:
        """エラーに出す期間の表示。"""
        return f"{self.effective_from or '...'} to {self.effective_to or '...'}"

    def covers(self, day: date) -> bool:
        """その日に有効か。"""
        return (self.effective_from or date.min) <= day < (self.effective_to or date.max)

    def rates(self, input_tokens: int, service_tier: str = "", model: str = "") -> Rates:
        """入力の長さとサービスティア(``""`` は標準)に応じた単価。その単価がなければ例外。"""
        level: Level = self
        if reached := [tier for tier in self.tiers if input_tokens > tier.above_input_tokens]:
            level = max(reached, key=lambda tier: tier.above_input_tokens)
        if not service_tier:
            return level
        if service_tier not in level.service_tiers:
            long = "" if level is self else " for inputs this long"
            row = f"the row of {model!r} ({self.period}); add it to service_tiers with pricing="
            raise NoPriceError(f"no {service_tier} price{long} in {row}")
        return level.service_tiers[service_tier]
