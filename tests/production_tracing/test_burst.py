"""burst の設定: バーストで 1 件も失わない。

実際の SQLite とサーバーに 2,000 件を書くのは ``python tests/benchmarks/tracing_burst.py``。
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import threading
from typing import Any

import mlflow
import pytest

from chapter8_samples.production_tracing import (
    flush_traces,
    reset_production_tracing,
    setup_production_tracing,
)

pytestmark = pytest.mark.slow


@mlflow.trace
def answer(number: int) -> int:
    return number


def test_2000_traces_pass_every_queue_of_a_store_that_stands_still(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """書き込みが 1 件も進まない間の 2,000 件を、4 つの上限のどれも捨てない。"""
    from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter as Exporter

    gate = threading.Event()
    traces, spans = set[str](), set[str]()

    def log_trace(_exporter: Any, trace: Any, *_args: Any, **_options: Any) -> None:
        assert gate.wait(120)
        traces.add(trace.info.trace_id)

    def log_spans(_exporter: Any, _experiment: str, items: Any, *_args: Any, **_o: Any) -> None:
        assert gate.wait(120)
        spans.update(span.trace_id for span in items)

    monkeypatch.setattr(Exporter, "_log_trace", log_trace)
    monkeypatch.setattr(Exporter, "_log_spans", log_spans)

    def burst(profile: Any) -> tuple[int, int]:
        setup_production_tracing("burst", export_profile=profile)
        gate.clear()
        for number in range(2000):
            answer(number)
        gate.set()
        flush_traces(120)
        counts = len(traces), len(spans)
        traces.clear()
        spans.clear()
        reset_production_tracing()
        return counts

    assert burst("burst") == (2000, 2000)
    assert burst("default")[0] < 1500  # MLflow の既定値のままなら失う


@pytest.mark.parametrize("backend", ["sqlite", "server"])
def test_burst_reaches_the_real_store(
    tracking_uri: str, stored: Any, request: pytest.FixtureRequest, backend: str
) -> None:
    uri = tracking_uri if backend == "sqlite" else request.getfixturevalue("mlflow_server_url")
    name = f"burst-{backend}"
    assert setup_production_tracing(name, tracking_uri=uri).ready
    for number in range(300):
        answer(number)
    assert flush_traces(120).ok
    found = stored(name, include_spans=False, max_results=301)
    assert len({trace.info.trace_id for trace in found}) == 300
    assert {str(trace.info.state) for trace in found} == {"OK"}
