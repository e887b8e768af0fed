"""MLflow 3.17 と OpenTelemetry 1.45 の、公開されていない名前に触るところ。

プロバイダーに付いたプロセッサーの一覧を読む公開 API も、OTLP に渡すスパンを変える公開 API もなく、
ログの API の名前には _ が付いている。
版が上がって変わったときに直すのは、このファイルだけになる。
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlflow.tracing.config import get_config
from mlflow.tracing.processor.otel import OtelSpanProcessor
from mlflow.tracing.provider import provider
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry import trace
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor


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
    manager, context = InMemoryTraceManager.get_instance(), span.get_span_context()
    trace_id = manager.get_mlflow_trace_id_from_otel_id(context.trace_id) if context else None
    if trace_id is None:
        return {}, {}
    with manager.get_trace(trace_id) as trace:
        return (dict(trace.info.tags), dict(trace.info.trace_metadata)) if trace else ({}, {})


def change_before_export(
    name: str, change: Callable[[OtelSpanProcessor, ReadableSpan], ReadableSpan]
) -> bool:
    """OTLP に渡すスパンを ``change`` の返すものに替える。

    MLflow がプロバイダーを作り直しても残るように、プロセッサーの型のほうを替える。同じ ``name`` は
    1 回だけで、替えたら True を返す。
    """
    original: Callable[..., None] = OtelSpanProcessor.on_end
    if hasattr(original, name):
        return False

    @functools.wraps(original)
    def on_end(self: OtelSpanProcessor, span: ReadableSpan) -> None:
        original(self, change(self, span))

    vars(on_end)[name] = True
    OtelSpanProcessor.on_end = on_end  # pyright: ignore[reportAttributeAccessIssue]
    return True


def exporter_class(signal: str, protocol: str) -> Any:
    """メトリクスとログのエクスポーターの型。使う方式のパッケージだけを読み込む。"""
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import _log_exporter as grpc_logs
        from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc_metrics

        return grpc_logs.OTLPLogExporter if signal == "logs" else grpc_metrics.OTLPMetricExporter
    from opentelemetry.exporter.otlp.proto.http import _log_exporter as http_logs
    from opentelemetry.exporter.otlp.proto.http import metric_exporter as http_metrics

    return http_logs.OTLPLogExporter if signal == "logs" else http_metrics.OTLPMetricExporter


@dataclass(frozen=True)
class EventLogger:
    """スパンに結び付いたイベントを送る口(OpenTelemetry のログの API は、名前に _ が付いている)。"""

    provider: LoggerProvider

    def emit(
        self,
        name: str,
        attributes: Mapping[str, Any],
        trace_id: int,
        span_id: int,
        created_ms: int | None,
    ) -> None:
        """``trace_id`` と ``span_id`` のスパンに結び付けて送る。"""
        flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
        owner = trace.SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)
        self.provider.get_logger("chapter8.genai").emit(
            event_name=name,
            attributes=dict(attributes),
            timestamp=created_ms and created_ms * 1_000_000,
            context=trace.set_span_in_context(trace.NonRecordingSpan(owner)),
        )


def make_event_logger(exporter: Any, service_name: str) -> EventLogger:
    """``exporter`` へ送る口を作る。"""
    provider = LoggerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_log_record_processor(BatchLogRecordProcessor(exporter))
    return EventLogger(provider)
