"""8.2.3 保存済みのトレースのコストを計算し直す(本書にリストなし)。

料金表になかったモデルは、後から行を足せば計算できる。合計に未計算が混ざっているかどうかを
必ず一緒に返すので、下限でしかない金額を、正しい合計と取り違えない。

Databricks のトレースでも同じ。``mlflow.get_trace`` か ``mlflow.search_traces`` で読んで渡す。
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from importlib import import_module

import mlflow
from mlflow.entities import Trace

from .reader import Calculator, llm_calls, load_trace, price_usage


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


def price_trace(
    trace: Trace | str, calculator: Calculator | None = None, *, at: datetime | None = None
) -> TraceCost:
    """保存済みのトレースを計算し直す。モデルの混在、入れ子、料金不明を正しく扱う。

    Args:
        calculator: 既定は 2024 年 12 月の公開料金。
        at: いつの料金か。``None`` は、それぞれの呼び出しが始まった日。

    Raises:
        TraceNotFoundError: ID のトレースがない。
        InvalidUsageError: 負の数など、ありえない使用量を持つスパンがある。
    """
    if calculator is None:
        sibling = ".cost_calculator" if __package__ else "cost_calculator"
        calculator = import_module(sibling, __package__).CostCalculator()
        assert calculator is not None
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


def three_models() -> Trace:
    """3 つのモデルを 1 回ずつ呼んだトレース。1 つは料金表にない。"""
    start = int(datetime(2024, 12, 20, tzinfo=timezone.utc).timestamp() * 1e9)
    root = mlflow.start_span_no_context("agent", start_time_ns=start)
    for model in ("gpt-4o-2024-08-06", "claude-3-5-haiku-20241022", "my-model"):
        call = mlflow.start_span_no_context("call", "CHAT_MODEL", root, start_time_ns=start)
        usage = {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}
        call.set_attributes({"mlflow.llm.model": model, "mlflow.chat.tokenUsage": usage})
        call.end(end_time_ns=start + 10**9)
    root.end(end_time_ns=start + 10**9)
    mlflow.flush_trace_async_logging()
    trace = mlflow.get_trace(root.trace_id)
    assert trace is not None
    return trace
