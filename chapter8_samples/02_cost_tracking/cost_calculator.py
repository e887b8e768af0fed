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
    5. 料金表にないモデルは 0 円にしない
       UnknownModelError: gpt-4o-minii。近い名前: gpt-4o-mini, gpt-4o, gpt-4o-mini-2024-07-18

Databricks のエンドポイント名や Azure のデプロイ名は、``aliases={"my-endpoint": "gpt-4o"}`` で
料金表の名前に結び付ける。単価が契約で違うときは ``pricing_file`` に自社の料金表を渡す。
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from chapter8_samples.cost_tracking.prices import (
    CostError,
    Match,
    ModelPrice,
    NoPriceError,
    PriceTable,
    UnknownModelError,
)
from chapter8_samples.cost_tracking.tracker import BaseCostTracker, BudgetAlert, Calculator

_MILLION = Decimal(1_000_000)
_ZERO = Decimal(0)
_NAN = Decimal("NaN")


class InvalidUsageError(CostError):
    """トークン数がありえない値(負、真偽値、小数、入力より多いキャッシュ)。"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceBreakdown:
    """1 回の呼び出しのコストの内訳。金額はすべて USD の ``Decimal``。

    料金が決まらなかったとき(``status="unpriced"``)の金額は ``Decimal("NaN")``。
    0 ではないので、合計に混ぜれば合計も NaN になり、見落とせない。
    """

    model: str
    status: Literal["priced", "unpriced"]
    input_tokens: int
    output_tokens: int
    input_usd: Decimal = _NAN
    cached_input_usd: Decimal = _NAN
    cache_write_usd: Decimal = _NAN
    output_usd: Decimal = _NAN
    matched_model: str = ""
    match_kind: str = ""
    price_source: str = ""
    row: ModelPrice | None = None
    reason: str = ""

    @property
    def prompt_usd(self) -> Decimal:
        """入力側の合計(通常 + キャッシュ読み込み + キャッシュ書き込み)。"""
        return self.input_usd + self.cached_input_usd + self.cache_write_usd

    @property
    def total_usd(self) -> Decimal:
        """入力側と出力の合計。"""
        return self.prompt_usd + self.output_usd

    @property
    def priced(self) -> bool:
        """料金が決まったか。"""
        return self.status == "priced"


_USAGE_NAMES = (
    "input_tokens", "output_tokens",
    "cached_input_tokens", "cache_write_tokens", "cache_write_1h_tokens",
)  # fmt: skip
Usage = tuple[int, int, int, int, int]  # 上の順のトークン数
Amounts = tuple[Decimal, Decimal, Decimal, Decimal]  # 通常の入力、読み込み、書き込み、出力の USD


class CostCalculator:
    """モデル名とトークン数から USD を計算する。スレッド間で共有してよい。

    Args:
        pricing: 料金表。辞書なら ``PriceTable.from_mapping`` の形。``None`` は 2024 年 12 月の
            公開料金。``{}`` は空の表で、既定の表には戻らない。
        pricing_file: JSON か YAML の料金表。``pricing`` と同時には渡せない。
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
        if pricing is not None and pricing_file is not None:
            raise CostError("pass either pricing or pricing_file, not both")
        if on_unknown not in ("raise", "unpriced"):
            raise CostError(f"on_unknown must be 'raise' or 'unpriced', got {on_unknown!r}")
        table = _load(pricing, pricing_file)
        self.table: PriceTable = table.with_aliases(aliases) if aliases else table
        self.on_unknown = on_unknown

    def calculate(
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
    ) -> float:
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
        usage = (
            input_tokens, output_tokens,
            cached_input_tokens, cache_write_tokens, cache_write_1h_tokens,
        )  # fmt: skip
        try:
            _, _, (fresh, read, write, output) = self._look_up(
                model, usage, at, _is_batch(service_tier, batch, other_units)
            )
        except NoPriceError:
            if self.on_unknown == "raise":
                raise
            return float("nan")
        return float(fresh + read + write + output)

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
        """``calculate`` と同じ計算の、内訳と根拠(料金表の行、照合の仕方)。金額は ``Decimal``。"""
        usage = (
            input_tokens, output_tokens,
            cached_input_tokens, cache_write_tokens, cache_write_1h_tokens,
        )  # fmt: skip
        try:
            match, row, amounts = self._look_up(
                model, usage, at, _is_batch(service_tier, batch, other_units)
            )
        except NoPriceError as error:
            if self.on_unknown == "raise":
                raise
            return _unpriced(model, usage, str(error))
        return PriceBreakdown(
            model=model,
            status="priced",
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            input_usd=amounts[0],
            cached_input_usd=amounts[1],
            cache_write_usd=amounts[2],
            output_usd=amounts[3],
            matched_model=match.name,
            match_kind=match.kind,
            price_source=f"{self.table.name}/{match.name}",
            row=row,
        )

    def _look_up(
        self, model: str, usage: Usage, at: date | datetime | None, batch: bool
    ) -> tuple[Match, ModelPrice, Amounts]:
        _check_usage(usage)
        match = self.table.resolve(model)
        row = self.table.price_at(match.name, at)
        return match, row, _amounts(row, usage, batch)


