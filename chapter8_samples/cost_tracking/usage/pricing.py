"""8.2.3 使用量にコストを付け、保存済みのトレースのコストを計算し直す(本書にリストなし)。

料金表になかったモデルは、後から行を足せば計算できる。合計に未計算が混ざっているかどうかを
必ず一緒に返すので、下限でしかない金額を、正しい合計と取り違えない。

Databricks のトレースでも同じ。``mlflow.get_trace`` か ``mlflow.search_traces`` で読んで渡す。
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, Protocol

from mlflow.entities import Trace

from .reader import TokenUsage, llm_calls, load_trace


class Price(Protocol):
    """1 回の呼び出しのコスト(``PriceBreakdown`` など)。"""

    @property
    def model(self) -> str: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def priced(self) -> bool: ...
    @property
    def prompt_usd(self) -> Decimal: ...
    @property
    def output_usd(self) -> Decimal: ...
    @property
    def total_usd(self) -> Decimal: ...
    @property
    def matched_model(self) -> str: ...
    @property
    def price_source(self) -> str: ...


class Calculator(Protocol):
    """``CostCalculator``、または同じ ``price`` を持つもの。"""

    def price(
        self,
        model: str,
        input_tokens: int,
        output_tokens: int,
        cached_input_tokens: int = 0,
        *,
        cache_write_tokens: int = 0,
        cache_write_1h_tokens: int = 0,
        at: date | datetime | None = None,
    ) -> Any: ...


def price_usage(
    calculator: Calculator, model: str, usage: TokenUsage, at: datetime | None
) -> Price:
    """使用量にコストを付ける。料金が決まらなければ ``UnpricedCall``。"""
    try:
        return calculator.price(
            model,
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
            at=at,
        )
    except LookupError:  # NoPriceError。未知のモデルや、その日に有効な行がないとき
        return UnpricedCall(model, usage.input_tokens, usage.output_tokens)


@dataclass(frozen=True, slots=True)
class UnpricedCall:
    """料金の決まらなかった呼び出し。金額は NaN。``CostTracker`` では別に数えられる。"""

    model: str
    input_tokens: int
    output_tokens: int
    priced: bool = False
    prompt_usd: Decimal = Decimal("NaN")
    output_usd: Decimal = Decimal("NaN")
    total_usd: Decimal = Decimal("NaN")
    matched_model: str = ""
    price_source: str = ""


@dataclass(frozen=True, slots=True)
class TraceCost:
    """トレース 1 件のコスト。``complete`` が偽なら、``total_usd`` は下限でしかない。"""

    total_usd: Decimal
    by_model: dict[str, Decimal]
    unpriced_models: tuple[str, ...]
    calls_without_usage: int

    @property
    def complete(self) -> bool:
        """すべての呼び出しに料金が付いたか。"""
        return not self.unpriced_models and not self.calls_without_usage


def trace_cost(
    trace: Trace | str, calculator: Calculator, *, at: datetime | None = None
) -> TraceCost:
    """保存済みのトレースを計算し直す。モデルの混在、入れ子、料金不明を正しく扱う。

    Args:
        at: いつの料金か。``None`` は、それぞれの呼び出しが始まった日。

    Raises:
        TraceNotFoundError: ID のトレースがない。
        InvalidUsageError: 負の数など、ありえない使用量を持つスパンがある。
    """
    by_model: dict[str, Decimal] = {}
    unpriced: dict[str, None] = {}
    missing = 0
    for call in llm_calls(load_trace(trace)):
        if call.usage is None:
            missing += 1
            continue
        price = price_usage(calculator, call.model, call.usage, at or call.started_at)
        if price.priced:
            by_model[call.model] = by_model.get(call.model, Decimal(0)) + price.total_usd
        else:
            unpriced[call.model] = None
    return TraceCost(sum(by_model.values(), Decimal(0)), by_model, tuple(unpriced), missing)
