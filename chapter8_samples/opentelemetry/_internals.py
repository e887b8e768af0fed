"""MLflow 3.17 と OpenTelemetry 1.45 の、公開されていない名前に触るところ。

プロバイダーに付いたプロセッサーの一覧を読む公開 API も、OTLP に渡すスパンを変える公開 API もなく、
ログの API の名前には _ が付いている。
版が上がって変わったときに直すのは、このファイルだけになる。
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlflow.tracing
from mlflow.environment_variables import MLFLOW_USE_DEFAULT_TRACER_PROVIDER
from mlflow.tracing.config import get_config
from mlflow.tracing.processor.otel import OtelSpanProcessor
from mlflow.tracing.provider import provider
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry import trace
from opentelemetry.attributes import BoundedAttributes
from opentelemetry.context import Context
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, Span, SpanProcessor, TracerProvider


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


# ---- 共通のプロバイダー(web) ----


def survive_rebuilds() -> None:
    """MLflow が作り直すときも、共通のプロバイダーに足されたプロセッサーを移す。

    ``set_experiment`` などは、グローバルのプロバイダーを黙って None にし、後で新しく作る。その間の
    代わりを置き、古いプロバイダーから取ってあった tracer のスパンも、新しいほうへ渡す。
    """
    if "reset" in vars(provider):
        return
    reset, set_ = provider.reset, provider.set
    added: tuple[SpanProcessor, ...] = ()

    def leave(old: Any) -> None:
        nonlocal added
        if isinstance(old, TracerProvider):
            own = [p for p in processors_of(old) if not any(map(is_mlflows, unwrapped([p])))]
            added = tuple(own)
            old._active_span_processor._span_processors = (_ToCurrent(),)

    def carried_reset() -> None:
        old = current_provider()
        reset()
        if not MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get():
            leave(old)
            trace._TRACER_PROVIDER = _Starter()

    def carried_set(new: Any) -> None:
        old = current_provider()
        set_(new)
        if not MLFLOW_USE_DEFAULT_TRACER_PROVIDER.get():
            leave(old)
            for processor in added if isinstance(new, TracerProvider) else ():
                new.add_span_processor(processor)

    vars(provider).update(reset=carried_reset, set=carried_set)


class _Starter(trace.TracerProvider):
    """作り直されるまでの代わり。使われたら MLflow に作らせる。"""

    def get_tracer(self, *names: Any, **options: Any) -> trace.Tracer:
        mlflow.tracing.get_bridged_tracer_provider()
        return current_provider().get_tracer(*names, **options)


class _ToCurrent(SpanProcessor):
    """いまのプロバイダーのプロセッサーへ渡す。"""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        mlflow.tracing.get_bridged_tracer_provider()
        for processor in processors_of(current_provider()):
            processor.on_start(span, parent_context)

    def _on_ending(self, span: Span) -> None:
        for processor in processors_of(current_provider()):
            processor._on_ending(span)

    def on_end(self, span: ReadableSpan) -> None:
        for processor in processors_of(current_provider()):
            processor.on_end(span)


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
        span._name, span._status = new["name"], trace.Status(status.status_code, new["status"])


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
