"""8.2.3 トークン数からコストを計算する(本書にリストなし)。"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from .prices import CostError, Match, ModelPrice, PriceTable
from .tracker import BaseCostTracker, BudgetAlert, Calculator
_NAN = Decimal('NaN')

class InvalidUsageError(CostError):
    """トークン数がありえない値(負、真偽値、小数、入力より多いキャッシュ)。"""

@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBreakdown:
    """1 回の呼び出しのコストの内訳。金額はすべて USD の ``Decimal``。

    料金が決まらなかったとき(``status="unpriced"``)の金額は ``Decimal("NaN")``。
    0 ではないので、合計に混ぜれば合計も NaN になり、見落とせない。
    """
    model: str
    status: Literal['priced', 'unpriced']
    input_tokens: int
    output_tokens: int
    input_usd: Decimal = _NAN
    cached_input_usd: Decimal = _NAN
    cache_write_usd: Decimal = _NAN
    output_usd: Decimal = _NAN
    matched_model: str = ''
    match_kind: str = ''
    price_source: str = ''
    row: ModelPrice | None = None
    reason: str = ''

    @property
    def prompt_usd(self) -> Decimal:
        """入力側の合計(通常 + キャッシュ読み込み + キャッシュ書き込み)。"""

    @property
    def total_usd(self) -> Decimal:
        """入力側と出力の合計。"""

    @property
    def priced(self) -> bool:
        """料金が決まったか。"""
Usage = tuple[int, int, int, int, int]
Amounts = tuple[Decimal, Decimal, Decimal, Decimal]

class CostCalculator:
    """モデル名とトークン数から USD を計算する。スレッド間で共有してよい。

    Args:
        pricing: 料金表。辞書なら ``PriceTable.from_mapping`` の形。``None`` は 2024 年 12 月の
            公開料金。``{}`` は空の表で、既定の表には戻らない。
        pricing_file: JSON か YAML の料金表。``pricing`` と同時には渡せない。
        on_unknown: ``"raise"`` は ``NoPriceError``、``"unpriced"`` は NaN を返す。0 にはしない。
        aliases: 社内の名前(Azure のデプロイ名など)から料金表のモデル名への対応。
    """

    def __init__(self, pricing: PriceTable | Mapping[str, Any] | None=None, pricing_file: str | Path | None=None, *, on_unknown: Literal['raise', 'unpriced']='raise', aliases: Mapping[str, str] | None=None) -> None:
        self.table: PriceTable
        self.on_unknown = on_unknown

    def calculate(self, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int=0, *, cache_write_tokens: int=0, cache_write_1h_tokens: int=0, service_tier: str | None=None, batch: bool=False, other_units: Mapping[str, int] | None=None, at: date | datetime | None=None) -> float:
        """コストを USD で返す。計算は 10 進数で行い、最後に一度だけ ``float`` にする。

        Args:
            model: 提供元が返したモデル名。接頭辞や Bedrock の ID もそのままでよい。
            input_tokens: 入力トークン数。キャッシュ分を含む(MLflow と OpenAI の数え方)。
            output_tokens: 出力トークン数。推論トークンを含む。
            cached_input_tokens: 入力のうち、キャッシュから読んだ数。
            cache_write_tokens: 入力のうち、キャッシュに書いた数(1 時間分を含む)。
            cache_write_1h_tokens: 書き込みのうち、1 時間保持の数。
            service_tier: 提供元が返した処理の段。``"batch"`` は ``batch=True`` と同じ。
            batch: バッチ API の料金か。
            other_units: 料金表にない単位の数(音声トークンなど)。1 つでもあれば料金は決まらない。
            at: いつの料金か。日付か、タイムゾーン付きの時刻。``None`` は最新の行。

        Raises:
            InvalidUsageError: トークン数がありえない値のとき。
            NoPriceError: 料金が決まらないとき(``on_unknown="unpriced"`` なら NaN を返す)。
        """

    def price(self, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int=0, *, cache_write_tokens: int=0, cache_write_1h_tokens: int=0, service_tier: str | None=None, batch: bool=False, other_units: Mapping[str, int] | None=None, at: date | datetime | None=None) -> PriceBreakdown:
        """``calculate`` と同じ計算の、内訳と根拠(料金表の行、照合の仕方)。金額は ``Decimal``。"""

    def _look_up(self, model: str, usage: Usage, at: date | datetime | None, batch: bool) -> tuple[Match, ModelPrice, Amounts]:
        ...

class CostTracker(BaseCostTracker):
    """コストを集計し、予算の割合に達したら一度だけ知らせる。

    ``calculator`` の既定は、未知のモデルを「未計算」に数える ``CostCalculator``。
    ほかの引数と使い方は ``BaseCostTracker`` にある。
    """

    def __init__(self, budget_usd: float | Decimal | None=None, on_budget: Callable[[BudgetAlert], object] | None=None, thresholds: Sequence[float]=(0.5, 0.8, 1.0), *, calculator: Calculator | None=None, max_keys: int=10000) -> None:
        ...

def format_yen(usd: float | Decimal, yen_per_usd: float | Decimal) -> str:
    """USD を円の表示にする。1 円未満は 4 桁まで出す。料金の決まらない NaN は「料金未定」。

    >>> format_yen(0.0075, 150)
    '1.125 円'
    """

def main() -> None:
    ...
