"""フィードバックは、応答の直後でも、ちょうど 1 回だけ記録される。"""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import LiveSpan
from mlflow.exceptions import MlflowException
from mlflow.tracing import set_tracing_context_from_http_request_headers
from mlflow.tracing.client import TracingClient
from mlflow.tracing.provider import safe_set_span_in_context
from mlflow.tracing.trace_manager import InMemoryTraceManager
from ports import free_port

from chapter8_samples._lab.servers.mlflow_server import MlflowServer, MlflowServerError
from chapter8_samples._lab.servers.receivers import Answer
from chapter8_samples.quality_monitoring import (
    FeedbackDeliveryError,
    FeedbackError,
    FeedbackRequest,
    FeedbackValidationError,
    TraceNotFoundError,
    send_feedback,
)
from chapter8_samples.quality_monitoring.feedback import delivery as feedback_delivery
from chapter8_samples.quality_monitoring.feedback.arrivals import Arrivals


def thumbs(trace_id: str, user_id: str = "u1", value: bool = True) -> FeedbackRequest:
    return FeedbackRequest(trace_id=trace_id, name="user_thumbs", value=value, user_id=user_id)


def assessments(trace_id: str) -> Any:
    return TracingClient().get_trace_info(trace_id).assessments


def test_feedback_right_after_the_call_waits_for_the_async_export(store: str) -> None:
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "true"
    os.environ["MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS"] = "120000"  # 既定は 5 秒
    with mlflow.start_span("answer") as span:
        pass
    with pytest.raises(MlflowException):  # この待ちが要ることの証拠
        mlflow.log_feedback(trace_id=span.trace_id, name="x", value=True)
    stored = send_feedback(thumbs(span.trace_id), timeout_seconds=60)  # 書き出しの間隔を待たない
    assert [a.assessment_id for a in assessments(span.trace_id)] == [stored.assessment_id]


def test_feedback_inside_the_active_trace_is_saved_with_it(store: str) -> None:
    with mlflow.start_span("answer") as span:
        send_feedback(thumbs(span.trace_id), timeout_seconds=0.5)
    assert [a.name for a in assessments(span.trace_id)] == ["user_thumbs"]


def test_a_change_of_mind_inside_the_active_trace_does_not_pile_up(store: str) -> None:
    with mlflow.start_span("answer") as span:
        first = thumbs(span.trace_id)
        send_feedback(first)
        send_feedback(first)
        changed = send_feedback(thumbs(span.trace_id, value=False))
        send_feedback(thumbs(span.trace_id, "u2"))
        late = replace(first, feedback_id="late", given_at_ms=first.given_at_ms - 1000)
        assert send_feedback(late) is changed
    found = [(a.source.source_id, a.feedback.value) for a in assessments(span.trace_id)]
    assert sorted(found) == [("u1", False), ("u2", True)]


@pytest.fixture
def half_exported(store: str) -> LiveSpan:
    """保存先にはもうあるが、書き出しが終わらず、手元にも残っているトレース。"""
    span = mlflow.start_span_no_context("answer")
    with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
        assert trace is not None
        writing: Any = TracingClient().store
        writing.start_trace(trace.info)
    return span


def test_votes_during_the_export_do_not_pile_up(half_exported: LiveSpan) -> None:
    first = thumbs(half_exported.trace_id)
    for request in (first, first, thumbs(half_exported.trace_id, value=False)):
        send_feedback(request)
    half_exported.end()
    found = [(a.feedback.value, a.valid) for a in assessments(half_exported.trace_id)]
    assert sorted(found) == [(False, True), (True, False)]


@pytest.mark.slow
def test_a_vote_waits_for_the_one_that_is_saved_with_the_trace(half_exported: LiveSpan) -> None:
    first = thumbs(half_exported.trace_id)
    with safe_set_span_in_context(half_exported):
        saved_later = send_feedback(first)
    assert send_feedback(first, timeout_seconds=0.2) is saved_later  # 同じものなら待たない
    changed = thumbs(half_exported.trace_id, value=False)
    with pytest.raises(TraceNotFoundError):
        send_feedback(changed, timeout_seconds=0.2)
    half_exported.end()
    send_feedback(changed)
    found = [(a.feedback.value, a.valid) for a in assessments(half_exported.trace_id)]
    assert sorted(found) == [(False, True), (True, False)]


