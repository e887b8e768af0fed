"""公開されていない名前が、いまの版でまだ同じ意味であること。"""

from __future__ import annotations

import ast
import math
import os
import threading
from collections.abc import Callable
from importlib.metadata import version
from io import StringIO
from typing import Any

import mlflow
import mlflow.tracing
import pytest
from opentelemetry.sdk._logs.export import InMemoryLogRecordExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import ConsoleMetricExporter, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from chapter8_samples.opentelemetry import _internals

VERSIONS = f"mlflow {version('mlflow-tracing')}, opentelemetry-sdk {version('opentelemetry-sdk')}"


def test_the_provider_is_made_at_the_first_span_and_forgotten_without_its_hooks(
    tracking_uri: str,
) -> None:
    def price(span: object) -> None: ...

    mlflow.tracing.configure(span_processors=[price])
    assert _internals.current_provider() is None, VERSIONS
    made = mlflow.tracing.get_bridged_tracer_provider()
    assert _internals.current_provider() is made, VERSIONS
    _internals.forget_provider()
    assert _internals.current_provider() is None, VERSIONS
    assert _internals.span_hooks() == [price], VERSIONS


def test_the_processors_of_a_provider_are_read_with_what_they_wrap(tracking_uri: str) -> None:
    class Around(SpanProcessor):
        def __init__(self, *inner: SpanProcessor) -> None:
            self.inner = list(inner)

    inner = SpanProcessor()
    around, provider = Around(inner), TracerProvider()
    provider.add_span_processor(around)
    assert _internals.processors_of(provider) == (around,), VERSIONS
    assert list(_internals.unwrapped([around])) == [around, inner]
    (mlflows,) = _internals.processors_of(mlflow.tracing.get_bridged_tracer_provider())
    assert _internals.is_mlflows(mlflows) and not _internals.is_mlflows(around), VERSIONS
    assert _internals.wrapped_by(mlflows) == []


def test_tags_and_metadata_of_a_running_trace_are_found(tracking_uri: str) -> None:
    with mlflow.start_span("answer") as span:
        mlflow.update_current_trace(tags={"release": "v1"}, metadata={"mlflow.trace.user": "u"})
        tags, metadata = _internals.tags_and_metadata(span._span)
    assert (tags["release"], metadata["mlflow.trace.user"]) == ("v1", "u"), VERSIONS
    assert _internals.tags_and_metadata(ReadableSpan("no context")) == ({}, {})


def test_a_change_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    class Processor:
        def on_end(self, span: str) -> None:
            seen.append(span)

    monkeypatch.setattr(_internals, "OtelSpanProcessor", Processor)
    plain = Processor.on_end
    undo = _internals.change_before_export(lambda _, span: f"{span}!")  # type: ignore[arg-type, return-value]
    Processor().on_end("end")
    undo()
    assert seen == ["end!"] and Processor.on_end is plain


def test_an_event_is_bound_to_its_span_and_its_time() -> None:
    exporter = InMemoryLogRecordExporter()
    provider = _internals.make_logger_provider(exporter, "judge")
    event = "gen_ai.evaluation.result"
    _internals.emit_event(provider, event, {"a": 1}, 0xABC, 0xDEF, 1_700_000_000_000)
    assert provider.force_flush(), VERSIONS
    (record,) = (one.log_record for one in exporter.get_finished_logs())
    assert (record.event_name, record.trace_id, record.span_id) == (
        "gen_ai.evaluation.result",
        0xABC,
        0xDEF,
    ), VERSIONS
    assert record.timestamp == 1_700_000_000_000_000_000
    provider.shutdown()


def test_a_child_forked_during_an_export_of_metrics_exports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_children: list[Callable[[], None]] = []
    monkeypatch.setattr(
        os, "register_at_fork", lambda *, after_in_child: in_children.append(after_in_child)
    )
    exporter = ConsoleMetricExporter(out=StringIO())
    reader = PeriodicExportingMetricReader(exporter, export_interval_millis=math.inf)
    _internals.renew_export_lock_in_children(reader)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    provider.get_meter("m").create_counter("calls").add(1)
    reader._export_lock.acquire()  # 親のスレッドが送っている
    for renew in in_children:
        renew()
    child = threading.Thread(target=reader.collect, daemon=True)
    child.start()
    child.join(5)
    assert '"calls"' in exporter.out.getvalue(), VERSIONS


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_exporters_of_metrics_and_logs_have_their_names(protocol: str) -> None:
    kinds = {"metrics": "OTLPMetricExporter", "logs": "OTLPLogExporter"}
    found = {signal: _internals.exporter_class(signal, protocol).__name__ for signal in kinds}
    assert found == kinds, VERSIONS


def test_an_ending_span_is_rewritten_before_anyone_receives_it() -> None:
    def louder(content: dict[str, Any]) -> dict[str, Any]:
        changed: dict[str, Any] = ast.literal_eval(repr(content).replace("taro", "[NAME]"))
        return changed

    memory, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    provider.add_span_processor(_internals.EndingSpans(louder))
    for scope in ("fastapi", "mlflow.tracing.fluent"):  # MLflow のスパンには触らない
        with provider.get_tracer(scope).start_as_current_span("GET /taro") as span:
            span.set_attribute("url.query", "q=taro")
            span.add_event("found", {"name": "taro"}, timestamp=7)
            span.set_status(StatusCode.ERROR, "no taro")
    http, own = memory.get_finished_spans()
    assert http.name == "GET /[NAME]", VERSIONS
    assert http.attributes == {"url.query": "q=[NAME]"}, VERSIONS
    assert [(e.name, e.timestamp, dict(e.attributes or {})) for e in http.events] == [
        ("found", 7, {"name": "[NAME]"})
    ], VERSIONS
    assert http.status.description == "no [NAME]", VERSIONS
    assert own.attributes == {"url.query": "q=taro"}
