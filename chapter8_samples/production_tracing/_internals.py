"""8.1 が使う、MLflow と OpenTelemetry の公開 API にない名前(MLflow 3.17.2 で確かめたもの)。"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import atexit
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial, wraps
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import mlflow
import mlflow.tracing
from mlflow.tracing.constant import SpanAttributeKey
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import INVALID_SPAN, Span, set_span_in_context

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan, Trace, TraceInfo
    from mlflow.tracing.client import TracingClient
    from opentelemetry.sdk.trace import SynchronousMultiSpanProcessor
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.sdk.trace.sampling import Sampler
    from opentelemetry.trace import TracerProvider


def current_provider() -> TracerProvider | None:
    """いまのプロバイダー。公開の ``get_bridged_tracer_provider`` は、なければ作ってしまう
    (データベースの作成や接続を待つ)。
    """
    from mlflow.tracing.provider import provider

    return provider.get()


def renew_trace_buffer() -> None:
    """``MLFLOW_TRACE_BUFFER_MAX_SIZE`` はバッファーを作るときに一度しか読まれず、公開 API では
    作り直せない。
    """
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    InMemoryTraceManager.reset()


def use_id_generator(generator: IdGenerator) -> None:
    """作成済みの tracer も ID の生成器を覚えていて、差し替える公開 API がない。"""
    provider = mlflow.tracing.get_bridged_tracer_provider()
    provider.id_generator = generator
    for tracer in provider._tracers.values():
        tracer.id_generator = generator


def reset_but_keep_settings() -> None:
    """``mlflow.tracing.reset()`` が消すもの(マスク処理、``set_destination`` の送り先、ID の
    作り方、無効)を、作り直した後にも引き継ぐ。読み出す公開 API がない。
    """
    from mlflow.tracing.config import get_config
    from mlflow.tracing.provider import _MLFLOW_TRACE_USER_DESTINATION as destination
    from mlflow.tracing.provider import is_tracing_enabled

    processors, location = get_config().span_processors, destination._global_value
    ids = getattr(current_provider(), "id_generator", None)
    enabled = is_tracing_enabled()
    mlflow.tracing.reset()
    mlflow.tracing.configure(span_processors=processors)
    destination._global_value = location
    if not enabled:
        mlflow.tracing.disable()
    elif ids is not None:
        use_id_generator(ids)


def mlflow_trace_id(span: Any) -> str:
    """OpenTelemetry のスパンが属する、MLflow のトレース ID(形は Unity Catalog などで違う)。"""
    trace_id = (span.attributes or {}).get(SpanAttributeKey.REQUEST_ID)
    return json.loads(trace_id) if trace_id else f"tr-{span.context.trace_id:032x}"


EXPORT_REQUESTS = ("start_trace", "log_spans", "_upload_trace_data", "_upload_attachments")


class EndedRoots(SpanProcessor):
    """残すと決まったルートスパンの終わりを知らせる(公開の ``add_span_processor`` で足す)。"""

    def __init__(self) -> None:
        self.tell: Callable[[str], None] | None = None

    def on_end(self, span: ReadableSpan) -> None:
        if self.tell is not None and span.parent is None:
            self.tell(mlflow_trace_id(span))


class _WatchedClient:
    """``TracingClient`` の代わりに置き、送信を 1 回ずつ ``send(名前, 元の関数, *引数)`` に通す。"""

    def __init__(self, client: TracingClient, send: Callable[..., Any]) -> None:
        self._client = client
        self._send = send

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._client, name)
        return partial(self._send, name, value) if name in EXPORT_REQUESTS else value


class ExportHooks:
    """いまのプロバイダーの送信に立ち会う。MLflow は送信の結果を返さず、捨てた数も残さない。

    クラスには触れない。いまの送信処理が持つ相手(インスタンスの属性)だけを、包んだものに替える。
    """

    def __init__(self, ended: Callable[[str], None], send: Callable[..., Any]) -> None:
        self.accept: Callable[[Trace], None] | None = None
        """あれば、完成したトレースを送る代わりにここへ渡す。"""
        self._ended = ended
        self._send = send
        self._undo: list[Callable[[], object]] = []
        self._attached: object = None

    def attach(self) -> list[str]:
        """まだなら、いまのプロバイダーにつなぐ。もう送信を待っていたトレースの ID を返す。

        Raises:
            RuntimeError: MLflow の内部が変わった。
        """
        provider: Any = current_provider()
        if provider is self._attached or not hasattr(provider, "add_span_processor"):
            return []
        self._attached = provider
        try:
            counted = [one for one in mlflow_processors() if self._wrap(one)]
            self._watch_roots(provider)
            return [trace_id for processor in counted for trace_id in _waiting_in(processor)]
        except AttributeError as error:
            raise RuntimeError(f"MLflow {mlflow.__version__} has changed: {error}") from error

    def is_attached(self) -> bool:
        """いまのプロバイダーにつないでいるか。"""
        return current_provider() is self._attached

    def detach(self) -> None:
        """元に戻す。"""
        for step in self._undo:
            step()
        self._undo.clear()
        self._attached = None

    def _watch_roots(self, provider: SdkProvider) -> None:
        pipeline: Any = provider._active_span_processor
        known = [one for one in processors_of(pipeline) if isinstance(one, EndedRoots)]
        watcher = known[0] if known else EndedRoots()
        if not known:
            provider.add_span_processor(watcher)
        watcher.tell = self._ended
        self._undo.append(partial(setattr, watcher, "tell", None))

    def _wrap(self, processor: Any) -> bool:
        """送信処理を包む。MLflow と OTLP の両方に送る設定では、OTLP のほうは数えない。"""
        exporter = processor.span_exporter
        if hasattr(exporter, "_log_trace"):
            self._set(exporter, "_client", _WatchedClient(exporter._client, self._send))
            self._set(exporter, "_log_trace", partial(self._log_trace, exporter._log_trace))
            log_spans = partial(self._log_spans, exporter._export_spans_incrementally)
            self._set(exporter, "_export_spans_incrementally", log_spans)
            return True
        if processor._should_register_traces:
            self._set(exporter, "export", partial(self._send, "export", exporter.export))
        return bool(processor._should_register_traces)

    def _set(self, owner: Any, name: str, value: object) -> None:
        own = vars(owner).get(name)
        setattr(owner, name, value)
        undo = partial(setattr, owner, name, own) if own else partial(delattr, owner, name)
        self._undo.insert(0, undo)

    def _log_trace(self, call: Callable[..., None], trace: Trace, *rest: Any, **named: Any) -> None:
        if self.accept is None:
            call(trace, *rest, **named)
        else:
            self.accept(trace)

    def _log_spans(self, call: Callable[..., None], spans: Sequence[Any]) -> None:
        # 呼び出し元のトレースに加わったスパンは、ここではトレースとして完成しない
        if kept := [span for span in spans if self.accept is None or _joins_a_caller(span)]:
            call(kept)


def is_after_sampling(processor: SpanProcessor) -> bool:
    """残すと決まったスパンだけを受け取るものか(MLflow の送信処理と、それに立ち会うもの)。"""
    ours = isinstance(processor, EndedRoots)
    return ours or type(processor).__module__.startswith("mlflow.")


def mlflow_processors() -> list[Any]:
    """いまのプロバイダーの、MLflow の送信処理。"""
    active: Any = getattr(current_provider(), "_active_span_processor", None)
    processors = processors_of(active) if active is not None else ()
    return [one for one in processors if type(one).__module__.startswith("mlflow.")]


def _batch_of(processor: Any) -> Any:
    """OpenTelemetry のスパンのキューを持つもの。"""
    return getattr(
        getattr(processor, "_batch_delegate", None) or processor, "_batch_processor", None
    )


def _tasks_of(processor: Any) -> Any:
    """MLflow の送信タスクのキュー。"""
    queue: Any = getattr(getattr(processor, "span_exporter", None), "_async_queue", None)
    return None if queue is None else queue._queue


def _waiting_in(processor: Any) -> list[str]:
    """スパンのキュー、背後のスパンの終わりを待つもの、タスクのキューにあるトレース。"""
    batch, tasks = _batch_of(processor), _tasks_of(processor)
    spans = list(batch._queue) if batch is not None else []
    spans += getattr(processor.span_exporter, "_deferred_root_spans", {}).values()
    queued = list(tasks.queue) if tasks is not None else []
    return [
        *(mlflow_trace_id(span) for span in spans if span.parent is None),
        *(task.args[0].info.trace_id for task in queued if "log_trace" in str(task.handler)),
    ]


def export_is_idle() -> bool:
    """MLflow の送信のキューが、どれも空か(数える公開 API がない)。"""
    for processor in mlflow_processors():
        batch, tasks = _batch_of(processor), _tasks_of(processor)
        if batch is not None and (batch._queue or batch._export_lock.locked()):
            return False
        if tasks is not None and tasks.unfinished_tasks:
            return False
    return True


def has_open_spans(trace_id: str) -> bool:
    """置き場に残り、まだ終わらない子がいるか(MLflow は、子が終わるまで送信を待つ)。"""
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        spans = trace.span_dict.values() if trace else ()
        return any(span.end_time_ns is None for span in spans)


def before_threads_are_joined(callback: Callable[[], None]) -> None:
    """終わりのいちばん先で呼ぶ。``atexit`` では、MLflow の送信のスレッドが止められた後になる。

    CPython の非公開の名前で、``concurrent.futures`` も同じ目的で使う。なければ ``atexit`` になる。
    """
    from concurrent.futures import thread

    del thread  # import が自分を登録する。後に登録したものが、先に呼ばれる
    register = getattr(threading, "_register_atexit", atexit.register)
    register(callback)


# ---- いまのスパン、進行中のトレース(propagation, log_context, spans) ----


def current_span() -> Span:
    """いまの OpenTelemetry のスパン。公開の API は、MLflow が知らないスパンを書き換え、
    記録しないスパンを返さない。
    """
    from mlflow.tracing.provider import get_current_otel_span

    return get_current_otel_span() or INVALID_SPAN


def active_trace_id() -> str | None:
    """実行中のトレースの ID。公開の API は、上と同じ理由で使えない。"""
    attributes: Any = getattr(current_span(), "attributes", None) or {}
    trace_id = json.loads(attributes.get(SpanAttributeKey.REQUEST_ID) or "null")
    return trace_id if isinstance(trace_id, str) else None


@contextmanager
def otel_span_is_current(span: Span) -> Iterator[None]:
    """``span`` を、MLflow の「いまのスパン」にする(``INVALID_SPAN`` なら、いまのスパンをなくす)。
    MLflow は OpenTelemetry と別の文脈を使い、切り替える公開 API がない。
    """
    from mlflow.tracing.provider import get_context_api

    api: Any = get_context_api()
    token = api.attach(set_span_in_context(span, api.get_current()))
    try:
        yield
    finally:
        api.detach(token)


@contextmanager
def span_is_current(span: LiveSpan, inside: Span) -> Iterator[None]:
    """``inside``(終わっていれば ``span``)を「いまのスパン」にする。``start_span_no_context`` の
    スパンについては公開 API がない。設定によっては、OpenTelemetry の文脈も切り替わる。
    """
    from mlflow.tracing.provider import detach_span_from_context, set_span_in_context

    # MLflow は、渡したものの _span しか読まない
    current: Any = SimpleNamespace(_span=inside) if inside.is_recording() else span
    token = set_span_in_context(current)
    try:
        yield
    finally:
        with suppress(ValueError):  # 別の文脈で捨てられたタスクの中
            detach_span_from_context(token)


def hand_over_spans() -> None:
    """終わったスパンを、加わったトレースの控えが消える前に送信待ちへ移す。通信は待たない。
    公開の ``force_flush`` は、OTLP の送信まで待つ。
    """
    from mlflow.tracing.provider import _get_span_processor

    if processor := _get_span_processor():
        processor.force_flush()


def open_spans_below(span: LiveSpan) -> list[LiveSpan]:
    """同じトレースで、``span`` の下にある、終わっていないスパン。公開 API では読めない。"""
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as found:
        spans = dict(found.span_dict) if found is not None else {}

    def is_below(one: LiveSpan | None) -> bool:
        while one is not None and one.parent_id != span.span_id:
            one = spans.get(one.parent_id or "")
        return one is not None

    return [one for one in spans.values() if one.end_time_ns is None and is_below(one)]


def is_half_read_stream(span: LiveSpan) -> bool:
    """読みかけの LLM のストリームか(自動トレースは、断片ごとにこの名前のイベントを足す)。"""
    from mlflow.tracing.constant import STREAM_CHUNK_EVENT_NAME_FORMAT

    prefix = STREAM_CHUNK_EVENT_NAME_FORMAT.partition("{")[0]
    return any(event.name.startswith(prefix) for event in span.events)


def scope_metadata() -> dict[str, str]:
    """``mlflow.tracing.context`` のメタデータ。OTLP だけの送信では付かず、読む公開 API もない。"""
    from mlflow.tracing.context import get_configured_trace_metadata

    return get_configured_trace_metadata() or {}


def scope_tags() -> dict[str, str]:
    """``mlflow.tracing.context`` のタグ。読む公開 API がない。"""
    from mlflow.tracing.context import get_configured_trace_tags

    return get_configured_trace_tags() or {}


# ---- テールサンプリング ----


def processors_of(pipeline: SynchronousMultiSpanProcessor) -> tuple[SpanProcessor, ...]:
    """並んでいる processor。MLflow 自身もここから送信処理を探す。公開 API では読めない。"""
    return pipeline._span_processors


def use_pipeline(
    provider: SdkProvider, pipeline: SynchronousMultiSpanProcessor, sampler: Sampler
) -> None:
    """processor を ``pipeline`` に移し、サンプラーも替える。公開の入り口は ``TracerProvider`` の
    引数だけで、それは MLflow が渡す。作成済みの tracer も古いものを覚えている。
    """
    current: Any = provider._active_span_processor
    for processor in processors_of(current):
        pipeline.add_span_processor(processor)
    tracers = provider._tracers
    provider._active_span_processor = pipeline
    provider.sampler = sampler
    for tracer in list(tracers.values()):
        tracer.span_processor = pipeline
        tracer.sampler = sampler


_builders: list[Callable[[], None]] = []


def watch_provider(built: Callable[[], None]) -> Callable[[], None]:
    """MLflow がプロバイダーを作るたびに ``built`` を呼ぶ。戻り値を呼ぶとやめ、最後なら元に戻す。

    ``set_experiment`` や ``reset`` は黙って作り直し、公開の手段では知れない(``configure`` に渡した
    関数は ``reset`` で消え、古いプロバイダーには新しいものが知らされない)。
    """
    from mlflow.tracing import provider as module

    original: Any = module._initialize_tracer_provider

    @wraps(original)
    def build(disabled: bool = False) -> None:
        original(disabled=disabled)
        for one in list(_builders):
            one()

    def stop() -> None:
        _builders.remove(built)
        if not _builders:
            ours: Any = module._initialize_tracer_provider
            module._initialize_tracer_provider = ours.__wrapped__

    if not _builders:
        module._initialize_tracer_provider = build
    _builders.append(built)
    return stop


def head_ratio(sampler: Sampler) -> float | None:
    """先頭で残す割合(``MLFLOW_TRACE_SAMPLING_RATIO`` など)。公開 API では読めない。"""
    from mlflow.tracing.sampling import _MlflowSampler
    from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

    root: object = getattr(sampler, "_root", sampler)
    if isinstance(root, _MlflowSampler):
        return root._default_ratio
    return root.rate if isinstance(root, TraceIdRatioBased) else None


def sampling_ratio_override() -> float | None:
    """``@mlflow.trace(sampling_ratio_override=...)`` の値。公開 API では読めない。"""
    from mlflow.tracing.sampling import _SAMPLING_RATIO_OVERRIDE

    return _SAMPLING_RATIO_OVERRIDE.get()


@contextmanager
def live_trace(otel_trace_id: int) -> Iterator[TraceInfo]:
    """``open_trace_info`` と同じ。ID の形は保存先(Unity Catalog など)で違うので、対応表から引く。

    ``MLFLOW_TRACE_TIMEOUT_SECONDS`` を過ぎて消えていれば、空のもの。
    """
    from mlflow.entities import TraceInfo, TraceLocation, TraceState
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    manager = InMemoryTraceManager.get_instance()
    trace_id = manager.get_mlflow_trace_id_from_otel_id(otel_trace_id) or f"tr-{otel_trace_id:032x}"
    with open_trace_info(trace_id) as info:
        nowhere = TraceLocation.from_experiment_id("0")
        yield info or TraceInfo(trace_id, nowhere, 0, TraceState.OK)


def forget_trace(otel_trace_id: int) -> None:
    """組み立て中のトレースを、送らずにメモリーから消す。公開 API がない。"""
    from mlflow.tracing.trace_manager import InMemoryTraceManager

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


@contextmanager
def open_trace_info(trace_id: str) -> Iterator[TraceInfo | None]:
    """組み立て中のトレースのタグ・メタデータ・プレビュー・評価。まとめて扱う公開 API がない。"""
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        yield trace.info if trace else None


def tracing_client() -> TracingClient:
    """ID を保ったままトレースを書く公開 API がない(``mlflow.log_trace`` は新しい ID にする)。"""
    from mlflow.tracing.client import TracingClient

    return TracingClient()


def _joins_a_caller(span: Any) -> bool:
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    with InMemoryTraceManager.get_instance().get_trace(mlflow_trace_id(span)) as trace:
        return trace is not None and trace.is_remote_trace


def raw_attributes(span: LiveSpan) -> dict[str, Any]:
    """JSON のままの属性。公開の ``attributes`` は、毎回すべてを読み直す。"""
    return dict(span._span.attributes or {})
