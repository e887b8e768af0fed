"""HTTP で受け取ったフィードバック: 同じ検査、失わない、画面のボタンからトレースまで届く。"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from mlflow.tracing.client import TracingClient
from ports import free_port

from chapter8_samples.quality_monitoring import FeedbackOutbox, create_feedback_router


def client(**options: Any) -> TestClient:
    def user_of(request: Request) -> str:
        return request.headers.get("x-user", "u-1")

    app = FastAPI()
    app.include_router(create_feedback_router(user_of, **options))
    return TestClient(app)


def stored(trace_id: str) -> dict[str, Any]:
    found = TracingClient().get_trace_info(trace_id).assessments
    values = {a.name: a.feedback.value for a in found if a.feedback and a.valid is not False}
    return values | {a.name: a.expectation.value for a in found if a.expectation}


def server_down() -> None:
    mlflow.set_tracking_uri(f"http://127.0.0.1:{free_port()}")
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"


def test_every_kind_is_stored_under_the_user_of_the_app(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    bodies: list[dict[str, Any]] = [
        {"is_positive": False, "comment": "長い"},
        {"type": "rating", "rating": 4},
        {"type": "comment", "comment": "送料も知りたい", "category": "content"},
        {"type": "issue", "issue_type": "incomplete", "description": "送料がない"},
        {"type": "correction", "expected_response": "30 日以内です。"},
    ]
    app = client()
    for body in bodies:
        answer = app.post("/feedback", json={"trace_id": trace_id, "user_id": "x", **body})
        assert (answer.status_code, answer.json()) == (200, {"stored": True}), answer.text
    assert stored(trace_id) == {
        "user_thumbs": False,
        "user_rating": 4,
        "user_comment": "送料も知りたい",
        "user_issue": "incomplete",
        "expected_response": "30 日以内です。",
    }
    users = {a.source.source_id for a in TracingClient().get_trace_info(trace_id).assessments}
    assert users == {"u-1"}  # 本文の user_id は使わない


def test_bad_input_is_422_with_the_reason() -> None:
    bodies: list[tuple[dict[str, Any], str]] = [
        ({"trace_id": "", "is_positive": True}, "trace_id must be"),
        ({"trace_id": None, "is_positive": True}, "trace_id must be"),
        ({"trace_id": "MLFLOW_NO_OP_SPAN_TRACE_ID", "is_positive": True}, "not sampled"),
        ({"trace_id": "x/../tr-1", "is_positive": True}, "trace_id must be an id"),
        ({"trace_id": "tr-1"}, "is_positive must be a bool"),
        ({"trace_id": "tr-1", "is_positive": "true"}, "is_positive must be a bool"),
        ({"trace_id": "tr-1", "type": "rating", "rating": True}, "rating must be a number"),
        ({"trace_id": "tr-1", "type": "rating", "rating": 99}, "between 1 and 5, got 99"),
        ({"trace_id": "tr-1", "type": "rating", "rating": 10**400}, "between 1 and 5"),
        ({"trace_id": "tr-1", "type": "comment", "comment": " "}, "comment must be"),
        ({"trace_id": "tr-\ud800", "is_positive": True}, "trace_id has a character"),
        ({"trace_id": "tr-1", "is_positive": True, "comment": "a\x00"}, "has a character"),
        ({"trace_id": "tr-1", "type": "comment", "comment": "x" * 10_001}, "10000"),
        ({"trace_id": "tr-1", "type": "issue", "issue_type": "bad"}, "issue_type must be one of"),
        ({"trace_id": "tr-1", "type": "unknown"}, "literal_error"),
        ({"is_positive": True}, "missing"),
    ]
    app, headers = client(timeout_seconds=0.1), {"Content-Type": "application/json"}
    for body, message in bodies:
        answer = app.post("/feedback", content=json.dumps(body), headers=headers)
        assert answer.status_code == 422 and message in answer.text, body


@pytest.mark.slow
def test_undeliverable_feedback_is_kept_and_sent_later(
    store: str, ask: Any, tmp_path: Path
) -> None:
    (trace_id,), uri = ask(), mlflow.get_tracking_uri()
    outbox = FeedbackOutbox(tmp_path / "box.jsonl")
    app = client(outbox=outbox, timeout_seconds=0.3, max_pending=1)
    body = {"trace_id": trace_id, "is_positive": True, "feedback_id": f"click-1 {trace_id}"}
    server_down()
    answer = app.post("/feedback", json=body)
    assert (answer.status_code, answer.json(), len(outbox)) == (202, {"stored": False}, 1)
    full = app.post("/feedback", json={**body, "feedback_id": f"click-2 {trace_id}"})
    assert (full.status_code, full.headers["retry-after"], len(outbox)) == (503, "30", 1)
    mlflow.set_tracking_uri(uri)
    assert outbox.replay().sent == 1
    app = client(outbox=outbox, timeout_seconds=30)
    assert app.post("/feedback", json=body).status_code == 200  # 画面が同じものを送り直した
    assert len(TracingClient().get_trace_info(trace_id).assessments) == 1


@pytest.mark.slow
def test_without_an_outbox_the_page_must_send_again(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    server_down()
    answer = client(timeout_seconds=0.3).post(
        "/feedback", json={"trace_id": trace_id, "is_positive": True}
    )
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
    assert "127.0.0.1" not in answer.text  # 接続先を画面に見せない


@pytest.mark.slow
def test_one_unknown_trace_does_not_block_the_rest(store: str, ask: Any, tmp_path: Path) -> None:
    (trace_id,), uri = ask(), mlflow.get_tracking_uri()
    outbox = FeedbackOutbox(tmp_path / "box.jsonl")
    app = client(outbox=outbox, timeout_seconds=0.2)
    server_down()
    for wanted in ("tr-" + "0" * 32, trace_id):
        app.post("/feedback", json={"trace_id": wanted, "is_positive": True})
    mlflow.set_tracking_uri(uri)
    report = outbox.replay(timeout_seconds=0.5)
    assert (report.sent, report.remaining) == (1, 1)
    assert stored(trace_id) == {"user_thumbs": True}


@pytest.mark.slow
def test_a_line_cut_by_a_crash_does_not_swallow_the_next(store: str, tmp_path: Path) -> None:
    box = tmp_path / "box.jsonl"
    box.write_text('{"add": {"trace', encoding="utf-8")
    server_down()
    app = client(outbox=FeedbackOutbox(box), timeout_seconds=0.2)
    app.post("/feedback", json={"trace_id": "tr-1", "is_positive": True})
    assert len(FeedbackOutbox(box)) == 1
