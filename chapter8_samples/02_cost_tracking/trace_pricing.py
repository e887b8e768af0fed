"""8.2.3 保存済みのトレースのコストを計算し直す(本書にリストなし)。

料金表になかったモデルは、後から行を足せば計算できる。合計に未計算が混ざっているかどうかを
必ず一緒に返すので、下限でしかない金額を、正しい合計と取り違えない。

実行::

    $ python chapter8_samples/02_cost_tracking/trace_pricing.py
    1. 合計は下限であることが分かる
       $0.0103  complete=False  未計算: my-model
    2. 料金表に行を足して、同じトレースを計算し直す
       gpt-4o-2024-08-06         $0.0075
       claude-3-5-haiku-20241022 $0.0028
       my-model                  $0.0007
       $0.0110  complete=True
    3. 値下げ前の日の料金で計算する
       2024-12-02 の料金なら claude-3-5-haiku-20241022 は $0.0035

Databricks のトレースでも同じ。``mlflow.get_trace`` か ``mlflow.search_traces`` で読んで渡す。
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
from mlflow.entities import Trace

if TYPE_CHECKING or __package__:
    from .trace_reader import Calculator, llm_calls, load_trace, price_usage
else:  # trace_reader.py と 2 枚だけ写したとき、またはパスで実行したとき
    from trace_reader import Calculator, llm_calls, load_trace, price_usage


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


def main() -> None:
    from chapter8_samples import _lab
    from chapter8_samples.cost_tracking.cost_calculator import CostCalculator
    from chapter8_samples.cost_tracking.price_table import PriceTable

    with _lab.sample("ch8-trace-pricing"):
        trace = three_models()
        print("1. 合計は下限であることが分かる")
        total = price_trace(trace)
        unknown = ", ".join(total.unpriced_models)
        print(f"   ${total.total_usd:f}  complete={total.complete}  未計算: {unknown}")

        print("2. 料金表に行を足して、同じトレースを計算し直す")
        table = PriceTable.default().with_overrides(
            {"models": {"my-model": {"input": "0.30", "output": "0.80"}}}
        )
        total = price_trace(trace, CostCalculator(table))
        for model, usd in total.by_model.items():
            print(f"   {model:<26}${usd:f}")
        print(f"   ${total.total_usd:f}  complete={total.complete}")

        print("3. 値下げ前の日の料金で計算する")
        day, haiku = datetime(2024, 12, 2, tzinfo=timezone.utc), "claude-3-5-haiku-20241022"
        before = price_trace(trace, at=day).by_model[haiku]
        print(f"   {day:%Y-%m-%d} の料金なら {haiku} は ${before:f}")


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


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # インストールなしでも動くように
    main()
