"""MLflow 3.17 と OpenTelemetry 1.45 の、公開されていない名前に触るところ。

プロバイダーに付いたプロセッサーの一覧を読む公開 API も、OTLP に渡すスパンを変える公開 API もなく、
ログの API の名前には _ が付いている。
版が上がって変わったときに直すのは、このファイルだけになる。
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import Lock
from typing import Any

from mlflow.tracing.config import get_config
from mlflow.tracing.processor.otel import OtelSpanProcessor
from mlflow.tracing.provider import provider
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry import trace
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, Span, SpanProcessor


def current_provider() -> Any:
    """MLflow がいま使うプロバイダー。まだ作られていなければ None。"""
    return provider.get()


def forget_provider() -> None:
    """プロバイダーを捨てる。次のスパンで作り直される。

    ``mlflow.tracing.reset()`` と違い、span_processors と送信先は消えない。
    """
    provider.reset()


def processors_of(tracer_provider: Any) -> tuple[SpanProcessor, ...]:
    """プロバイダーに付いたプロセッサー。"""
    active = getattr(tracer_provider, "_active_span_processor", None)
    return tuple(getattr(active, "_span_processors", ()))


def is_mlflows(processor: SpanProcessor) -> bool:
    """MLflow が付けたプロセッサーか。"""
    return type(processor).__module__.startswith("mlflow.")


def wrapped_by(processor: SpanProcessor) -> list[SpanProcessor]:
    """テールサンプリングなどが包んでいるプロセッサー。MLflow のものの中は見ない。"""
    if is_mlflows(processor):
        return []
    values: list[Any] = list(vars(processor).values())
    nested: list[Any] = [value for value in values if isinstance(value, (list, tuple))]
    values += [item for items in nested for item in items]
    return [value for value in values if isinstance(value, SpanProcessor)]


def unwrapped(processors: Iterable[SpanProcessor]) -> Iterator[SpanProcessor]:
    """プロセッサーと、その中に包まれたプロセッサー。"""
    for processor in processors:
        yield processor
        yield from unwrapped(wrapped_by(processor))


def span_hooks() -> list[Any]:
    """``mlflow.tracing.configure(span_processors=...)`` に渡されている関数。"""
    return list(get_config().span_processors)


def tags_and_metadata(span: ReadableSpan) -> tuple[dict[str, str], dict[str, str]]:
    """スパンの属する、まだ終わっていないトレースのタグとメタデータ。"""
    manager = InMemoryTraceManager.get_instance()
    context = span.get_span_context()
    trace_id = manager.get_mlflow_trace_id_from_otel_id(context.trace_id) if context else None
    if trace_id is not None:
        with manager.get_trace(trace_id) as trace:
            if trace is not None:
                return dict(trace.info.tags), dict(trace.info.trace_metadata)
    return {}, {}


def change_before_export(
    change: Callable[[OtelSpanProcessor, ReadableSpan], ReadableSpan],
) -> Callable[[], None]:
    """OTLP に渡すスパンを ``change`` の返すものに替える。戻り値を呼ぶと、元に戻す。

    MLflow がプロバイダーを作り直しても残るように、プロセッサーの型のほうを替える。
    """
    original: Callable[..., None] = OtelSpanProcessor.on_end

    def on_end(self: OtelSpanProcessor, span: ReadableSpan) -> None:
        original(self, change(self, span))

    OtelSpanProcessor.on_end = on_end  # pyright: ignore[reportAttributeAccessIssue]
    return lambda: setattr(OtelSpanProcessor, "on_end", original)


# ---- 共通のプロバイダー(web) ----


class EndingSpans(SpanProcessor):
    """終わったスパンを、MLflow と OTLP に渡る前に書き換える(on_end では、もう変えられない)。"""

    def __init__(self, rewrite: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.rewrite = rewrite

    def _on_ending(self, span: Span) -> None:
        scope = span.instrumentation_scope
        if scope and scope.name.startswith("mlflow."):  # MLflow のスパンには、自分の仕組みがある
            return
        status = span.status
        content: dict[str, Any] = {
            "attributes": dict(span.attributes or {}),
            "events": [dict(event.attributes or {}) for event in span.events],
            "name": span.name,
            "status": status.description,
        }
        new = self.rewrite(content)
        span._attributes = BoundedAttributes(attributes=new["attributes"])
        events = zip(span.events, new["events"], strict=True)
        changed: Any = [Event(e.name, given, e.timestamp) for e, given in events]
        span._events = changed
        span._name = new["name"]
        span._status = trace.Status(status.status_code, new["status"])


# ---- メトリクスとログ(genai) ----


def exporter_class(signal: str, protocol: str) -> Any:
    """メトリクスとログのエクスポーターの型。使う方式のパッケージだけを読み込む。"""
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import _log_exporter as grpc_logs
        from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc_metrics

        return grpc_logs.OTLPLogExporter if signal == "logs" else grpc_metrics.OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http import _log_exporter as http_logs
    from opentelemetry.exporter.otlp.proto.http import metric_exporter as http_metrics

    return http_logs.OTLPLogExporter if signal == "logs" else http_metrics.OTLPMetricExporter


def renew_export_lock_in_children(reader: Any) -> None:
    """送信の途中で fork した子では、掛かったままになるロック(SDK は、作り直さない)。"""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: setattr(reader, "_export_lock", Lock()))


def make_logger_provider(exporter: Any, service_name: str) -> LoggerProvider:
    """``exporter`` へログを送るプロバイダー。"""
    provider = LoggerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_log_record_processor(BatchLogRecordProcessor(exporter))
    return provider


def emit_event(
    provider: LoggerProvider,
    name: str,
    attributes: Mapping[str, Any],
    trace_id: int,
    span_id: int,
    created_ms: int | None,
) -> None:
    """``trace_id`` と ``span_id`` のスパンに結び付いたイベント(ログレコード)を送る。"""
    flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
    owner = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)
    provider.get_logger("chapter8.genai").emit(
        event_name=name,
        attributes=dict(attributes),
        timestamp=created_ms and created_ms * 1_000_000,
        context=trace.set_span_in_context(trace.NonRecordingSpan(owner)),
    )
