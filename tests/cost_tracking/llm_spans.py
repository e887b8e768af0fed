"""2024 年 12 月の LLM のスパンを作り、保存されたトレースを読み直す。"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import mlflow
from mlflow.entities import Trace

USAGE = "mlflow.chat.tokenUsage"
MODEL = "mlflow.llm.model"
DECEMBER = int(datetime(2024, 12, 20, tzinfo=timezone.utc).timestamp() * 1e9)


def call(
    model: str | None,
    prompt: int | None,
    output: int = 0,
    parent: Any = None,
    kind: str = "CHAT_MODEL",
    **more: int,
) -> Any:
    """LLM のスパンを開く。``prompt=None`` は使用量の報告なし。"""
    span = mlflow.start_span_no_context("call", kind, parent_span=parent, start_time_ns=DECEMBER)
    if model:
        span.set_attribute(MODEL, model)
    if prompt is not None:
        usage = {"input_tokens": prompt, "output_tokens": output, "total_tokens": prompt + output}
        span.set_attribute(USAGE, {**usage, **more})
    return span


def end(*spans: Any) -> Trace:
    """内側から順に閉じ、保存されたトレースを読み直す。"""
    for span in spans:
        span.end(end_time_ns=DECEMBER + 10**9)
    mlflow.flush_trace_async_logging()
    trace = mlflow.get_trace(spans[-1].trace_id)
    assert trace is not None
    return trace


def total_cost(trace: Trace) -> float | None:
    return (trace.info.cost or {}).get("total_cost")
