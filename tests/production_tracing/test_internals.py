"""8.1 が使う非公開の名前の契約。MLflow か OpenTelemetry が動かしたら、その名前を出して落ちる。"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import mlflow.tracing
import pytest
from mlflow.entities import SpanEvent
from mlflow.tracing import provider as mlflow_provider
from opentelemetry.sdk.trace import ReadableSpan, SynchronousMultiSpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, DEFAULT_ON, ParentBased, TraceIdRatioBased
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, SpanContext, get_current_span

from chapter8_samples.production_tracing import _internals

# ---- テールサンプリング ----


def test_active_span_processor_and_its_span_processors(tracking_uri: str) -> None:
    """MLflow の送信処理は、``_active_span_processor._span_processors`` にある。"""
    provider: Any = mlflow.tracing.get_bridged_tracer_provider()
    processors = _internals.processors_of(provider._active_span_processor)
    assert type(provider._active_span_processor) is SynchronousMultiSpanProcessor
    assert [type(one).__module__.split(".")[0] for one in processors] == ["mlflow"]


def test_tracers_and_their_span_processor_and_sampler() -> None:
    """作成済みの tracer は ``_tracers`` にあり、``span_processor`` と ``sampler`` を使う。"""
    provider, seen = TracerProvider(), list[ReadableSpan]()
    tracer = provider.get_tracer("made before")

    class Pipeline(SynchronousMultiSpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            seen.append(span)

    _internals.use_pipeline(provider, Pipeline(), DEFAULT_ON)
    tracer.start_span("seen").end()
    _internals.use_pipeline(provider, Pipeline(), ALWAYS_OFF)
    tracer.start_span("dropped").end()
    assert [span.name for span in seen] == ["seen"]


def test_initialize_tracer_provider_runs_for_every_new_provider(tracking_uri: str) -> None:
    """``_initialize_tracer_provider(disabled=False)`` を、MLflow は作り直すたびに呼ぶ。"""
    original = mlflow_provider._initialize_tracer_provider
    assert list(inspect.signature(original).parameters) == ["disabled"]
    built: list[object] = []
    stop = _internals.watch_provider(lambda: built.append(_internals.current_provider()))
    try:
        mlflow.set_experiment("new provider")
        mlflow.tracing.get_bridged_tracer_provider()
        mlflow.tracing.disable()
        mlflow.tracing.enable()
        mlflow.tracing.reset()
        mlflow.tracing.get_bridged_tracer_provider()
    finally:
        stop()
    made = [one for one in built if isinstance(one, TracerProvider)]
    assert len(set(made)) == 3 and made[-1] is _internals.current_provider()
    assert mlflow_provider._initialize_tracer_provider is original


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_root_and_default_ratio_of_a_sampler(ratio: float) -> None:
    """``ParentBased._root`` と ``_MlflowSampler._default_ratio``。"""
    from mlflow.tracing.sampling import _MlflowSampler

    assert _internals.head_ratio(ParentBased(_MlflowSampler(ratio))) == ratio
    assert _internals.head_ratio(ParentBased(TraceIdRatioBased(ratio))) == ratio
    assert _internals.head_ratio(TraceIdRatioBased(ratio)) == ratio
    assert _internals.head_ratio(DEFAULT_ON) is None


def test_sampling_ratio_override_is_set_while_a_span_starts(tracking_uri: str) -> None:
    """``_SAMPLING_RATIO_OVERRIDE`` は、スパンを始める間だけ値を持つ。"""
    seen: list[float | None] = []

    class Watch(SynchronousMultiSpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            seen.append(_internals.sampling_ratio_override())

    provider: Any = mlflow.tracing.get_bridged_tracer_provider()
    provider.add_span_processor(Watch())
    mlflow.trace(sampling_ratio_override=1.0)(lambda: None)()
    mlflow.trace(lambda: None)()
    assert seen == [1.0, None] and _internals.sampling_ratio_override() is None


def test_in_memory_trace_manager_finds_and_forgets_a_trace(tracking_uri: str) -> None:
    """``get_trace`` と ``pop_trace``。"""
    root = mlflow.start_span_no_context("root")
    span: Any = root._span
    with _internals.open_trace_info(root.trace_id) as info:
        assert info is not None and info.trace_id == root.trace_id
        info.trace_metadata["key"] = "value"
    with _internals.open_trace_info(root.trace_id) as info:
        assert info is not None and info.trace_metadata["key"] == "value"
    _internals.forget_trace(span.context.trace_id)
    with _internals.open_trace_info(root.trace_id) as info:
        assert info is None


# ---- いまのスパン、進行中のトレース ----


def test_get_current_otel_span_and_the_request_id_attribute(tracking_uri: str) -> None:
    """``get_current_otel_span()`` のスパンの ``SpanAttributeKey.REQUEST_ID`` は、トレース ID。"""
    assert _internals.active_trace_id() is None
    with mlflow.start_span("root") as span:
        assert _internals.active_trace_id() == span.trace_id
        assert format(_internals.current_span().get_span_context().span_id, "016x") == span.span_id


@pytest.mark.parametrize("isolated", ["true", "false"])
def test_get_context_api_switches_the_current_span(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, isolated: str
) -> None:
    monkeypatch.setenv("MLFLOW_USE_DEFAULT_TRACER_PROVIDER", isolated)
    outer = NonRecordingSpan(SpanContext(1, 2, is_remote=False))
    with _internals.otel_span_is_current(outer):
        assert _internals.current_span() is outer
        with _internals.otel_span_is_current(INVALID_SPAN):
            assert not _internals.current_span().get_span_context().is_valid
        assert _internals.current_span() is outer
    assert not _internals.current_span().get_span_context().is_valid


@pytest.mark.parametrize("propagated", ["true", "false"])
def test_set_span_in_context_and_detach_span_from_context(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, propagated: str
) -> None:
    """``MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT`` なら、OpenTelemetry の文脈も変える。"""
    monkeypatch.setenv("MLFLOW_TRACE_PROPAGATE_TO_OTEL_CONTEXT", propagated)
    span = mlflow.start_span_no_context("root")
    assert mlflow.get_current_active_span() is None
    for _ in range(2):
        with _internals.span_is_current(span, INVALID_SPAN):
            assert mlflow.get_current_active_span() is span
            assert get_current_span().is_recording() == (propagated == "true")
        assert mlflow.get_current_active_span() is None
        assert not get_current_span().is_recording()
    span.end()


def test_get_span_processor_has_what_is_waiting(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``_get_span_processor()`` の ``force_flush`` で、待っているスパンが送信側に渡る。"""
    mlflow.tracing.get_bridged_tracer_provider()
    processor: Any = mlflow_provider._get_span_processor()
    flushed: list[str] = []
    monkeypatch.setattr(processor, "force_flush", lambda: flushed.append("all"))
    _internals.hand_over_spans()
    assert flushed == ["all"]


