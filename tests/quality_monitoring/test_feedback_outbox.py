"""届かなかったフィードバックは、アプリが落ちても残り、1 回だけ届く。"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracing.client import TracingClient
from ports import free_port

from chapter8_samples import quality_monitoring
from chapter8_samples._lab.servers.mlflow_server import MlflowServer
from chapter8_samples.quality_monitoring import (
    FeedbackDeliveryError,
    FeedbackError,
    FeedbackOutbox,
    FeedbackRequest,
    FeedbackValidationError,
    OutboxStatus,
    TraceNotFoundError,
    send_feedback,
    summarize_feedback,
    withdraw_feedback,
)
from chapter8_samples.quality_monitoring.feedback.delivery import store_feedback


def request(trace_id: str, user_id: str = "u", value: bool = True) -> FeedbackRequest:
    return FeedbackRequest(trace_id=trace_id, name="user_thumbs", value=value, user_id=user_id)


def offline(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
    raise FeedbackDeliveryError("server is down", request)


def refuse(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
    raise FeedbackError("not allowed")


def stored(trace_id: str) -> list[Any]:
    return [a.feedback for a in TracingClient().get_trace_info(trace_id).assessments]


def test_delivered_feedback_leaves_nothing_behind(store: str, ask: Any, tmp_path: Path) -> None:
    (trace_id,) = ask()
    box = tmp_path / "out" / "box.db"
    assert FeedbackOutbox(box).submit(request(trace_id)) is not None
    assert not box.exists() and len(FeedbackOutbox(box)) == 0


def test_a_restarted_app_sends_the_rest_once(store: str, ask: Any, tmp_path: Path) -> None:
    ids, box = ask(3), tmp_path / "box.db"
    down = FeedbackOutbox(box, send=offline)
    assert [down.submit(request(i)) for i in ids] == [None] * 3
    restarted = FeedbackOutbox(box)
    assert len(restarted) == 3
    report = restarted.replay()
    assert (report.sent, report.remaining) == (3, 0)
    assert restarted.replay().sent == 0
    assert [len(stored(i)) for i in ids] == [1, 1, 1]


def test_any_text_survives_a_restart(tmp_path: Path) -> None:
    texts = ["行区切り\u2028の後", "次の行\x85の後", "絵文字\U0001f600", "'; DROP TABLE feedback"]
    votes = [replace(request(f"tr-{i}"), rationale=text) for i, text in enumerate(texts)]
    kept: list[FeedbackRequest] = []

    def deliver(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
        kept.append(request)

    down = FeedbackOutbox(str(tmp_path / "box.db"), send=offline)
    for vote in votes:
        down.submit(vote)
    FeedbackOutbox(tmp_path / "box.db", send=deliver).replay()
    assert kept == votes


def test_a_file_that_is_no_outbox_is_named_and_not_touched(tmp_path: Path) -> None:
    box = tmp_path / "box.jsonl"
    box.write_text('{"add": {"trace_id": "tr-1"}}\n' * 50)
    with pytest.raises(OSError, match=r"box\.jsonl cannot be used"):
        FeedbackOutbox(box, send=offline).submit(request("tr-1"))
    assert box.read_text().count("tr-1") == 50


def test_a_row_of_another_version_is_set_aside(tmp_path: Path) -> None:
    outbox = FeedbackOutbox(tmp_path / "box.db", send=offline)
    outbox.keep(request("tr-1"))
    with sqlite3.connect(tmp_path / "box.db") as database:
        database.execute("UPDATE feedback SET body = json_set(body, '$.stars', 5)")
    assert outbox.replay().rejected == 1
    ((body, reason),) = outbox.rejected()
    assert body["stars"] == 5 and "stars" in reason


def test_rows_that_cannot_be_read_hold_up_nothing(tmp_path: Path) -> None:
    sent: list[str] = []

    def send(request: FeedbackRequest, **_: Any) -> None:
        sent.append(request.trace_id)
        if request.trace_id == "tr-odd":
            raise TypeError("the client cannot send this")

    outbox = FeedbackOutbox(tmp_path / "box.db", send=send)
    for trace_id in ("tr-1", "tr-2", "tr-3", "tr-odd", "tr-good"):
        outbox.keep(request(trace_id))
    with sqlite3.connect(tmp_path / "box.db") as database:
        for number, body in enumerate(("{not json", "[]", '{"trace_id": 1}'), 1):
            where = f"%tr-{number}%"
            database.execute("UPDATE feedback SET body = ? WHERE subject LIKE ?", [body, where])
    assert outbox.replay() == (1, 4, 0)
    assert sent == ["tr-odd", "tr-good"]
    told = [body for body, _ in outbox.rejected()]
    assert {"unreadable": "{not json"} in told and outbox.status().rejected == 4


def test_what_cannot_be_kept_or_sent_is_refused_at_once() -> None:
    wrong: list[dict[str, Any]] = [
        {"given_at_ms": "now"},
        {"metadata": {"category": 5}},
        {"metadata": {"category": "\ud800"}},
        {"metadata": {"\ud800": "x"}},
    ]
    for fields in wrong:
        with pytest.raises(FeedbackValidationError, match=r"metadata|given_at_ms"):
            replace(request("tr-1"), **fields)


def test_what_the_outbox_takes_is_public_too() -> None:
    assert quality_monitoring.FeedbackRequest is FeedbackRequest
    assert quality_monitoring.send_feedback is send_feedback


def test_a_crash_after_sending_does_not_duplicate(store: str, ask: Any, tmp_path: Path) -> None:
    (trace_id,) = ask()
    pending = request(trace_id)
    outbox = FeedbackOutbox(tmp_path / "box.db")
    outbox.keep(pending)
    send_feedback(pending)  # 届いたが、届いたと書く前に落ちた
    assert outbox.replay().sent == 1
    assert len(stored(trace_id)) == 1


def test_two_replays_do_not_send_the_same_vote(tmp_path: Path) -> None:
    arrived, answer, sent = threading.Event(), threading.Event(), list[str]()

    def slow(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
        sent.append(request.trace_id)
        arrived.set()
        assert answer.wait(30)

    box = tmp_path / "box.db"
    FeedbackOutbox(box).keep(request("tr-1"))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(FeedbackOutbox(box, send=slow).replay)
        assert arrived.wait(30)
        assert FeedbackOutbox(box, send=slow).replay().sent == 0  # 別のプロセスにあたる
        answer.set()
        assert first.result().sent == 1
    assert sent == ["tr-1"] and len(FeedbackOutbox(box)) == 0


def test_a_claim_of_a_crashed_process_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = tmp_path / "box.db"
    FeedbackOutbox(box).keep(request("tr-1"))

    def crash(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeedbackOutbox(box, send=crash).replay()
    fine = FeedbackOutbox(box, send=lambda request, timeout_seconds: None)
    assert fine.replay().sent == 0
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 61)
    assert fine.replay().sent == 1


def test_an_old_vote_from_the_outbox_does_not_replace_a_newer_one(
    store: str, ask: Any, tmp_path: Path
) -> None:
    (trace_id,) = ask()
    newer = request(trace_id, value=False)
    older = replace(request(trace_id), given_at_ms=newer.given_at_ms - 1)
    outbox = FeedbackOutbox(tmp_path / "box.db")
    outbox.keep(older)
    send_feedback(newer)
    report = outbox.replay()
    assert (report.sent, report.rejected, report.remaining) == (0, 1, 0)  # 送ったとは言わない
    assert "newer vote" in outbox.rejected()[0][1]
    assert [vote.value for vote in stored(trace_id)] == [False]


def test_replay_stops_while_the_server_is_down(tmp_path: Path) -> None:
    tried: list[str] = []

    def down(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
        tried.append(request.trace_id)
        offline(request, timeout_seconds=timeout_seconds)

    outbox = FeedbackOutbox(tmp_path / "box.db", send=down)
    for i in range(10):
        outbox.keep(request(f"tr-{i}"))
    assert outbox.replay().remaining == 10
    assert len(tried) == 3
    outbox.replay()
    assert len(set(tried)) == 6  # 次は、続きから


def test_rejected_feedback_is_set_aside_and_told(tmp_path: Path) -> None:
    outbox = FeedbackOutbox(tmp_path / "box.db", send=refuse)
    with pytest.raises(FeedbackError):
        outbox.submit(request("tr-1"))
    outbox.keep(request("tr-2"))
    report = outbox.replay()
    assert (report.rejected, report.remaining) == (1, 0)
    ((body, reason),) = outbox.rejected()
    assert (FeedbackRequest(**body).trace_id, reason) == ("tr-2", "not allowed")
    outbox.clear_rejected()
    assert outbox.status() == OutboxStatus(0, 0)


def test_a_refusal_that_is_not_about_the_vote_sets_nothing_aside(
    tmp_path: Path, webhooks: Any
) -> None:
    """パスワードが変わった、権限が外れた、MLflow の再起動中にプロキシーが 404 を返した。"""
    mlflow.set_tracking_uri(webhooks.url.rstrip("/"))
    outbox = FeedbackOutbox(tmp_path / "box.db")
    for answers in ([401], [404, 404]):  # MLflow は、404 なら古い API も試す
        webhooks.script(*answers)
        assert outbox.submit(request("tr-1")) is None, answers
    for answers in ([401, 401], [404] * 4, [403, 403]):
        webhooks.script(*answers)
        assert outbox.replay() == (0, 0, 2), answers
    webhooks.script(403, 403)  # これだけは、評価のせいのこともある
    assert FeedbackOutbox(tmp_path / "box.db", expire_hours=0).replay() == (0, 2, 0)


def test_a_vote_kept_while_the_clock_was_ahead_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, now = FeedbackOutbox(tmp_path / "box.db", send=lambda *_, **__: None), time.time
    with monkeypatch.context() as ahead:
        ahead.setattr(time, "time", lambda: now() + 86_400)
        outbox.keep(request("tr-1"))
    assert outbox.replay() == (1, 0, 0)


def test_the_same_feedback_id_on_two_traces_stops_nothing(
    store: str, ask: Any, tmp_path: Path
) -> None:
    first, second, *good = ask(6)
    outbox = FeedbackOutbox(tmp_path / "box.db")
    send_feedback(replace(request(first), feedback_id=f"click {store}"))
    outbox.keep(replace(request(second), feedback_id=f"click {store}"))
    for trace_id in good:
        outbox.keep(request(trace_id))
    report = outbox.replay()
    assert (report.sent, report.remaining) == (5, 0)
    assert [len(stored(i)) for i in (first, second, *good)] == [1] * 6


def test_unknown_traces_wait_behind_the_rest_and_expire(
    store: str, ask: Any, tmp_path: Path
) -> None:
    tried: list[float] = []

    def counted(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
        tried.append(timeout_seconds)
        return store_feedback(request, timeout_seconds=timeout_seconds)

    (trace_id,) = ask()
    outbox = FeedbackOutbox(tmp_path / "box.db", send=counted)
    for i in range(20):
        outbox.keep(request(f"tr-{i:032x}"))
    outbox.keep(request(trace_id))
    report = outbox.replay()
    assert (report.sent, report.rejected, report.remaining) == (1, 0, 20)
    assert len(tried) == 21 and max(tried) <= 5  # 1 件ずつ 1 回だけ
    late = FeedbackOutbox(tmp_path / "box.db", expire_hours=0)
    assert (late.replay().rejected, late.replay().rejected) == (20, 0)
    assert all("is not stored" in reason for _, reason in late.rejected())
    assert late.status() == OutboxStatus(0, 20)


def test_replay_ends_at_its_deadline(tmp_path: Path) -> None:
    clock = threading.Event()

    def absent(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
        clock.wait(0.05)
        raise TraceNotFoundError("not yet", request)

    outbox = FeedbackOutbox(tmp_path / "box.db", send=absent)
    for i in range(100):
        outbox.keep(request(f"tr-{i}"))
    assert outbox.replay(timeout_seconds=0.2).remaining == 100
    with sqlite3.connect(tmp_path / "box.db") as database:
        query = "SELECT count(*) FROM feedback WHERE retry_at = kept_at"
        assert database.execute(query).fetchone()[0] > 90


def test_a_healthy_send_needs_no_disk(store: str, ask: Any, tmp_path: Path) -> None:
    (trace_id,) = ask()
    (tmp_path / "file").write_text("")
    outbox = FeedbackOutbox(tmp_path / "file" / "box.db")  # 作れない場所
    assert outbox.submit(request(trace_id)) is not None
    assert len(stored(trace_id)) == 1
    assert outbox.status().error is not None
    with pytest.raises(OSError):  # 届かず、残せもしない。「記録した」とは言わない
        FeedbackOutbox(tmp_path / "file" / "box.db", send=offline).submit(request("tr-1"))


def test_a_disk_that_fills_up_is_told_and_refuses_no_healthy_vote(
    store: str, ask: Any, tmp_path: Path
) -> None:
    resource = pytest.importorskip("resource", reason="Windows cannot limit the size of a file")
    (trace_id,), outbox = ask(), FeedbackOutbox(tmp_path / "box.db")
    outbox.keep(request("tr-1"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sent: list[str] = []

    def healthy(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
        sent.append(request.trace_id)

    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # 何も書き足せない
        status = outbox.status()
        FeedbackOutbox(tmp_path / "box.db", send=healthy).submit(request(trace_id))
        with pytest.raises(OSError, match="cannot be used"):
            outbox.keep(request("tr-2"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status.pending, status.rejected, sent) == (1, 0, [trace_id])
    assert "cannot be used" in str(status.error)
    assert outbox.status() == OutboxStatus(1, 0)


def test_a_withdrawal_reaches_what_still_waits(store: str, ask: Any, tmp_path: Path) -> None:
    (trace_id,) = ask()
    outbox = FeedbackOutbox(tmp_path / "box.db")
    outbox.keep(request(trace_id))
    outbox.keep(request(trace_id, "other"))
    assert not withdraw_feedback(trace_id, "u", deliver=outbox.submit)
    assert outbox.replay().sent == 1
    assert summarize_feedback("quality").by_user.keys() == {"other"}


WRITER = """
import sys, time
from chapter8_samples.quality_monitoring import FeedbackOutbox, FeedbackRequest
box, uri, users, *traces = sys.argv[1:]
import mlflow
mlflow.set_tracking_uri(uri)
outbox = FeedbackOutbox(box)
for trace in traces:
    for user in users.split(","):
        vote = FeedbackRequest(trace, "user_thumbs", True, user)
        if outbox.submit(vote, timeout_seconds=0.3) is None:
            print("kept", flush=True)
