"""8.2.3 トークン数からコストを計算する(本書にリストなし)。

入力トークン数にはキャッシュ分が含まれるので、足すのではなく、その分だけ単価を差し替える。
単価が分からないモデルを 0 円にすると、請求書が届くまで誰も気づかない。必ず例外か「未計算」にする。

実行::

    $ python chapter8_samples/02_cost_tracking/cost_calculator.py
    1. 基本: gpt-4o、入力 1000、出力 500 トークン
       $0.007500 (1 ドル 150 円なら 1.125 円)
    2. 入力 1000 のうち 800 がキャッシュ。上乗せではなく割引になる
       0.0005 + 0.001 = $0.0015
    3. 日付入りの名前を、前方一致で gpt-4o と間違えない
       gpt-4o-mini: $0.45 (gpt-4o なら 16.67 倍の $7.50)
    4. 2024-12-03 に値下げされた Claude 3.5 Haiku、入力 100 万トークン
       2024-12-02: $1.00
       2024-12-03: $0.80
    5. 同じ gpt-4o でも、サービスティアで単価が違う。入力 100 万、出力 10 万トークン
       default: $3.50
       batch: $1.75
       priority: $5.95
    6. 料金表にないモデルは 0 円にしない
       unpriced NaN
       no price for model 'gpt-5' in price table 2024-12 (as of 2024-12-31); today's prices:
       python -m chapter8_samples.cost_tracking prices import genai-prices -o prices.json; then
       pricing_file='prices.json', or add your own with pricing=

Databricks のエンドポイント名や Azure のデプロイ名は、``aliases={"my-endpoint": "gpt-4o"}`` で
料金表の名前に結び付ける。単価が契約で違うときは ``pricing`` に自社の単価を渡す。
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from chapter8_samples.cost_tracking.prices.call import (
    PriceBreakdown,
    Usage,
    checked_tier,
    checked_usage,
)
from chapter8_samples.cost_tracking.prices.model import CostError, NoPriceError, Rates
from chapter8_samples.cost_tracking.prices.table import PriceTable
from chapter8_samples.cost_tracking.tracker import BaseCostTracker

_ZERO = Decimal(0)
_MILLION = Decimal(1_000_000)


class CostCalculator:
    """モデル名とトークン数から USD を計算する。スレッド間で共有してよい。

    Args:
        pricing: 既定の表に足す料金。辞書の形は ``PriceTable.from_mapping`` にある。``{}`` は
            空の表で、``PriceTable`` を渡せばその表だけを使う。
        pricing_file: 既定の表の代わりに使う、JSON の料金表(``prices import`` の出力など)。
        on_unknown: ``"raise"`` は ``NoPriceError``、``"unpriced"`` は NaN を返す。0 にはしない。
        aliases: 社内の名前(Azure のデプロイ名など)から料金表のモデル名への対応。
    """

    def __init__(
        self,
        pricing: PriceTable | Mapping[str, Any] | None = None,
        pricing_file: str | Path | None = None,
        *,
        on_unknown: Literal["raise", "unpriced"] = "raise",
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        if on_unknown not in ("raise", "unpriced"):
            raise CostError(f"on_unknown must be 'raise' or 'unpriced', got {on_unknown!r}")
        self.table = PriceTable.chosen(pricing, pricing_file, aliases or {})
        self.on_unknown = on_unknown

    def calculate(
        self,
        model: str,
        input_tokens: int,
        output_tokens: int,
        cached_input_tokens: int = 0,
        **options: Any,
    ) -> float:
        """``price`` の合計を ``float`` で返す。引数は同じ。料金が決まらないときは、例外か NaN。"""
        item = self.price(model, input_tokens, output_tokens, cached_input_tokens, **options)
        return float(item.total_usd)

    def price(
        self,
        model: str,
        input_tokens: int,
        output_tokens: int,
        cached_input_tokens: int = 0,
        *,
        cache_write_tokens: int = 0,
        cache_write_1h_tokens: int = 0,
        service_tier: str | None = None,
        batch: bool = False,
        other_units: Mapping[str, int] | None = None,
        at: date | datetime | None = None,
    ) -> PriceBreakdown:
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
        usage = checked_usage(
            input_tokens, output_tokens, cached_input_tokens, cache_write_tokens,
            cache_write_1h_tokens,
        )  # fmt: skip
        tier = checked_tier(service_tier, batch) if service_tier or batch else ""
        try:
            if other_units and any(other_units.values()):
                odd = ", ".join(name for name, count in other_units.items() if count)
                raise NoPriceError(f"{model!r}: a price table has no price for {odd}")
            return self._priced(model, usage, tier, at)
        except NoPriceError as error:
            if self.on_unknown == "raise":
                raise
            return PriceBreakdown(model, "unpriced", usage[0], usage[1], tier, reason=str(error))

    def _priced(
        self, model: str, usage: Usage, tier: str, at: date | datetime | None
    ) -> PriceBreakdown:
        match = self.table.resolve(model)
        rates = self.table.price_at(match.name, at).rates(usage[0], tier, match.name)
        input_usd, cached_input_usd, cache_write_usd, output_usd = _amounts(rates, usage)
        return PriceBreakdown(
            model,
            "priced",
            usage[0],
            usage[1],
            tier,
            input_usd=input_usd,
            cached_input_usd=cached_input_usd,
            cache_write_usd=cache_write_usd,
            output_usd=output_usd,
            matched_model=match.name,
            match_kind=match.kind,
            price_source=f"{self.table.name}/{match.name}",
        )


def _amounts(rates: Rates, usage: Usage) -> tuple[Decimal, Decimal, Decimal, Decimal]:
    """通常の入力、読み込み、書き込み、出力の USD。キャッシュの分は単価を差し替える。"""
    total, output, read, write, write_1h = usage
    fresh = (total - read - write) * rates.input / _MILLION
    cached = written = _ZERO
    if read:
        price = rates.input if rates.cached_input is None else rates.cached_input
        cached = read * price / _MILLION
    if write:
        price = rates.input if rates.cache_write is None else rates.cache_write
        hour = rates.cache_write_1h
        if hour is None:  # Anthropic の規則: 1 時間は入力の 2 倍、5 分は 1.25 倍(比は 1.6)
            hour = price if rates.cache_write is None else price * Decimal("1.6")
        written = ((write - write_1h) * price + write_1h * hour) / _MILLION
    return fresh, cached, written, output * rates.output / _MILLION


class CostTracker(BaseCostTracker):
    """コストの合計と予算の監視。使い方は ``BaseCostTracker`` にある。"""

    def default_calculator(self) -> CostCalculator:
        """未知のモデルを「未計算」に数える計算器。"""
        return CostCalculator(on_unknown="unpriced")


def format_yen(usd: float | Decimal, yen_per_usd: float | Decimal) -> str:
    """USD を円の表示にする。100 円未満は小数 4 桁まで出す。料金の決まらない NaN は「料金未定」。

    >>> format_yen(0.0075, 150)
    '1.125 円'
    """
    yen = Decimal(str(usd)) * Decimal(str(yen_per_usd))
    if yen.is_nan():
        return "料金未定"
    if abs(yen) >= 100:
        return f"{yen:,.0f} 円"
    return f"{yen:.4f}".rstrip("0").rstrip(".") + " 円"


def main() -> None:
    calculator = CostCalculator()
    print("1. 基本: gpt-4o、入力 1000、出力 500 トークン")
    cost = calculator.calculate(model="gpt-4o", input_tokens=1000, output_tokens=500)
    print(f"   ${cost:.6f} (1 ドル 150 円なら {format_yen(cost, 150)})")
    print("2. 入力 1000 のうち 800 がキャッシュ。上乗せではなく割引になる")
    item = calculator.price("gpt-4o", 1000, 0, 800)
    print(f"   {item.input_usd} + {item.cached_input_usd} = ${item.total_usd:f}")
    print("3. 日付入りの名前を、前方一致で gpt-4o と間違えない")
    item = calculator.price("gpt-4o-mini-2024-07-18", 1_000_000, 500_000)
    wrong = calculator.price("gpt-4o", 1_000_000, 500_000).total_usd
    ratio = f"gpt-4o なら {wrong / item.total_usd:.2f} 倍の ${wrong:.2f}"
    print(f"   {item.matched_model}: ${item.total_usd:f} ({ratio})")
    print("4. 2024-12-03 に値下げされた Claude 3.5 Haiku、入力 100 万トークン")
    for day in (date(2024, 12, 2), date(2024, 12, 3)):
        usd = calculator.calculate("claude-3-5-haiku-20241022", 1_000_000, 0, at=day)
        print(f"   {day}: ${usd:.2f}")
    print("5. 同じ gpt-4o でも、サービスティアで単価が違う。入力 100 万、出力 10 万トークン")
    for tier in ("default", "batch", "priority"):
        usd = calculator.calculate("gpt-4o", 1_000_000, 100_000, service_tier=tier)
        print(f"   {tier}: ${usd:.2f}")
    print("6. 料金表にないモデルは 0 円にしない")
    item = CostCalculator(on_unknown="unpriced").price("gpt-5", 1000, 500)
    print(f"   {item.status} {item.total_usd}")
    print(textwrap.indent(textwrap.fill(item.reason, 90, break_on_hyphens=False), "   "))


if __name__ == "__main__":
    main()