def test_span_dict_of_get_trace_has_the_open_spans(tracking_uri: str) -> None:
    """``InMemoryTraceManager.get_trace(...).span_dict`` は、スパン ID からスパンを引く。"""
    with mlflow.start_span("root") as root, mlflow.start_span("child") as child:
        with mlflow.start_span("ended"):
            pass
        with mlflow.start_span("grandchild") as grandchild:
            assert _internals.open_spans_below(root) == [child, grandchild]
            assert _internals.open_spans_below(child) == [grandchild]
            assert _internals.open_spans_below(grandchild) == []
    mlflow.flush_trace_async_logging()
    assert _internals.open_spans_below(root) == []


def test_stream_chunk_event_name_format(tracking_uri: str) -> None:
    """``STREAM_CHUNK_EVENT_NAME_FORMAT`` のイベントが、断片ごとに付く。"""
    spans: list[Any] = []

    @mlflow.trace
    def chunks() -> Any:
        spans.append(mlflow.get_current_active_span())
        yield "a"
        yield "b"

    stream = chunks()
    next(stream)
    assert _internals.is_half_read_stream(spans[0])
    with mlflow.start_span("plain") as span:
        span.add_event(SpanEvent("note"))
        assert not _internals.is_half_read_stream(span)
    list(stream)


def test_get_configured_trace_metadata_and_tags() -> None:
    """``mlflow.tracing.context`` の値は、``get_configured_trace_metadata()`` などで読める。"""
    assert _internals.scope_metadata() == _internals.scope_tags() == {}
    with mlflow.tracing.context(metadata={"caller.trace_id": "1"}, tags={"request_id": "r"}):
        assert _internals.scope_metadata() == {"caller.trace_id": "1"}
        assert _internals.scope_tags() == {"request_id": "r"}