def test_the_trace_of_an_upstream_service_is_waited_for(store: str) -> None:
    upstream = {"traceparent": f"00-{'1' * 32}-{'2' * 16}-01"}
    with (
        set_tracing_context_from_http_request_headers(upstream),
        mlflow.start_span("downstream") as span,
    ):
        assert mlflow.get_active_trace_id() == span.trace_id == "tr-" + "1" * 32
        with pytest.raises(TraceNotFoundError):  # MLflow の例外を漏らさない
            send_feedback(thumbs(span.trace_id), timeout_seconds=0.2)


def test_the_same_request_sent_again_is_stored_once(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    request = thumbs(trace_id)
    first, second = send_feedback(request), send_feedback(request)
    assert first.assessment_id == second.assessment_id
    assert len(assessments(trace_id)) == 1


def test_changing_ones_mind_replaces_only_ones_own_feedback(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    send_feedback(thumbs(trace_id, "u1", True))
    send_feedback(thumbs(trace_id, "u2", True))
    send_feedback(thumbs(trace_id, "u1", False))
    valid = {
        (a.source.source_id, a.feedback.value)
        for a in assessments(trace_id)
        if a.valid is not False and a.feedback
    }
    assert valid == {("u1", False), ("u2", True)}


def test_pressing_twice_at_once_leaves_one_valid_vote(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    together = threading.Barrier(4)

    def press(i: int) -> None:
        together.wait()
        send_feedback(thumbs(trace_id, "u1", i % 2 == 0))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(press, range(8)))
    assert sum(a.valid is not False for a in assessments(trace_id)) == 1


def test_a_vote_waits_for_the_previous_one_only_until_its_deadline(
    store: str, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sending, release = threading.Event(), threading.Event()

    def slow(*_: object) -> bool:
        sending.set()
        return release.wait(10)

    monkeypatch.setattr(feedback_delivery, "_store", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(send_feedback, thumbs("tr-1"))
        assert sending.wait(10)
        with pytest.raises(FeedbackDeliveryError, match="previous vote"):
            send_feedback(thumbs("tr-1"), timeout_seconds=0.1)
        release.set()
        assert first.result(10)


def test_a_thread_that_does_not_start_is_started_for_the_next_vote(
    store: str, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trace_id,), start, refused = ask(), threading.Thread.start, {"feedback-arrivals"}

    def limited(thread: threading.Thread) -> None:
        if thread.name in refused:
            refused.remove(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    arrivals = Arrivals()
    with pytest.raises(RuntimeError), arrivals.of(trace_id):
        pass
    refused.add("hurry-export")
    for _ in range(2):
        with arrivals.of(trace_id) as arrival:
            arrival.result(5)
    deadline = time.monotonic() + 10
    while refused or feedback_delivery._HURRY.locked():
        assert time.monotonic() < deadline
        feedback_delivery.hurry_export()
        time.sleep(0.01)


def test_feedback_is_recorded_as_human(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    send_feedback(thumbs(trace_id, "u1"))
    (stored,) = assessments(trace_id)
    assert (stored.source.source_type, stored.source.source_id) == ("HUMAN", "u1")


def test_unknown_trace_is_an_error_that_carries_the_request(store: str) -> None:
    request = thumbs("tr-" + "0" * 32)
    with pytest.raises(TraceNotFoundError, match="is not stored") as caught:
        send_feedback(request, timeout_seconds=0.3)
    assert FeedbackRequest(**json.loads(json.dumps(asdict(caught.value.request)))) == request


@pytest.mark.slow
def test_a_dead_server_ends_at_the_deadline(tmp_path: Path) -> None:
    mlflow.set_tracking_uri(f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    with pytest.raises(FeedbackDeliveryError):
        send_feedback(thumbs("tr-" + "1" * 32), timeout_seconds=0.3)
    assert time.monotonic() - began < 5  # MLflow 自身の再試行は数分続く


def test_a_refusal_is_not_retried(webhooks: Any) -> None:
    refusal = json.dumps({"error_code": "PERMISSION_DENIED", "message": "no access"})
    webhooks.script(Answer(403, {"content-type": "application/json"}, refusal.encode()))
    mlflow.set_tracking_uri(webhooks.url.rstrip("/"))
    with pytest.raises(FeedbackError, match="no access") as caught:
        send_feedback(thumbs("tr-" + "2" * 32), timeout_seconds=5)
    assert not isinstance(caught.value, FeedbackDeliveryError)
    assert len(webhooks.received) == 1


FINE: dict[str, Any] = {"trace_id": "tr-1", "name": "user_comment", "value": "v", "user_id": "u"}


def test_characters_no_database_can_store_are_refused() -> None:
    for bad in ("a\x00b", "a\ud800", "\udc00"):
        for name in ("trace_id", "value", "user_id", "rationale", "feedback_id"):
            with pytest.raises(FeedbackValidationError, match=f"{name} has a character"):
                FeedbackRequest(**{**FINE, name: bad})
    FeedbackRequest(**{**FINE, "value": "改行\n絵文字 \U0001f600 行区切り \u2028"})


def test_ids_mlflow_would_ignore_or_send_to_another_api_are_refused() -> None:
    ignored: list[Any] = ["", "  ", None, 7, "MLFLOW_NO_OP_SPAN_TRACE_ID"]
    elsewhere = ["tr-1?x=", "tr-1#", "x/../tr-1", "./tr-1", "tr-1/", "/tr-1", "tr-1%2f", "tr 1"]
    for trace_id in [*ignored, *elsewhere, "a\\b", "x" * 251]:
        with pytest.raises(FeedbackValidationError, match="trace"):
            thumbs(trace_id)
    thumbs("trace:/main.ops_1.traces/0af7651916cd43dd8448eb211c80319c")  # Unity Catalog の ID


def test_names_users_and_values_are_checked() -> None:
    texts: list[Any] = ["", " ", None, "x" * 251]
    for text in texts:
        for name in ("name", "user_id"):
            with pytest.raises(FeedbackValidationError, match=name):
                FeedbackRequest(**{**FINE, name: text})
    silent: list[Any] = [None, [1], object()]
    for value in silent:
        with pytest.raises(FeedbackValidationError, match="value must be"):
            FeedbackRequest(**{**FINE, "value": value})
    for value in (float("nan"), float("inf")):  # JSON で送れない
        with pytest.raises(FeedbackValidationError, match="finite"):
            FeedbackRequest(**{**FINE, "value": value})


def test_validation_errors_are_feedback_errors() -> None:
    assert issubclass(FeedbackValidationError, FeedbackError)
    assert issubclass(FeedbackValidationError, ValueError)


def restarted(home: Path, port: int) -> MlflowServer:
    """強制終了の直後は、まだポートが空いていないことがある。"""
    deadline = time.monotonic() + 10
    while True:
        try:
            return MlflowServer(home, port=port).start()
        except MlflowServerError as error:
            if "not free" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.mark.slow
def test_500_feedbacks_survive_a_server_restart(tmp_path: Path) -> None:
    """100 の応答の直後に 5 人ずつ、計 500 件を HTTP で送る途中で、サーバーが落ちて戻る。"""
    port = free_port()
    server = MlflowServer(tmp_path / "server", port=port).start()
    pool = ThreadPoolExecutor(16)
    try:
        mlflow.set_tracking_uri(server.url)
        mlflow.set_experiment("restart")
        halfway = threading.Event()

        def answer_and_rate(i: int) -> str:
            with mlflow.start_span("answer") as span:
                pass
            if i == 50:
                halfway.set()
            for user in range(5):
                request = thumbs(span.trace_id, f"user-{i}-{user}")
                send_feedback(request, timeout_seconds=90)
            return span.trace_id

        futures = [pool.submit(answer_and_rate, i) for i in range(100)]
        assert halfway.wait(120)
        server.kill()
        server = restarted(tmp_path / "server", port)
        for i, future in enumerate(futures):
            users = [a.source.source_id for a in assessments(future.result())]
            assert sorted(users) == [f"user-{i}-{user}" for user in range(5)]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        server.stop()
