"""delivery.counts と delivery.text: どこで消えても 1 件まで数え、送れない文字や整数で消さない。"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities import Span, SpanEvent
from mlflow.tracing.client import TracingClient
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.processor.mlflow_v3 import MlflowV3SpanProcessor

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.production_tracing import _internals, setup_production_tracing
from chapter8_samples.production_tracing.basic_setup import EXPORT_PROFILES
from chapter8_samples.production_tracing.delivery import counts, flush, text
from chapter8_samples.production_tracing.delivery.counts import LEDGER, start_counting
from chapter8_samples.production_tracing.delivery.flush import flush_traces
from chapter8_samples.production_tracing.delivery.spool import TraceSpool

HALF_EMOJI = "\ud83d"


@pytest.fixture
def may_send(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """立てるまで返事をしないサーバー(本物では、止まる瞬間を選べない)。その後は SQLite に書く。"""
    gate = threading.Event()
    gate.set()

    def after_the_gate(send: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values: gate.wait(60) and send(*values)

    for name in ("start_trace", "log_spans"):
        monkeypatch.setattr(TracingClient, name, after_the_gate(getattr(TracingClient, name)))
    yield gate
    gate.set()


@pytest.fixture
def counting(tracking_uri: str) -> Iterator[None]:
    mlflow.set_experiment("counts")
    stop = start_counting()
    yield
    stop()


def record(count: int) -> None:
    for _ in range(count):
        with mlflow.start_span("answer"):
            pass


def test_backlog_is_visible_and_a_flush_in_time_reports_nothing(
    may_send: threading.Event, counting: None, stored: Any
) -> None:
    may_send.clear()
    record(5)
    assert LEDGER.counts()[0] == 5
    may_send.set()
    result = flush_traces(30)
    assert (result.ok, result.undelivered, result.error) == (True, 0, None)
    assert LEDGER.counts() == (0, 0, 0)
    record(1)  # フラッシュの後も、記録は続く
    assert flush_traces(30).ok
    assert len(stored("counts", include_spans=False)) == 6


def test_a_flush_that_is_too_late_says_how_many(
    may_send: threading.Event, counting: None, stored: Any
) -> None:
    may_send.clear()
    record(7)
    result = flush_traces(0.5)
    assert not result.ok and result.undelivered == 7
    assert "7 traces not delivered (not finished within 0.5s)" in str(result.error)
    may_send.set()  # 止まったのではなく遅いだけなら、後で届く
    assert flush_traces(30).ok
    assert len(stored("counts", include_spans=False)) == 7


def test_a_flush_thread_that_could_not_start_is_started_by_the_next_flush(
    counting: None, monkeypatch: pytest.MonkeyPatch, stored: Any
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    flush._owner = 0  # 起動したことのないプロセス
    with monkeypatch.context() as limited:
        limited.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            flush_traces(1)
    record(1)
    assert flush_traces(10).ok and len(stored("counts")) == 1


def test_what_waits_for_a_dead_server_is_bounded_and_stays_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held_by_mlflow = int(EXPORT_PROFILES["burst"]["MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE"])
    assert counts._MAX_WAITING // held_by_mlflow >= 5
    monkeypatch.setattr(counts, "_MAX_WAITING", 100)
    monkeypatch.setattr(counts, "_SETTLE_SECONDS", 60)
    traces = [f"tr-{number}" for number in range(130)]
    for trace_id in traces:
        LEDGER.ended(trace_id)
    assert LEDGER.counts() == (100, 30, 0)
    undelivered, reason = LEDGER.report(finished=False)
    assert undelivered == 130 and "more than 100 traces wait" in str(reason)
    LEDGER.arrived(traces)  # 忘れたものが、後で届く
    assert LEDGER.counts() == (0, 30, 0)
    assert LEDGER.report(finished=True) == (0, None)


def test_flushes_that_are_too_late_one_after_another_let_the_next_traces_through(
    may_send: threading.Event, counting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """リクエストのたびに短く待つアプリ。1 度遅れた後、サーバーは健康でも、止め続けてはいけない。"""
    now = [1000.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(counts, "time", clock)
    may_send.clear()
    record(3)
    paused: list[bool] = []
    for _ in range(15):
        LEDGER.stop_sending(0.0, for_good=False)
        assert LEDGER.report(finished=False)[0] == 3  # 止めていなくても、少なくは数えない
        now[0] += 1.0
        paused.append(now[0] < LEDGER._paused_until)
    assert paused == [True, False, False, False, False] * 3
    may_send.set()
    assert flush_traces(30).ok and LEDGER.counts() == (0, 0, 0)


@pytest.mark.parametrize(
    "limit",
    ["MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE", "MLFLOW_TRACE_BUFFER_MAX_SIZE"],
)
def test_what_mlflow_discards_silently_is_counted(
    may_send: threading.Event, counting: None, stored: Any, limit: str
) -> None:
    os.environ[limit] = "8"
    mlflow.tracing.reset()
    mlflow.tracing.trace_manager.InMemoryTraceManager.reset()
    may_send.clear()
    record(60)
    may_send.set()
    result = flush_traces(30)
    found = len(stored("counts", include_spans=False))
    assert 0 < found < 60 and not result.ok
    assert found + result.undelivered == found + LEDGER.counts()[1] == 60
    assert flush_traces(30).ok, "a loss is reported once"
    del os.environ[limit]  # 置き場の大きさは、次に作られるときに読まれる
    mlflow.tracing.trace_manager.InMemoryTraceManager.reset()


def test_failed_sends_are_counted(
    counting: None, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri(f"http://127.0.0.1:{free_port}")
    mlflow.tracing.set_destination(mlflow.entities.trace_location.MlflowExperimentLocation("1"))
    record(3)
    mlflow.flush_trace_async_logging()  # 失敗は flush_traces より前に終わっている
    result = flush_traces(30)
    assert (result.ok, result.undelivered, LEDGER.counts()[1]) == (False, 3, 3)
    assert "export failures" in str(result.error)


def test_open_children_are_backlog_and_not_lost(counting: None) -> None:
    root = mlflow.start_span_no_context("root")
    child = mlflow.start_span_no_context("late", parent_span=root)
    root.end()
    assert flush_traces(30).ok
    assert LEDGER.counts()[0] == 1
    child.end()
    assert flush_traces(30).ok
    assert LEDGER.counts() == (0, 0, 0)


@pytest.mark.parametrize("dead", [False, True], ids=["up", "down"])
def test_otlp_is_counted_too(
    counting: None, monkeypatch: pytest.MonkeyPatch, free_port: int, dead: bool
) -> None:
    from opentelemetry.exporter.otlp.proto.http import trace_exporter
    from opentelemetry.sdk.trace.export import SpanExportResult

    answer = SpanExportResult.FAILURE if dead else SpanExportResult.SUCCESS
    monkeypatch.setattr(trace_exporter.OTLPSpanExporter, "export", lambda *_: answer)
    endpoint = f"http://127.0.0.1:{free_port}/v1/traces"
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    mlflow.tracing.reset()
    record(4)
    result = flush_traces(30)
    assert (result.ok, result.undelivered) == (not dead, 4 * dead)


def test_classes_are_left_alone_and_the_provider_is_no_longer_followed(tracking_uri: str) -> None:
    classes = TracingClient, MlflowV3SpanProcessor, MlflowV3SpanExporter
    before = [dict(vars(one)) for one in classes]
    stops = [start_counting(), start_counting()]
    mlflow.set_experiment("counts")
    record(1)
    assert LEDGER.counts()[0] == 1
    assert [dict(vars(one)) for one in classes] == before
    for stop in stops:
        stop()
    mlflow.set_experiment("other")
    record(1)
    (processor,) = _internals.mlflow_processors()
    assert not {"on_end", "_log_trace"} & {*vars(processor), *vars(processor.span_exporter)}


def test_a_moved_name_is_named_and_tracing_goes_on(
    tracking_uri: str, stored: Any, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    mlflow.set_experiment("moved")
    mlflow.tracing.get_bridged_tracer_provider()
    (processor,) = _internals.mlflow_processors()
    client = processor.span_exporter.__dict__.pop("_client")
    try:
        with pytest.raises(RuntimeError, match=r"MLflow .* has changed: .*_client"):
            TraceSpool(tmp_path / "spool").install()
    finally:
        processor.span_exporter._client = client
        LEDGER.problem = ""
    assert "undelivered traces are not counted" in caplog.text
    record(1)
    assert len(stored("moved")) == 1


@pytest.mark.slow
def test_a_fork_that_waits_for_a_lock_lets_the_traces_through_after_a_while(
    counting: None,
) -> None:
    """``reset_production_tracing`` は、fork が待つロックを握って、送り終えるのを待つ。"""
    LEDGER.hold()
    record(3)
    try:
        assert flush_traces(20).ok
    finally:
        LEDGER.resume()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_counts_from_zero(counting: None) -> None:
    LEDGER.ended("tr-of-the-parent")
    child = os.fork()
    if child == 0:
        os._exit(LEDGER.counts()[0])
    assert os.waitpid(child, 0)[1] == 0
    assert LEDGER.counts()[0] == 1


def _fail(span: Any) -> None:
    raise ValueError(f"bad {HALF_EMOJI}")


# 置き場所ごとに、(スパンの名前, スパンの中ですること)
PLACES: dict[str, Callable[[Any], Any]] = {
    "name": lambda span: None,
    "inputs": lambda span: span.set_inputs({"q": [f"a{HALF_EMOJI}"]}),
    "outputs": lambda span: span.set_outputs(f"a{HALF_EMOJI}"),
    "attribute": lambda span: span.set_attribute("k", HALF_EMOJI),
    "event": lambda span: span.add_event(SpanEvent(HALF_EMOJI, attributes={"k": HALF_EMOJI})),
    "exception": _fail,
    "feedback": lambda span: mlflow.log_feedback(
        trace_id=span.trace_id, name="f", value=HALF_EMOJI, rationale=HALF_EMOJI
    ),
    "tag": lambda span: mlflow.update_current_trace(tags={"k": HALF_EMOJI}),
    "user": lambda span: mlflow.update_current_trace(user=f"u{HALF_EMOJI}"),
    "preview": lambda span: mlflow.update_current_trace(request_preview=f"p{HALF_EMOJI}"),
}


@pytest.mark.parametrize("spooled", [False, True], ids=["direct", "spool"])
def test_half_an_emoji_is_replaced_and_nothing_is_lost(
    counting: None, stored: Any, tmp_path: Any, spooled: bool
) -> None:
    spool = TraceSpool(tmp_path / "spool").install() if spooled else None
    for place, put in PLACES.items():
        record(1)  # 一緒に送られるものも失わない
        name = f"x{HALF_EMOJI}" if place == "name" else place
        with contextlib.suppress(ValueError), mlflow.start_span(name) as span:
            put(span)
    assert flush_traces(30).ok
    if spool is not None:
        assert spool.drain(30) == 0 and spool.stats().delivered == 2 * len(PLACES)
        spool.uninstall()
    traces = stored("counts")
    assert [len(trace.data.spans) for trace in traces] == [1] * 2 * len(PLACES)
    shown = {trace.data.spans[0].name: str(trace.to_dict()) for trace in traces}
    assert shown.keys() == {"answer", "x\ufffd", *PLACES} - {"name"}
    assert [name for name, text in shown.items() if HALF_EMOJI in text] == []
    assert [name for name, text in shown.items() if "\ufffd" not in text] == ["answer"]


@pytest.mark.parametrize("spooled", [False, True], ids=["direct", "spool"])
def test_a_number_beyond_64_bits_arrives_as_text(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, stored: Any, tmp_path: Any, spooled: bool
) -> None:
    """サーバーへは、64 ビットの整数しか送れない(SQLite には、そのまま書ける)。"""
    store = TracingClient.log_spans

    def over_the_wire(client: Any, location: str, spans: list[Any]) -> Any:
        sent = [Span.from_otel_proto(one.to_otel_proto()) for one in spans]
        return store(client, location, sent)

    monkeypatch.setattr(TracingClient, "log_spans", over_the_wire)
    mlflow.set_experiment("counts")
    stop = start_counting()
    spool = TraceSpool(tmp_path / "spool").install() if spooled else None
    record(1)
    with mlflow.start_span("order", attributes={"n": -(2**63) - 1, "max": 2**63 - 1}) as span:
        span.set_inputs({"order_id": [2**64, 7, True, f"a{HALF_EMOJI}"]})
        span.add_event(SpanEvent("e", attributes={"k": 2**70}))
    assert flush_traces(30).ok
    if spool is not None:
        assert spool.drain(30) == 0 and spool.stats().dead == 0
        spool.uninstall()
    stop()
    shown = {trace.data.spans[0].name: trace.data.spans[0] for trace in stored("counts")}
    order = shown.pop("order")
    assert shown.keys() == {"answer"}
    assert order.inputs == {"order_id": [str(2**64), 7, True, "a\ufffd"]}
    assert [order.attributes["n"], order.attributes["max"]] == [str(-(2**63) - 1), 2**63 - 1]
    assert order.events[0].attributes["k"] == str(2**70)


def test_a_span_that_was_mended_keeps_the_name_of_its_service(
    tracking_uri: str, stored: Any
) -> None:
    """19 桁の ID は、直さなくてよいが、直す方を通る。"""
    setup_production_tracing("counts", tracking_uri=tracking_uri, service_name="shop")
    for value in (10**18, 2**70, HALF_EMOJI):
        with mlflow.start_span("order") as span:
            span.set_inputs({"order_id": value})
    assert flush_traces(30).ok
    found = [
        (trace.info.tags["service.name"], trace.data.spans[0].inputs) for trace in stored("counts")
    ]
    values = [10**18, str(2**70), "\ufffd"]
    assert sorted(found, key=str) == sorted(
        [("shop", {"order_id": one}) for one in values], key=str
    )


def test_what_cannot_be_sent_is_replaced_on_the_otlp_side_of_a_dual_export(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, stored: Any
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "true")
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.http_endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        setup_production_tracing("dual")
        with mlflow.start_span("x") as span:
            span.set_inputs({"q": HALF_EMOJI, "same": "絵文字 😀"})
            span.add_event(SpanEvent("note", attributes={"k": f"e{HALF_EMOJI}"}))
        with mlflow.start_span("number") as span:
            span.add_event(SpanEvent("note", attributes={"k": 2**64}))
        assert flush_traces(30).ok
        sent = {span.name: span for span in receiver.wait_for(spans=2)}
    assert "\ufffd" in sent["x"].attributes["mlflow.spanInputs"]
    assert sent["x"].events[0].attributes["k"] == "e\ufffd"
    assert sent["number"].events[0].attributes["k"] == str(2**64)
    (trace,) = [one for one in stored("dual") if one.data.spans[0].name == "x"]
    assert trace.data.spans[0].inputs == {"q": "\ufffd", "same": "絵文字 😀"}


any_text = st.text(st.characters(exclude_categories=()))
int64 = st.integers(-(2**63), 2**63 - 1)
trees = st.recursive(
    any_text | int64 | st.none(), lambda t: st.lists(t) | st.dictionaries(any_text, t)
)


@settings(max_examples=50)
@given(trees)
def test_text_becomes_utf8_and_valid_text_stays(tree: Any) -> None:
    clean = text.as_utf8(tree)
    repr(clean).encode()
    assert text.as_utf8(clean) == clean
    if not text._SURROGATE.search(repr(tree)) and "\\ud" not in repr(tree):
        assert clean == tree


def test_a_span_with_nothing_to_mend_is_not_copied(counting: None) -> None:
    """埋め込みなどの小さな小数は、20 桁でも、整数ではない。"""
    with mlflow.start_span("embedding") as span:
        span.set_outputs([0.00012345678901234567, 10**17])
    assert text.as_utf8([span])[0] is span


def test_spans_that_only_otlp_still_waits_for_are_not_lost_traces(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """両方に送るとき、MLflow に届いたトレースは、OTLP の送信待ちにあっても届いている。"""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    monkeypatch.setenv("MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "true")
    with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.http_endpoint)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        mlflow.set_experiment("dual")
        record(3)
        mlflow.flush_trace_async_logging()
        stop = start_counting()
        try:
            assert LEDGER.counts() == (0, 0, 0)
            record(2)
            mlflow.flush_trace_async_logging()
            assert LEDGER.counts() == (0, 0, 0)
            assert flush_traces(30).ok
        finally:
            stop()


def test_a_provider_that_was_rebuilt_after_the_setup_is_counted_from_its_first_trace(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8.5 の設定や ``set_experiment`` は、プロバイダーを黙って作り直す。"""
    setup_production_tracing("before")
    record(1)
    mlflow.set_experiment("after")
    record(3)
    mlflow.flush_trace_async_logging()
    assert flush_traces(30).ok and LEDGER.counts() == (0, 0, 0)

    def down(*_: object) -> None:
        raise ConnectionError("refused")

    for name in ("start_trace", "log_spans"):
        monkeypatch.setattr(TracingClient, name, down)
    mlflow.set_experiment("down")
    record(2)
    mlflow.flush_trace_async_logging()
    assert LEDGER.counts() == (0, 2, 0)
