"""8.2.3 モデルの料金表(本書にリストなし)。"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
MatchKind = Literal['exact', 'alias']

class CostError(ValueError):
    """この節の例外の親。"""

class NoPriceError(CostError, LookupError):
    """料金が決められない。0 として扱ってはならない。"""

class UnknownModelError(NoPriceError):
    """料金表にないモデル。``suggestions`` は綴りの近い名前。"""

    def __init__(self, model: str, suggestions: Sequence[str]=()) -> None:
        self.model = model
        self.suggestions = tuple(suggestions)

class PriceNotEffectiveError(NoPriceError):
    """モデルの行はあるが、その日に有効なものがない。"""

class PriceTableError(CostError):
    """料金表の誤り。``problems`` に、見つかったものをすべて持つ。"""

    def __init__(self, problems: Sequence[str]) -> None:
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
    provider: str = ''
    source: str = ''

    def covers(self, day: date) -> bool:
        """その日に有効か。"""

    def tier_for(self, input_tokens: int) -> ModelPrice:
        """入力の長さに応じた単価の行。段がなければ自分自身。"""

@dataclass(frozen=True, slots=True)
class Match:
    """名前の照合結果。``name`` は料金表での名前。"""
    name: str
    kind: MatchKind

def canonical_model_name(model: str) -> str:
    """提供元ごとの綴りを、料金表の綴りに直す(接頭辞、Bedrock の ID と ARN、Vertex の ``@日付``)。

    >>> canonical_model_name("us.anthropic.claude-3-5-sonnet-20241022-v2:0")
    'claude-3-5-sonnet-20241022'
    """

@dataclass(frozen=True)
class PriceTable:
    """モデル名と日付から料金の行を引く表。変更はせず、``with_overrides`` で新しい表を作る。"""
    rows: Mapping[str, tuple[ModelPrice, ...]]
    aliases: Mapping[str, str] = field(default_factory=dict[str, str])
    name: str = 'custom'
    _resolved: dict[str, Match] = field(default_factory=dict[str, Match], init=False, repr=False, compare=False)
    _near: dict[str, list[str]] = field(default_factory=dict[str, list[str]], init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ...

    @classmethod
    def default(cls) -> PriceTable:
        """2024 年 12 月の公開料金。実際の請求の前に、提供元の料金ページで確かめること。"""

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any], *, name: str='custom') -> PriceTable:
        """辞書から作る。

        ``{"models": {...}}`` は USD / 100 万トークン(``"unit": "per_1k_tokens"`` なら 1,000)。
        ``{"gpt-4o": {"input": 0.0025, "output": 0.01}}`` のような平らな形は、本書と同じく
        USD / 1,000 トークンとして読む。誤りは ``PriceTableError`` にすべて並べる。
        """

    @classmethod
    def from_file(cls, path: str | Path) -> PriceTable:
        """JSON または YAML のファイルから作る。形は ``from_mapping`` と同じ。"""

    def with_overrides(self, data: Mapping[str, Any] | str | Path) -> PriceTable:
        """同じ名前の行を置き換え、ない名前の行を足した、新しい表。

        ``data`` は ``from_mapping`` と同じ形の辞書か、その形の JSON または YAML のファイル。
        """

    def with_aliases(self, aliases: Mapping[str, str]) -> PriceTable:
        """別名(Azure のデプロイ名など)を足した、新しい表。``{"my-deployment": "gpt-4o"}``"""

    def resolve(self, model: str) -> Match:
        """名前を料金表の行に結び付ける。完全一致か登録済みの別名だけで、前方一致はしない。

        Raises:
            UnknownModelError: 見つからないとき。
        """

    def _look_up(self, model: str) -> Match:
        ...

    def _near_names(self, raw: str, name: str) -> list[str]:
        """綴りの近い名前。探すのは遅いので覚えておく(未知のモデルは、呼ぶたびに来る)。"""

    def price_at(self, name: str, at: date | datetime | None=None) -> ModelPrice:
        """``resolve`` した名前の、その時点の行。``at=None`` は最新の行。

        Raises:
            PriceNotEffectiveError: その日に有効な行がないとき。
            CostError: ``at`` が日付でないか、時刻なのにタイムゾーンがないとき。
        """

def row_problems(name: str, rows: Sequence[ModelPrice]) -> list[str]:
    """あるモデルの行の並びの誤り。行がない、期間が逆、期間が重なる。"""

def main() -> None:
    ...