for _ in range(120):
    outbox.replay(timeout_seconds=10)
    if not len(outbox):
        break
    time.sleep(0.5)  # cron の代わり。サーバーが戻るまで待つ
print("done", len(outbox))
"""


@pytest.mark.slow
def test_500_votes_of_two_processes_survive_a_server_restart(tmp_path: Path) -> None:
    """1 つの送信箱を使う 2 つのプロセスが 250 件ずつ送る途中で、サーバーが落ちて戻る。"""
    port = free_port()
    server = MlflowServer(tmp_path / "server", port=port).start()
    writers: list[subprocess.Popen[str]] = []
    try:
        mlflow.set_tracking_uri(server.url)
        mlflow.set_experiment("restart")
        traces: list[str] = []
        for _ in range(50):
            with mlflow.start_span("answer") as span:
                traces.append(span.trace_id)
        mlflow.flush_trace_async_logging()
        for group in (range(5), range(5, 10)):
            users = ",".join(f"user-{i}" for i in group)
            words = [sys.executable, "-c", WRITER, tmp_path / "box.db", server.url, users, *traces]
            environment = {**os.environ, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
            writers.append(
                subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
            )
        for writer in writers:
            assert writer.stdout is not None
            server.stop()
            assert writer.stdout.readline() == "kept\n"
        server = MlflowServer(tmp_path / "server", port=port).start()
        for writer in writers:
            out, _ = writer.communicate(timeout=200)
            assert out.endswith("done 0\n"), out[-300:]
        for trace_id in traces:
            found = TracingClient().get_trace_info(trace_id).assessments
            assert sorted(str(a.source.source_id) for a in found) == sorted(
                f"user-{i}" for i in range(10)
            )
    finally:
        for writer in writers:
            writer.kill()
        server.stop()
