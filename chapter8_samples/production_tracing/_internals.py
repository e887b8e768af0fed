"""8.1 が使う、MLflow と OpenTelemetry の公開 API にない名前(MLflow 3.17.2 で確かめたもの)。"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import mlflow.tracing
from mlflow.entities import LiveSpan, Trace, TraceInfo
from mlflow.store.tracking.rest_store import RestStore
from mlflow.tracing import provider as mlflow_provider
from mlflow.tracing import sampling as mlflow_sampling
from mlflow.tracing.client import TracingClient as TracingClient  # 公開の log_trace は ID を変える
from mlflow.tracing.constant import STREAM_CHUNK_EVENT_NAME_FORMAT, SpanAttributeKey
from mlflow.tracing.context import get_configured_trace_metadata, get_configured_trace_tags
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import Sampler, TraceIdRatioBased
from opentelemetry.trace import INVALID_SPAN, Span, set_span_in_context

# ---- プロバイダー ----


def current_provider() -> Any:
    """いまのプロバイダー(なければ ``None``)。公開の関数は、なければ接続して作ってしまう。"""
    return mlflow_provider.provider.get()


def use_id_generator(generator: Any) -> None:
    """作成済みの tracer も ID の生成器を覚えていて、差し替える公開 API がない。"""
    provider = mlflow.tracing.get_bridged_tracer_provider()
    provider.id_generator = generator
    for tracer in provider._tracers.values():
        tracer.id_generator = generator


def renew_provider() -> None:
    """fork した子で、プロバイダーを作り直す。公開の ``reset()`` は、マスク処理や送り先も消す。"""
    old = current_provider()
    if isinstance(old, TracerProvider):
        for processor in mlflow_processors():  # 親のスレッドが送る分を、子で待たない
            if tasks := getattr(processor.span_exporter, "_async_queue", None):
                tasks._is_active = False
                tasks._flush_lock = threading.Lock()
                tasks._lock = threading.RLock()
        InMemoryTraceManager.get_instance()._lock = threading.RLock()
        mlflow_provider.provider.reset()
        use_id_generator(old.id_generator)


def renew_trace_buffer() -> None:
    """``MLFLOW_TRACE_BUFFER_MAX_SIZE`` は、置き場を作るときに一度しか読まれない。"""
    InMemoryTraceManager.reset()


_builders: list[Callable[[], None]] = []


def watch_provider(built: Callable[[], None]) -> Callable[[], None]:
    """MLflow がプロバイダーを作るたびに ``built`` を呼ぶ。戻り値を呼ぶとやめ、最後なら元に戻す。
    ``set_experiment`` や ``reset`` は黙って作り直し、公開の手段では知れない。
    """
    original: Any = mlflow_provider._initialize_tracer_provider

    @wraps(original)
    def build(disabled: bool = False) -> None:
        original(disabled=disabled)
        for one in list(_builders):
            one()

    def stop() -> None:
        _builders.remove(built)
        if not _builders:
            ours: Any = mlflow_provider._initialize_tracer_provider
            mlflow_provider._initialize_tracer_provider = ours.__wrapped__

    if not _builders:
        mlflow_provider._initialize_tracer_provider = build
    _builders.append(built)
    return stop


# ---- 送信(delivery) ----

EXPORT_REQUESTS = ("start_trace", "log_spans", "_upload_trace_data", "_upload_attachments")


def current_pipeline() -> Any:
    """いまのプロバイダーの、スパンの行き先(なければ ``None``)。公開 API では読めない。"""
    return getattr(current_provider(), "_active_span_processor", None)


def pipeline_of(span: LiveSpan) -> Any:
    """スパンの行き先。いまのプロバイダーを尋ねるより、ずっと速い。"""
    return getattr(span._span, "_span_processor", None)


def processors_of(pipeline: Any) -> tuple[SpanProcessor, ...]:
    """並んでいる processor。MLflow 自身もここから送信処理を探す。公開 API では読めない。"""
    return pipeline._span_processors


def is_mlflows(processor: SpanProcessor) -> bool:
    """MLflow の送信処理か。"""
    return type(processor).__module__.startswith("mlflow.")


def mlflow_processors() -> list[Any]:
    """いまのプロバイダーの、MLflow の送信処理。"""
    pipeline = current_pipeline()
    return [one for one in processors_of(pipeline) if is_mlflows(one)] if pipeline else []


def watch_export(processor: Any, ledger: Any, clean: Callable[[Any], Any]) -> None:
    """送信処理の属性を、まだなら包み、トレースの終わりと送信の 1 回ずつを帳簿に知らせる(MLflow は
    捨てた数を残さない)。OTLP にも送る設定では、OTLP の側は数えず、``clean`` で直すだけにする。
    """
    exporter = processor.span_exporter
    if "on_end" in vars(processor):
        return
    if hasattr(exporter, "_log_trace"):
        _watch_mlflow_exporter(exporter, ledger)
    elif getattr(processor, "_should_register_traces", False):
        exporter.export = partial(ledger.send, "export", exporter.export)
    else:
        if "export" not in vars(exporter):
            send = exporter.export
            exporter.export = lambda spans: send(clean(spans))
        return

    def on_end(span: ReadableSpan) -> None:
        if span.parent is None:
            ledger.ended(mlflow_trace_id(span))
        type(processor).on_end(processor, span)

    processor.on_end = on_end


def log_spans(send: Callable[..., Any], location: str, spans: Sequence[Any]) -> Any:
    """``send(location, spans)``。最初に版を聞けなかったサーバーには、MLflow は二度と送らない。"""
    try:
        return send(location, spans)
    except NotImplementedError as error:
        if "could not identify" not in str(error):
            raise
        RestStore._get_server_version.cache_clear()
        raise ConnectionError(str(error)) from error


def _watch_mlflow_exporter(exporter: Any, ledger: Any) -> None:
    client = exporter._client
    client.log_spans = partial(log_spans, client.log_spans)
    for name in EXPORT_REQUESTS:
        setattr(client, name, partial(ledger.send, name, getattr(client, name)))
    send_trace = exporter._log_trace
    send_spans = exporter._export_spans_incrementally

    def log_trace(trace: Trace, *rest: Any, **named: Any) -> None:
        if ledger.spool is None:
            send_trace(trace, *rest, **named)
        else:
            ledger.spool.accept(trace)

    def log_finished(spans: Sequence[ReadableSpan]) -> None:
        # 呼び出し元のトレースに加わったスパンは、ここではトレースとして完成しない
        if kept := [one for one in spans if ledger.spool is None or _joins_a_caller(one)]:
            send_spans(kept)

    exporter._log_trace = log_trace
    exporter._export_spans_incrementally = log_finished


def _joins_a_caller(span: ReadableSpan) -> bool:
    with _open_trace(mlflow_trace_id(span)) as trace:
        return trace is not None and trace.is_remote_trace


def mlflow_trace_id(span: Any) -> str:
    """OpenTelemetry のスパンが属する、MLflow のトレース ID(形は Unity Catalog などで違う)。"""
    trace_id: str | None = (span.attributes or {}).get(SpanAttributeKey.REQUEST_ID)
    return trace_id.strip('"') if trace_id else f"tr-{span.context.trace_id:032x}"


def copy_resource(source: Any, target: Any) -> None:
    """MLflow のスパンの、サービス名など。公開の ``from_dict`` では空になり、タグに残らない。"""
    target._span._resource = source._span.resource


def export_is_idle() -> bool:
    """MLflow の送信のキューが、どれも空か(数える公開 API がない)。"""
    for processor in mlflow_processors():
        owner = getattr(processor, "_batch_delegate", None) or processor
        batch = getattr(owner, "_batch_processor", None)
        if batch is not None and (batch._queue or batch._export_lock.locked()):
            return False
        tasks = getattr(processor.span_exporter, "_async_queue", None)
        if tasks is not None and tasks._queue.unfinished_tasks:
            return False
    return True


def before_threads_are_joined(callback: Callable[[], None]) -> None:
    """終わりのいちばん先で呼ぶ(``atexit`` では、MLflow の送信のスレッドが止められた後になる)。"""
    register = getattr(threading, "_register_atexit", atexit.register)
    register(callback)


# ---- いまのスパン、進行中のトレース(propagation, log_context, spans) ----


def current_span() -> Span:
    """いまのスパン。公開の API は、MLflow の知らないスパンを書き換え、記録しないものを返さない。"""
    return mlflow_provider.get_current_otel_span() or INVALID_SPAN


def active_trace_id() -> str | None:
    """実行中のトレースの ID。公開の API は、上と同じ理由で使えない。"""
    attributes: Any = getattr(current_span(), "attributes", None) or {}
    trace_id: str | None = attributes.get(SpanAttributeKey.REQUEST_ID)
    return trace_id and trace_id.strip('"')


@contextmanager
def otel_span_is_current(span: Span) -> Iterator[None]:
    """``span`` を「いまのスパン」にする(``INVALID_SPAN`` なら、なくす)。公開 API がない。"""
    api: Any = mlflow_provider.get_context_api()
    token = api.attach(set_span_in_context(span, api.get_current()))
    try:
        yield
    finally:
        api.detach(token)


@contextmanager
def span_is_current(span: LiveSpan, inside: Span) -> Iterator[None]:
    """``inside``(終わっていれば ``span``)を「いまのスパン」にする。公開 API がない。"""
    # MLflow は、渡したものの _span しか読まない
    current: Any = SimpleNamespace(_span=inside) if inside.is_recording() else span
    token = mlflow_provider.set_span_in_context(current)
    try:
        yield
    finally:
        with suppress(ValueError):  # 別の文脈で捨てられたタスクの中
            mlflow_provider.detach_span_from_context(token)


def hand_over_spans() -> None:
    """終わったスパンを送信待ちへ移す。公開の ``force_flush`` は、OTLP の送信まで待つ。"""
    if processor := mlflow_provider._get_span_processor():
        processor.force_flush()


@contextmanager
def _open_trace(trace_id: str) -> Iterator[Any]:
    """MLflow が組み立てている途中のトレース(なければ ``None``)。読む公開 API がない。"""
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        yield trace


@contextmanager
def open_trace_info(trace_id: str) -> Iterator[TraceInfo | None]:
    """組み立て中のトレースのタグ・メタデータ・プレビュー・評価(期限が切れたものは ``None``)。"""
    with _open_trace(trace_id) as trace:
        yield trace.info if trace else None


def has_open_spans(trace_id: str) -> bool:
    """まだ終わらない子がいるか(MLflow は、子が終わるまで送信を待つ)。"""
    with _open_trace(trace_id) as trace:
        return bool(trace) and any(one.end_time_ns is None for one in trace.span_dict.values())


def _spans_of(trace_id: str) -> dict[str, LiveSpan]:
    with _open_trace(trace_id) as trace:
        return dict(trace.span_dict) if trace else {}


def _parents(span: LiveSpan | None, spans: dict[str, LiveSpan]) -> Iterator[str]:
    while span is not None and span.parent_id is not None:
        yield span.parent_id
        span = spans.get(span.parent_id)


def span_ids_above(span: LiveSpan) -> list[str]:
    """同じトレースの、``span`` の親、その親、…。"""
    return list(_parents(span, _spans_of(span.trace_id)))


def open_spans_below(span: LiveSpan) -> list[LiveSpan]:
    """同じトレースで、``span`` の下にある、終わっていないスパン。"""
    spans = _spans_of(span.trace_id)
    still_open = [one for one in spans.values() if one.end_time_ns is None]
    return [one for one in still_open if span.span_id in _parents(one, spans)]


def is_half_read_stream(span: LiveSpan) -> bool:
    """読みかけの LLM のストリームか(自動トレースは、断片ごとにこの名前のイベントを足す)。"""
    prefix = STREAM_CHUNK_EVENT_NAME_FORMAT.partition("{")[0]
    return any(event.name.startswith(prefix) for event in span.events)


def scope_metadata() -> dict[str, str]:
    """``mlflow.tracing.context`` のメタデータ。OTLP だけの送信では付かず、読む公開 API もない。"""
    return get_configured_trace_metadata() or {}


def scope_tags() -> dict[str, str]:
    """同じもののタグ。"""
    return get_configured_trace_tags() or {}


# ---- テールサンプリング ----


def use_pipeline(provider: Any, pipeline: Any, sampler: Sampler) -> None:
    """processor とサンプラーを替える。公開の入り口は、MLflow が渡す引数しかない。"""
    for processor in processors_of(provider._active_span_processor):
        pipeline.add_span_processor(processor)
    provider._active_span_processor = pipeline
    provider.sampler = sampler
    for tracer in list(provider._tracers.values()):
        tracer.span_processor = pipeline
        tracer.sampler = sampler


def head_ratio(sampler: Sampler) -> float | None:
    """先頭で残す割合(``MLFLOW_TRACE_SAMPLING_RATIO`` など)。公開 API では読めない。"""
    root: object = getattr(sampler, "_root", sampler)
    if isinstance(root, mlflow_sampling._MlflowSampler):
        return root._default_ratio
    return root.rate if isinstance(root, TraceIdRatioBased) else None


def sampling_ratio_override() -> float | None:
    """``@mlflow.trace(sampling_ratio_override=...)`` の値。公開 API では読めない。"""
    return mlflow_sampling._SAMPLING_RATIO_OVERRIDE.get()


def forget_trace(otel_trace_id: int) -> None:
    """組み立て中のトレースを、送らずにメモリーから消す。公開 API がない。"""
    InMemoryTraceManager.get_instance().pop_trace(otel_trace_id)


# ---- マスキング ----


def rewrite_events(span: LiveSpan, change: Callable[[list[Any]], list[dict[str, Any]]]) -> None:
    """イベントの属性を置き換える(名前・時刻・件数は残す)。公開 API は足すことしかできない。"""
    inner: Any = span._span
    events: list[Any] = list(inner._events)
    for event, attributes in zip(events, change(events), strict=True):
        event._attributes = attributes


def rewrite_status(span: LiveSpan, change: Callable[[str], str]) -> None:
    """状態の説明(例外の文面)を置き換える。公開の ``set_status`` は、エラーのときしか変えない。"""
    status: Any = span._span.status
    if status.description:
        status._description = change(status.description)