def _is_batch(tier: str | None, batch: bool, other_units: Mapping[str, int] | None) -> bool:
    if odd := [name for name, count in (other_units or {}).items() if count]:
        raise NoPriceError(f"no price for {', '.join(odd)}")
    if tier in (None, "", "default", "standard", "auto", "on_demand"):
        return batch
    if tier != "batch":
        raise NoPriceError(f"no price for service_tier={tier!r}")
    return True


def _load(pricing: PriceTable | Mapping[str, Any] | None, file: str | Path | None) -> PriceTable:
    if isinstance(pricing, PriceTable):
        return pricing
    if pricing is not None:
        return PriceTable.from_mapping(pricing)
    return PriceTable.from_file(file) if file is not None else PriceTable.default()


def _unpriced(model: str, usage: Usage, reason: str) -> PriceBreakdown:
    return PriceBreakdown(
        model=model,
        status="unpriced",
        input_tokens=usage[0],
        output_tokens=usage[1],
        reason=reason,
    )


def _check_usage(usage: Usage) -> None:
    for name, value in zip(_USAGE_NAMES, usage, strict=True):
        if type(value) is not int or value < 0:
            raise InvalidUsageError(f"{name} must be an integer >= 0, got {value!r}")
    total, _, read, write, write_1h = usage
    if read + write > total:
        raise InvalidUsageError(
            f"cached_input_tokens + cache_write_tokens ({read} + {write}) exceeds input_tokens "
            f"({total}); input_tokens must include cached tokens"
        )
    if write_1h > write:
        raise InvalidUsageError(
            f"cache_write_1h_tokens ({write_1h}) exceeds cache_write_tokens ({write})"
        )


def _amounts(row: ModelPrice, usage: Usage, batch: bool) -> Amounts:
    total, output, read, write, write_1h = usage
    price = row.tier_for(total) if row.tiers else row
    input_price, output_price = price.input, price.output
    if batch:
        if row.batch_input is None or row.batch_output is None or price is not row:
            what = "batch price" if price is row else "batch price for inputs this long"
            raise NoPriceError(f"no {what} in this row ({row.source or row.provider})")
        input_price, output_price = row.batch_input, row.batch_output
    fresh_usd = (total - read - write) * input_price / _MILLION
    output_usd = output * output_price / _MILLION
    if not read and not write:
        return fresh_usd, _ZERO, _ZERO, output_usd
    cached = price.cached_input if price.cached_input is not None else input_price
    write_5m = row.cache_write if row.cache_write is not None else input_price
    hour = row.cache_write_1h if row.cache_write_1h is not None else write_5m
    write_usd = ((write - write_1h) * write_5m + write_1h * hour) / _MILLION
    return fresh_usd, read * cached / _MILLION, write_usd, output_usd


class CostTracker(BaseCostTracker):
    """コストを集計し、予算の割合に達したら一度だけ知らせる。

    ``calculator`` の既定は、未知のモデルを「未計算」に数える ``CostCalculator``。
    ほかの引数と使い方は ``BaseCostTracker`` にある。
    """

    def __init__(
        self,
        budget_usd: float | Decimal | None = None,
        on_budget: Callable[[BudgetAlert], object] | None = None,
        thresholds: Sequence[float] = (0.5, 0.8, 1.0),
        *,
        calculator: Calculator | None = None,
        max_keys: int = 10_000,
    ) -> None:
        super().__init__(
            budget_usd,
            on_budget,
            thresholds,
            calculator=calculator or CostCalculator(on_unknown="unpriced"),
            max_keys=max_keys,
        )


def format_yen(usd: float | Decimal, yen_per_usd: float | Decimal) -> str:
    """USD を円の表示にする。1 円未満は 4 桁まで出す。料金の決まらない NaN は「料金未定」。

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
    print(f"   {item.matched_model}: ${item.total_usd:f} (gpt-4o なら 16.67 倍の $7.50)")

    print("4. 2024-12-03 に値下げされた Claude 3.5 Haiku、入力 100 万トークン")
    for day in (date(2024, 12, 2), date(2024, 12, 3)):
        usd = calculator.calculate("claude-3-5-haiku-20241022", 1_000_000, 0, at=day)
        print(f"   {day}: ${usd:.2f}")

    print("5. 料金表にないモデルは 0 円にしない")
    try:
        calculator.calculate("gpt-4o-minii", 1000, 500)
    except UnknownModelError as error:
        print(f"   UnknownModelError: {error.model}。近い名前: {', '.join(error.suggestions)}")


if __name__ == "__main__":
    main()