# ---- マスキング ----


def test_attributes_of_span_events_can_be_rewritten(tracking_uri: str, stored: Any) -> None:
    """``LiveSpan._span``、OpenTelemetry の ``Span._events`` と ``Event._attributes``。"""
    with mlflow.start_span("root") as span:
        span.add_event(SpanEvent("note", attributes={"text": "secret"}))
        span.add_event(SpanEvent("other"))
        _internals.rewrite_events(span, lambda events: [{"size": len(events)} for _ in events])
    events = stored()[0].data.spans[0].events
    assert [(one.name, one.attributes) for one in events] == [
        ("note", {"size": 2}),
        ("other", {"size": 2}),
    ]


def test_description_of_a_status_can_be_rewritten(tracking_uri: str) -> None:
    """OpenTelemetry の ``Status._description``。"""
    span = mlflow.start_span_no_context("root")
    _internals.rewrite_status(span, lambda _: "not called: there is no description")
    span.record_exception(ValueError("secret"))
    _internals.rewrite_status(span, str.upper)
    assert span.status.description == "VALUEERROR: SECRET"
    span.end()


def test_info_of_an_open_trace_is_in_the_trace_manager(tracking_uri: str) -> None:
    """``InMemoryTraceManager.get_trace`` の ``info``(プレビューと評価も)。"""
    span = mlflow.start_span_no_context("root")
    with _internals.open_trace_info(span.trace_id) as info:
        assert info is not None and (info.trace_id, info.assessments) == (span.trace_id, [])
        assert info.request_preview is None and info.response_preview is None
    span.end()
    with _internals.open_trace_info("tr-unknown") as info:
        assert info is None


# ---- 送信と終了 ----


class Watcher:
    """``watch_export`` に知らされたことを書き留める。"""

    def __init__(self, takes: bool = False) -> None:
        self.ended_traces, self.sent, self.accepted = list[str](), list[str](), list[Any]()
        self.spool = self if takes else None

    def accept(self, trace: Any) -> None:
        self.accepted.append(trace)

    def ended(self, trace_id: str) -> None:
        self.ended_traces.append(trace_id)

    def send(self, name: str, call: Any, *values: Any) -> Any:
        self.sent.append(name)
        return call(*values)


def watch(watcher: Watcher) -> Any:
    mlflow.tracing.get_bridged_tracer_provider()
    (processor,) = _internals.mlflow_processors()
    for _ in range(2):  # 2 回目は何もしない
        _internals.watch_export(processor, watcher, print)
    return processor


def test_every_root_and_every_send_is_told(tracking_uri: str) -> None:
    """``on_end`` と ``span_exporter._client`` を包むと、終わりと送信が、すべて見える。"""
    watcher = Watcher()
    watch(watcher)
    with mlflow.start_span("root") as root, mlflow.start_span("child"):
        pass
    mlflow.flush_trace_async_logging()
    assert watcher.ended_traces == [root.trace_id]
    assert watcher.sent.count("start_trace") == 1 and "log_spans" in watcher.sent
    # スパンより先にトレースが届くと、MLflow はスパンを成果物にも置く(混んだ機械で起きる)
    assert set(watcher.sent) <= {"log_spans", "start_trace", "_upload_trace_data"}


def test_the_trace_id_is_the_one_mlflow_gave_the_span(tracking_uri: str) -> None:
    """Unity Catalog では "trace:/..." になる。"tr-" を仮定すると、届いたものを失ったと数える。"""
    with mlflow.start_span("x") as span:
        assert _internals.mlflow_trace_id(span._span) == span.trace_id
        span._span.set_attribute("mlflow.traceRequestId", '"trace:/main.agents/0af7"')
        assert _internals.mlflow_trace_id(span._span) == "trace:/main.agents/0af7"
        span._span.set_attribute("mlflow.traceRequestId", f'"{span.trace_id}"')


@pytest.mark.parametrize("name", _internals.EXPORT_REQUESTS)
def test_tracing_client_has_what_the_exporter_calls(name: str) -> None:
    from mlflow.tracing.client import TracingClient
    from mlflow.tracing.export import mlflow_v3

    assert callable(getattr(TracingClient, name))
    assert f"self._client.{name}(" in inspect.getsource(mlflow_v3)


