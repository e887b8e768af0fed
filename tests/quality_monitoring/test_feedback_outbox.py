"""届かなかったフィードバックは、アプリが落ちても残り、1 回だけ届く。"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracing.client import TracingClient

from chapter8_samples import quality_monitoring
from chapter8_samples.quality_monitoring import (
    FeedbackDeliveryError,
    FeedbackError,
    FeedbackOutbox,
    FeedbackRequest,
    send_feedback,
)


def request(trace_id: str, user_id: str = "u") -> FeedbackRequest:
    return FeedbackRequest(trace_id=trace_id, name="user_thumbs", value=True, user_id=user_id)


def offline(request: FeedbackRequest, *, timeout_seconds: float):  # type: ignore[no-untyped-def]
    raise FeedbackDeliveryError("server is down", request)


def stored(trace_id: str) -> int:
    return len(TracingClient().get_trace_info(trace_id).assessments)


def test_delivered_feedback_leaves_nothing_behind(store: str, ask: Any, tmp_path: Path) -> None:
    (trace_id,) = ask()
    outbox = FeedbackOutbox(tmp_path / "out" / "box.jsonl")
    assert outbox.submit(request(trace_id)) is not None
    assert len(outbox) == len(FeedbackOutbox(tmp_path / "out" / "box.jsonl")) == 0


def test_a_restarted_app_sends_the_rest_once(store: str, ask: Any, tmp_path: Path) -> None:
    ids = ask(3)
    box = tmp_path / "box.jsonl"
    down = FeedbackOutbox(box, send=offline)
    assert [down.submit(request(i)) for i in ids] == [None] * 3
    with box.open("a", encoding="utf-8") as file:
        file.write('{"add": {"trace')  # 書きかけで落ちた
    restarted = FeedbackOutbox(box)
    assert len(restarted) == 3
    report = restarted.replay()
    assert (report.sent, report.remaining) == (3, 0)
    assert restarted.replay().sent == 0
    assert [stored(i) for i in ids] == [1, 1, 1]
    assert box.read_text() == ""


def test_any_text_and_any_torn_line_survive_a_restart(tmp_path: Path) -> None:
    box = tmp_path / "box.jsonl"
    votes = [
        replace(request(f"tr-{i}"), rationale=text)
        for i, text in enumerate(["行区切り\u2028の後", "次の行\x85の後", "絵文字\U0001f600"])
    ]
    down = FeedbackOutbox(str(box), send=offline)
    for vote in votes:
        down.submit(vote)
    whole = box.read_bytes()
    for cut in range(len(whole) - 40, len(whole)):  # どこで電源が落ちても、前の 2 件は残る
        box.write_bytes(whole[:cut])
        assert len(FeedbackOutbox(box, send=offline)) >= 2
    box.write_bytes(whole)
    kept: list[str | None] = []

    def deliver(request: FeedbackRequest, *, timeout_seconds: float):  # type: ignore[no-untyped-def]
        kept.append(request.rationale)

    FeedbackOutbox(box, send=deliver).replay()  # type: ignore[arg-type]
    assert kept == [vote.rationale for vote in votes]


@pytest.mark.parametrize("torn", [b"\xff\xfe\n", '{"add": "送'.encode()[:-1], b"\x00" * 64])
def test_bytes_no_text_can_hold_do_not_stop_the_app(tmp_path: Path, torn: bytes) -> None:
    box = tmp_path / "box.jsonl"
    FeedbackOutbox(box, send=offline).submit(request("tr-1"))
    box.write_bytes(box.read_bytes() + torn)
    assert len(FeedbackOutbox(box, send=offline)) == 1
    assert len(FeedbackOutbox(box, send=offline)) == 1  # 読めない行は、もう取り除いてある
    assert (tmp_path / "box.rejected").exists()


def test_boxes_with_similar_names_do_not_share_files(tmp_path: Path) -> None:
    def refuse(request: FeedbackRequest, *, timeout_seconds: float):  # type: ignore[no-untyped-def]
        raise FeedbackError("not allowed")

    boxes = [tmp_path / name for name in ("box.1", "box.2", "box.jsonl.3", "box.jsonl")]
    for i, box in enumerate(boxes):
        FeedbackOutbox(box, send=offline).submit(request(f"tr-{i}"))
        FeedbackOutbox(box, send=refuse).replay()
    rejected = sorted(file.name for file in tmp_path.glob("*.rejected"))
    assert rejected == ["box.1.rejected", "box.2.rejected", "box.jsonl.3.rejected", "box.rejected"]


def test_a_cleanup_never_brings_delivered_feedback_back(tmp_path: Path) -> None:
    """届いたと書いた直後に、別のスレッドの再送の片付けが入る。"""

    class Interleaved:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()
            if '"done"' in box.read_text(encoding="utf-8"):
                outbox._compact()  # pyright: ignore[reportPrivateUsage]

    box = tmp_path / "box.jsonl"
    box.touch()
    outbox = FeedbackOutbox(box, send=lambda request, **_: None)  # type: ignore[arg-type]
    outbox._lock = Interleaved()  # type: ignore[assignment]
    outbox.submit(request("tr-1"))
    assert len(FeedbackOutbox(box, send=offline)) == 0


def test_a_line_of_another_version_is_set_aside(tmp_path: Path) -> None:
    box = tmp_path / "box.jsonl"
    FeedbackOutbox(box, send=offline).submit(request("tr-1"))
    with box.open("a", encoding="utf-8") as file:
        file.write('{"add": {"trace_id": "tr-2", "stars": 5}}\n')
    assert len(FeedbackOutbox(box, send=offline)) == 1
    assert "tr-2" in (tmp_path / "box.rejected").read_text()


def test_what_the_outbox_takes_is_public_too() -> None:
    assert quality_monitoring.FeedbackRequest is FeedbackRequest
    assert quality_monitoring.send_feedback is send_feedback


def test_a_crash_after_sending_does_not_duplicate(store: str, ask: Any, tmp_path: Path) -> None:
    (trace_id,) = ask()
    box = tmp_path / "box.jsonl"
    pending = request(trace_id)
    FeedbackOutbox(box, send=offline).submit(pending)
    send_feedback(pending)  # 届いたが、届いたと書く前に落ちた
    assert FeedbackOutbox(box).replay().sent == 1
    assert stored(trace_id) == 1


def test_a_vote_on_its_way_is_not_sent_by_a_replay_too(tmp_path: Path) -> None:
    arrived, answer, sent = threading.Event(), threading.Event(), list[str]()

    def slow(request: FeedbackRequest, *, timeout_seconds: float) -> Any:
        sent.append(request.trace_id)
        arrived.set()
        assert answer.wait(30)

    box = tmp_path / "box.jsonl"
    FeedbackOutbox(box, send=offline).submit(request("tr-1"))
    outbox = FeedbackOutbox(box, send=slow)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(outbox.replay)
        assert arrived.wait(30)
        arrived.clear()
        second = pool.submit(outbox.submit, request("tr-2"))
        assert arrived.wait(30)
        assert outbox.replay().sent == 0
        answer.set()
        assert first.result().sent == 1
        second.result()
    assert sorted(sent) == ["tr-1", "tr-2"]
    assert len(outbox) == len(FeedbackOutbox(box)) == 0


def test_an_old_vote_from_the_outbox_does_not_replace_a_newer_one(
    store: str, ask: Any, tmp_path: Path
) -> None:
    (trace_id,) = ask()
    box = tmp_path / "box.jsonl"
    newer = replace(request(trace_id), value=False)
    older = replace(request(trace_id), given_at_ms=newer.given_at_ms - 1)
    FeedbackOutbox(box, send=offline).submit(older)
    send_feedback(newer)
    assert FeedbackOutbox(box).replay().remaining == 0
    (vote,) = TracingClient().get_trace_info(trace_id).assessments
    assert vote.feedback is not None and vote.feedback.value is False


def test_replay_stops_while_the_server_is_down(store: str, ask: Any, tmp_path: Path) -> None:
    outbox = FeedbackOutbox(tmp_path / "box.jsonl", send=offline)
    for i in ask(2):
        outbox.submit(request(i))
    assert outbox.replay().remaining == 2


def test_rejected_feedback_is_set_aside_and_told(tmp_path: Path) -> None:
    def refuse(request: FeedbackRequest, *, timeout_seconds: float):  # type: ignore[no-untyped-def]
        raise FeedbackError("not allowed")

    box = tmp_path / "box.jsonl"
    with pytest.raises(FeedbackError):
        FeedbackOutbox(box, send=refuse).submit(request("tr-1"))
    FeedbackOutbox(box, send=offline).submit(request("tr-2"))
    report = FeedbackOutbox(box, send=refuse).replay()
    assert (report.rejected, report.remaining) == (1, 0)
    assert "tr-2" in (tmp_path / "box.rejected").read_text()
