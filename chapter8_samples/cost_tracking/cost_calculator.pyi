"""8.2.3 トークン数からコストを計算する(本書にリストなし)。"""

from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from .prices.call import PriceBreakdown, Usage
from .prices.table import PriceTable
from .tracker import BaseCostTracker

class CostCalculator:
    """モデル名とトークン数から USD を計算する。スレッド間で共有してよい。

    Args:
        pricing: 既定の表に足す料金。辞書の形は ``PriceTable.from_mapping`` にある。``{}`` は
            空の表で、``PriceTable`` を渡せばその表だけを使う。
        pricing_file: 既定の表の代わりに使う、JSON の料金表(``prices import`` の出力など)。
        on_unknown: ``"raise"`` は ``NoPriceError``、``"unpriced"`` は NaN を返す。0 にはしない。
        aliases: 社内の名前(Azure のデプロイ名など)から料金表のモデル名への対応。
    """

    def __init__(self, pricing: PriceTable | Mapping[str, Any] | None=None, pricing_file: str | Path | None=None, *, on_unknown: Literal['raise', 'unpriced']='raise', aliases: Mapping[str, str] | None=None) -> None:
        self.on_unknown = on_unknown

    def calculate(self, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int=0, **options: Any) -> float:
        """``price`` の合計を ``float`` で返す。引数は同じ。料金が決まらないときは、例外か NaN。"""

    def price(self, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int=0, *, cache_write_tokens: int=0, cache_write_1h_tokens: int=0, service_tier: str | None=None, batch: bool=False, other_units: Mapping[str, int] | None=None, at: date | datetime | None=None) -> PriceBreakdown:
        """コストの内訳と根拠を返す。

        Args:
            model: 提供元が返したモデル名。接頭辞や Bedrock の ID もそのままでよい。
            input_tokens: 入力トークン数。キャッシュ分を含む(MLflow と OpenAI の数え方)。
            output_tokens: 出力トークン数。推論トークンを含む。
            cached_input_tokens: 入力のうち、キャッシュから読んだ数。
            cache_write_tokens: 入力のうち、キャッシュに書いた数(1 時間分を含む)。
            cache_write_1h_tokens: 書き込みのうち、1 時間保持の数。
            service_tier: 提供元が返したサービスティア(``"priority"``、``"flex"`` など)。
            batch: バッチ API の料金か。``service_tier="batch"`` と同じ。
            other_units: 料金表で表せないものの数(音声トークン、検索など)。あれば料金は決まらない。
            at: いつの料金か。日付か、タイムゾーン付きの時刻。``None`` は最新の行。

        Raises:
            InvalidUsageError: トークン数がありえない値のとき。
            NoPriceError: 料金が決まらないとき(``on_unknown="unpriced"`` なら投げない)。
        """

    def _priced(self, model: str, usage: Usage, tier: str, at: date | datetime | None) -> PriceBreakdown:
        ...

class CostTracker(BaseCostTracker):
    """コストの合計と予算の監視。使い方は ``BaseCostTracker`` にある。"""

    def default_calculator(self) -> CostCalculator:
        """未知のモデルを「未計算」に数える計算器。"""

def format_yen(usd: float | Decimal, yen_per_usd: float | Decimal) -> str:
    """USD を円の表示にする。100 円未満は小数 4 桁まで出す。料金の決まらない NaN は「料金未定」。

    >>> format_yen(0.0075, 150)
    '1.125 円'
    """

def main() -> None:
    ...