def test_get_server_version_remembers_that_nobody_answered(free_port: int) -> None:
    from mlflow.store.tracking.rest_store import RestStore
    from mlflow.tracing.client import TracingClient

    client = TracingClient(f"http://127.0.0.1:{free_port}")
    span = mlflow.start_span_no_context("x")
    RestStore._get_server_version.cache_clear()
    with pytest.raises(NotImplementedError, match="could not identify"):
        client.log_spans("1", [span])
    assert RestStore._get_server_version.cache_info().currsize == 1
    with pytest.raises(ConnectionError, match="could not identify"):
        _internals.log_spans(client.log_spans, "1", [span])
    assert RestStore._get_server_version.cache_info().currsize == 0
    span.end()


def test_otel_processor_registers_traces_and_shows_its_exporter() -> None:
    """OTLP だけの送信では ``_should_register_traces`` が真で、``span_exporter`` が送る。"""
    from mlflow.tracing.processor.otel import OtelSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    processor: Any = OtelSpanProcessor(exporter, export_metrics=False)
    try:
        assert processor._should_register_traces is True
        assert processor.span_exporter is exporter
    finally:
        processor.shutdown()


def test_queues_of_the_batch_processor_and_the_task_queue(tracking_uri: str) -> None:
    """``_batch_delegate._batch_processor`` と ``_async_queue._queue`` が空かどうかで決まる。"""
    assert _internals.export_is_idle()
    with mlflow.start_span("waiting"):
        pass
    processor: Any = _internals.processors_of(
        mlflow.tracing.get_bridged_tracer_provider()._active_span_processor  # type: ignore[attr-defined]
    )[0]
    batch: Any = processor._batch_delegate._batch_processor
    assert len(batch._queue) == 1 and not batch._export_lock.locked()
    assert not _internals.export_is_idle()
    mlflow.flush_trace_async_logging()
    assert processor.span_exporter._async_queue._queue.unfinished_tasks == 0
    assert _internals.export_is_idle()


def test_log_trace_and_export_spans_incrementally_are_diverted(tracking_uri: str) -> None:
    watcher = Watcher(takes=True)
    watch(watcher)
    with mlflow.start_span("taken") as span:
        pass
    mlflow.flush_trace_async_logging()
    assert [trace.info.trace_id for trace in watcher.accepted] == [span.trace_id]
    assert mlflow.search_traces(return_type="list", locations=["0"]) == []


def test_register_atexit_of_threading_runs_before_the_workers_are_joined() -> None:
    """``threading._register_atexit`` は、登録と逆の順に、スレッドを待つ前に呼ぶ。"""
    program = (
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from chapter8_samples.production_tracing._internals import before_threads_are_joined\n"
        "pool = ThreadPoolExecutor(1); pool.submit(int)\n"
        "before_threads_are_joined(lambda: print(pool.submit(lambda: 'alive').result()))\n"
    )
    root = Path(__file__).resolve().parents[2]
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=True
    )
    assert answer.stdout.strip() == "alive"


def test_provider_reset_keeps_processors_ids_and_the_destination(tracking_uri: str) -> None:
    """MLflow の ``provider.reset()`` が捨てるのは、プロバイダーだけ。"""
    from mlflow.entities.trace_location import MlflowExperimentLocation
    from mlflow.tracing.config import get_config

    def mask(span: Any) -> None: ...

    mlflow.tracing.configure(span_processors=[mask])
    mlflow.tracing.set_destination(MlflowExperimentLocation("0"))
    before: Any = _internals.current_provider()
    _internals.renew_provider()
    after: Any = _internals.current_provider()
    assert after is not before and after.id_generator is before.id_generator
    assert get_config().span_processors == [mask]
    destination: Any = mlflow_provider._MLFLOW_TRACE_USER_DESTINATION.get()
    assert destination.experiment_id == "0"
    mlflow.tracing.disable()
    _internals.renew_provider()
    assert not mlflow_provider.is_tracing_enabled()


def test_span_processor_of_a_span_is_the_pipeline_of_its_provider(tracking_uri: str) -> None:
    """OpenTelemetry の ``Span._span_processor``。"""
    with mlflow.start_span("x") as span:
        assert _internals.pipeline_of(span) is _internals.current_pipeline() is not None
