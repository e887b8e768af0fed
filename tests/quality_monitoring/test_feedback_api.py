"""HTTP で受け取ったフィードバック: 同じ検査、失わない、画面のボタンからトレースまで届く。"""

from __future__ import annotations

import asyncio
import json
import os
import textwrap
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import mlflow
import pytest
from fastapi import FastAPI, HTTPException, Request
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Trace
from mlflow.tracing.client import TracingClient
from ports import free_port

from chapter8_samples.quality_monitoring import (
    FeedbackOutbox,
    create_feedback_router,
    log_thumbs_feedback,
    summarize_feedback,
)
from chapter8_samples.quality_monitoring._internals import current_experiment_id
from chapter8_samples.quality_monitoring.feedback import router as feedback_router

UNKNOWN = "tr-" + "0" * 32
JSON = {"Content-Type": "application/json"}


def client(**options: Any) -> TestClient:
    return TestClient(app_with(**options), raise_server_exceptions=False)


def app_with(**options: Any) -> FastAPI:
    def user_of(request: Request) -> str:
        return request.headers.get("x-user", "u-1")

    app = FastAPI()
    app.include_router(create_feedback_router(user_of, **options))
    return app


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
        ({"trace_id": "tr-\ud800", "is_positive": True}, "Invalid JSON"),
        ({"trace_id": "tr-1", "is_positive": True, "comment": "a\x00"}, "has a character"),
        ({"trace_id": "tr-1", "type": "comment", "comment": "x" * 10_001}, "10000"),
        ({"trace_id": "tr-1", "type": "issue", "issue_type": "bad"}, "issue_type must be one of"),
        ({"trace_id": "tr-1", "type": "unknown"}, "literal_error"),
        ({"is_positive": True}, "missing"),
    ]
    app = client(timeout_seconds=0.1)
    for body, message in bodies:
        answer = app.post("/feedback", content=json.dumps(body), headers=JSON)
        assert answer.status_code == 422 and message in answer.text, body


@pytest.mark.slow
def test_undeliverable_feedback_is_kept_and_sent_later(
    store: str, ask: Any, tmp_path: Path
) -> None:
    (trace_id,), uri = ask(), mlflow.get_tracking_uri()
    outbox = FeedbackOutbox(tmp_path / "box.db")
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
    outbox = FeedbackOutbox(tmp_path / "box.db")
    app = client(outbox=outbox, timeout_seconds=0.2)
    server_down()
    for wanted in (UNKNOWN, trace_id):
        app.post("/feedback", json={"trace_id": wanted, "is_positive": True})
    mlflow.set_tracking_uri(uri)
    report = outbox.replay(timeout_seconds=0.5)
    assert (report.sent, report.remaining) == (1, 1)
    assert stored(trace_id) == {"user_thumbs": True}


def test_the_key_of_a_vote_covers_trace_user_name_and_content(store: str, ask: Any) -> None:
    first, second = ask(2)
    votes: list[tuple[str, dict[str, Any]]] = [
        ("u-1", {"trace_id": first, "is_positive": True}),
        ("u-1", {"trace_id": second, "is_positive": True}),  # 同じ ID が、別のトレースにも
        ("u-2", {"trace_id": first, "is_positive": True}),  # 別の人
        ("u-1", {"trace_id": first, "type": "rating", "rating": 2}),  # 別の種類
        ("u-1", {"trace_id": first, "type": "comment", "comment": "長い"}),
        ("u-1", {"trace_id": first, "type": "comment", "comment": "やはり、よい"}),  # 書き直し
        ("u-1", {"trace_id": first, "is_positive": False}),  # 考え直した
        ("u-1", {"trace_id": first, "is_positive": False}),  # 通信のやり直し
        ("u-1", {"trace_id": first, "is_positive": True}),  # また考え直した
        ("u-1", {"trace_id": first, "is_positive": False}),
    ]
    app = client()
    for user, body in votes:
        answer = app.post("/feedback", json={**body, "feedback_id": "f"}, headers={"x-user": user})
        assert (answer.status_code, answer.json()) == (200, {"stored": True}), body
    found = TracingClient().get_trace_info(first).assessments
    valid = [(a.source.source_id, a.name, a.feedback.value) for a in found if a.valid is not False]
    assert sorted(valid, key=str) == [
        ("u-1", "user_comment", "やはり、よい"),
        ("u-1", "user_rating", 2),
        ("u-1", "user_thumbs", False),
        ("u-2", "user_thumbs", True),
    ]
    assert sum(a.name == "user_thumbs" for a in found) == 5  # やり直しの 1 件は増えない
    assert stored(second) == {"user_thumbs": True}


def test_a_late_retry_does_not_bring_the_old_vote_back(store: str, ask: Any) -> None:
    (trace_id,), app = ask(), client()
    old = {"trace_id": trace_id, "is_positive": True, "feedback_id": "old"}
    new = {"trace_id": trace_id, "is_positive": False, "feedback_id": "new"}
    for body in (old, new, old):
        assert app.post("/feedback", json=body).status_code == 200
    assert stored(trace_id) == {"user_thumbs": False}


def test_what_is_dropped_is_never_called_stored(
    store: str, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trace_id,) = ask()
    log_thumbs_feedback(trace_id, True, "u-1")
    now = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: now() - 60 * 10**9)  # 時計の遅れたサーバー
    answer = client().post("/feedback", json={"trace_id": trace_id, "is_positive": False})
    assert answer.status_code == 409 and "stored" not in answer.json()
    assert stored(trace_id) == {"user_thumbs": True}


def test_a_queue_full_of_invented_ids_does_not_refuse_a_good_vote(
    store: str, ask: Any, tmp_path: Path
) -> None:
    (trace_id,), outbox = ask(), FeedbackOutbox(tmp_path / "box.db")
    app = client(outbox=outbox, timeout_seconds=0.05, max_pending=3)
    for i in range(5):
        answer = app.post("/feedback", json={"trace_id": f"tr-{i:032x}", "is_positive": True})
        assert answer.status_code == (202 if i < 3 else 503)
    app = client(outbox=outbox, max_pending=3)
    answer = app.post("/feedback", json={"trace_id": trace_id, "is_positive": True})
    assert answer.json() == {"stored": True} and stored(trace_id) == {"user_thumbs": True}


def test_a_broken_disk_does_not_refuse_a_good_vote(store: str, ask: Any, tmp_path: Path) -> None:
    (trace_id,) = ask()
    (tmp_path / "file").write_text("")
    outbox = FeedbackOutbox(tmp_path / "file" / "box.db")
    answer = client(outbox=outbox).post(
        "/feedback", json={"trace_id": trace_id, "is_positive": True}
    )
    assert answer.json() == {"stored": True} and stored(trace_id) == {"user_thumbs": True}
    assert outbox.status().pending is None and outbox.status().error
    answer = client(outbox=outbox, timeout_seconds=0.1).post(
        "/feedback", json={"trace_id": UNKNOWN, "is_positive": True}
    )
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")


def test_only_true_authorizes(store: str, ask: Any) -> None:
    (trace_id,) = ask()

    async def deny(*_: Any) -> bool:
        return False

    with pytest.raises(TypeError, match=r"deny.*is async: pass a plain function"):
        client(authorize=deny)
    for answer in (lambda *_: "no", lambda *_: object(), lambda *_: None):
        app = client(authorize=answer)
        assert (
            app.post("/feedback", json={"trace_id": trace_id, "is_positive": True}).status_code
            == 403
        )
    assert stored(trace_id) == {}


BODIES: list[dict[str, Any]] = [
    {"type": "correction", "expected_response": "嘘の正解"},
    {"type": "thumbs", "is_positive": True},
    {"type": "rating", "rating": 1},
    {"type": "comment", "comment": "x"},
    {"type": "issue", "issue_type": "slow", "description": "x"},
]


def test_traces_of_another_experiment_are_refused(store: str, ask: Any, tmp_path: Path) -> None:
    (foreign,), outbox = ask(), FeedbackOutbox(tmp_path / "box.db")
    mlflow.set_experiment(f"mine of {store}")
    (mine,), app = ask(), client(outbox=outbox)
    for body in BODIES:
        assert app.post("/feedback", json={"trace_id": foreign, **body}).status_code == 403
        assert app.post("/feedback", json={"trace_id": mine, **body}).status_code == 200
    assert app.delete("/feedback", params={"trace_id": foreign}).status_code == 403
    assert stored(foreign) == {} and len(outbox) == 0


def test_a_kept_vote_is_checked_when_its_trace_appears(
    store: str, ask: Any, tmp_path: Path
) -> None:
    outbox, (foreign,), uri = FeedbackOutbox(tmp_path / "box.db"), ask(), mlflow.get_tracking_uri()
    mlflow.set_experiment(f"mine of {store}")
    app = client(outbox=outbox, timeout_seconds=0.1)
    server_down()
    answer = app.post("/feedback", json={"trace_id": foreign, **BODIES[0]})
    assert answer.status_code == 202
    mlflow.set_tracking_uri(uri)
    assert outbox.replay().rejected == 1 and stored(foreign) == {}


def test_before_the_app_has_its_experiment_the_page_must_send_again(
    store: str, ask: Any, tmp_path: Path
) -> None:
    """MLflow が止まっている間に起動した。"0" のトレースへの評価として残すと、後で捨てられる。"""
    (trace_id,), outbox = ask(), FeedbackOutbox(tmp_path / "box.db")
    app = client(outbox=outbox, timeout_seconds=0.1)
    mlflow.tracking.fluent._active_experiment_id = None
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    mlflow.tracing.disable()
    answer = app.post("/feedback", json={"trace_id": trace_id, "is_positive": True})
    assert (answer.status_code, len(outbox)) == (503, 0)
    mlflow.tracing.enable()
    mlflow.set_experiment(experiment_id=store)
    answer = app.post("/feedback", json={"trace_id": trace_id, "is_positive": True})
    assert answer.status_code == 200


def test_the_app_decides_who_may_vote_on_which_trace(store: str, ask: Any, tmp_path: Path) -> None:
    (trace_id,), outbox = ask(), FeedbackOutbox(tmp_path / "box.db")

    def authorize(request: Request, trace: Trace) -> bool:
        if "x-user" not in request.headers:
            raise HTTPException(401, "log in first")
        return trace.info.experiment_id == store and request.headers["x-user"] == "owner"

    app = client(authorize=authorize, outbox=outbox, timeout_seconds=0.1)
    wide = client(authorize=authorize)
    body = {"trace_id": trace_id, "is_positive": True}
    assert wide.post("/feedback", json=body).status_code == 401
    assert wide.post("/feedback", json=body, headers={"x-user": "thief"}).status_code == 403
    assert wide.post("/feedback", json=body, headers={"x-user": "owner"}).status_code == 200
    # 確かめられないものは残さない
    unknown = app.post("/feedback", json={**body, "trace_id": UNKNOWN}, headers={"x-user": "owner"})
    assert (unknown.status_code, len(outbox)) == (503, 0)


def test_the_owner_may_vote_while_the_trace_is_stored_only_in_part(store: str) -> None:
    """OTLP と二重に送ると、スパンがトレースのメタデータより先に届く。"""
    with mlflow.start_span("answer") as span:
        mlflow.update_current_trace(metadata={"mlflow.trace.user": "owner"})
    whole = mlflow.get_trace(span.trace_id)
    assert whole is not None
    MlflowClient().delete_traces(store, trace_ids=[span.trace_id])
    writing: Any = TracingClient().store
    writing.log_spans(store, whole.data.spans)

    def authorize(request: Request, trace: Trace) -> bool:
        return trace.info.trace_metadata.get("mlflow.trace.user") == request.headers["x-user"]

    body = {"trace_id": span.trace_id, "is_positive": True}
    hurried = client(authorize=authorize, timeout_seconds=0.1)
    assert hurried.post("/feedback", json=body, headers={"x-user": "owner"}).status_code == 503
    later = threading.Timer(0.5, writing.start_trace, [whole.info])
    later.start()
    app = client(authorize=authorize, timeout_seconds=30)
    assert app.post("/feedback", json=body, headers={"x-user": "owner"}).status_code == 200
    later.join()
    assert app.post("/feedback", json=body, headers={"x-user": "thief"}).status_code == 403


def test_the_experiment_of_the_app_is_the_one_it_chose(store: str) -> None:
    assert current_experiment_id() == store  # 公開されていない関数の契約
    os.environ["MLFLOW_EXPERIMENT_ID"] = "77"
    assert current_experiment_id() == store
    mlflow.tracking.fluent._active_experiment_id = None
    os.environ["MLFLOW_EXPERIMENT_ID"] = store
    assert current_experiment_id() == store
    del os.environ["MLFLOW_EXPERIMENT_ID"]
    assert current_experiment_id() == "0"  # 選ばないアプリは Default に記録する
    mlflow.tracing.disable()
    assert current_experiment_id() is None


def test_a_vote_can_be_taken_back(store: str, ask: Any) -> None:
    (trace_id,), app = ask(), client()
    for vote in (True, False, True):
        app.post("/feedback", json={"trace_id": trace_id, "is_positive": vote})
    app.post("/feedback", json={"trace_id": trace_id, "type": "rating", "rating": 2})
    app.post(
        "/feedback", json={"trace_id": trace_id, "is_positive": True}, headers={"x-user": "u-2"}
    )
    answer = app.delete("/feedback", params={"trace_id": trace_id, "type": "thumbs"})
    assert (answer.status_code, answer.json()) == (200, {"withdrawn": True})
    assert app.delete("/feedback", params={"trace_id": trace_id}).json() == {"withdrawn": False}
    found = summarize_feedback("quality")
    assert (found.by_user.keys(), found.ratings) == ({"u-2"}, (2.0,))
    wrong = app.delete("/feedback", params={"trace_id": trace_id, "type": "stars"})
    assert wrong.status_code == 422
    app.post("/feedback", json={"trace_id": trace_id, "is_positive": False})
    assert summarize_feedback("quality").by_user["u-1"].positive == 0


def test_a_withdrawal_waits_in_the_outbox_and_spares_a_newer_vote(
    store: str, ask: Any, tmp_path: Path
) -> None:
    (trace_id,), uri = ask(), mlflow.get_tracking_uri()
    outbox = FeedbackOutbox(tmp_path / "box.db")
    app = client(outbox=outbox, timeout_seconds=0.1)
    log_thumbs_feedback(trace_id, True, "u-1")
    log_thumbs_feedback(trace_id, True, "u-2")
    server_down()
    for user in ("u-1", "u-2"):
        answer = app.delete("/feedback", params={"trace_id": trace_id}, headers={"x-user": user})
        assert (answer.status_code, answer.json()) == (202, {"withdrawn": False})
    mlflow.set_tracking_uri(uri)
    log_thumbs_feedback(trace_id, False, "u-2")
    assert outbox.replay().remaining == 0
    assert summarize_feedback("quality").by_user.keys() == {"u-2"}


def hostile() -> list[tuple[bytes, dict[str, str]]]:
    """54 の、まともでないリクエスト。"""
    fields = ["trace_id", "type", "is_positive", "rating", "comment", "feedback_id"]
    values = ["NaN", "Infinity", "-Infinity", r'"\ud800"', "1e999", '{"a": [1]}', "null"]
    fine = {"trace_id": '"tr-1"', "type": '"rating"', "is_positive": "true", "rating": "4"}
    bodies = [
        "{" + ", ".join(f'"{k}": {v}' for k, v in {**fine, field: value}.items()) + "}"
        for field in fields
        for value in values
    ]
    raw = [b"", b"null", b"[]", b'"x"', b"\xff\xfe", b"{", b'{"trace_id": "tr-1"} x', b"NaN"]
    raw += [b"[" * 100_000, b'{"a":' * 20_000, b'{"rating": ' + b"9" * 5000 + b"}"]
    found = [(body.encode(), JSON) for body in bodies] + [(body, JSON) for body in raw]
    return [*found, (b'{"trace_id": "tr-1", "is_positive": true}', {"Content-Type": "text/plain"})]


def test_hostile_bodies_are_refused_without_an_echo() -> None:
    app, requests = client(timeout_seconds=0.05), hostile()
    assert len(requests) == 54
    for body, headers in requests:
        answer = app.post("/feedback", content=body, headers=headers)
        assert answer.status_code in (413, 422, 503), (body[:99], answer.status_code, answer.text)
        assert len(answer.content) < 2000, body[:99]


def test_a_body_is_not_read_beyond_its_limit() -> None:
    sent = 0

    def pieces() -> Any:
        nonlocal sent
        yield b'{"trace_id": "tr-1", "type": "comment", "comment": "'
        for _ in range(160):
            sent += 1
            yield b"x" * 65_536  # 全部で 10 MB

    answer = client().post("/feedback", content=pieces(), headers=JSON)
    assert answer.status_code == 413 and len(answer.content) < 200
    longest = {"trace_id": "tr-1", "type": "comment", "comment": "\U0001f600" * 10_000}
    body = json.dumps(longest).encode()  # 1 文字が 12 バイトになる
    assert (
        client(timeout_seconds=0.05).post("/feedback", content=body, headers=JSON).status_code
        == 503
    )


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
NAMES = list(feedback_router.FeedbackBody.model_fields)
KINDS = ["thumbs", "rating", "comment", "issue", "correction"]
FIELDS = st.dictionaries(st.sampled_from(NAMES), ANY, max_size=6)
RATHER_FINE = st.fixed_dictionaries({"trace_id": st.text() | ANY, "type": st.sampled_from(KINDS)})
BODY = st.builds(lambda a, b: {**a, **b}, FIELDS, RATHER_FINE) | FIELDS | ANY


@pytest.mark.slow
@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(body=BODY.map(lambda body: json.dumps(body).encode()) | st.binary(max_size=200))
def test_no_body_breaks_the_router(store: str, body: bytes) -> None:
    answer = client(timeout_seconds=0.01).post("/feedback", content=body, headers=JSON)
    assert answer.status_code in (403, 413, 422, 502, 503), (body, answer.text)


@pytest.mark.slow
def test_120_unknown_ids_hold_neither_the_event_loop_nor_the_threads(
    store: str, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """待っているリクエストは、スレッドを使わない。ほかの処理は、その間にすべて終わる。"""
    seconds, asked = 6.0, list[object]()
    app = app_with(timeout_seconds=seconds)
    done: list[int] = []
    for name in ("get_trace_info", "batch_get_trace_infos"):
        real = getattr(TracingClient().store, name)
        counted = partial(lambda real, ids: (asked.append(ids), real(ids))[1], real)
        monkeypatch.setattr(TracingClient().store, name, counted)

    @app.get("/ping")
    def ping() -> str:  # スレッドで動く、関係のない処理
        return "pong"

    async def post(http: httpx.AsyncClient, i: int) -> None:
        body = {"trace_id": f"tr-{i:032x}", "is_positive": True}
        done.append((await http.post("/feedback", json=body)).status_code)

    async def crowd() -> tuple[int, int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as http:
            posts = [asyncio.ensure_future(post(http, i)) for i in range(120)]
            await asyncio.sleep(0)
            answers = [await http.get("/ping") for _ in range(50)]
            assert {answer.text for answer in answers} == {'"pong"'}
            threads = anyio.to_thread.current_default_thread_limiter()
            while threads.borrowed_tokens and not done:
                await asyncio.sleep(0.01)
            held = threads.borrowed_tokens, len(done)
            await asyncio.gather(*posts)
        return held

    assert asyncio.run(crowd()) == (0, 0)  # 120 件はまだ待っていて、スレッドは 1 つも使っていない
    assert done == [503] * 120
    assert len(asked) < 120  # 1 件ずつではなく、まとめて尋ねる


def test_the_example_of_the_docstring_runs(store: str, ask: Any) -> None:
    text = str(feedback_router.__doc__)
    start = text.index("    from fastapi")
    namespace: dict[str, Any] = {}
    exec(textwrap.dedent(text[start : text.index("\n回数の制限")]), namespace)
    with mlflow.start_span("answer") as span:
        mlflow.update_current_trace(metadata={"mlflow.trace.user": "hanako"})
    app = TestClient(namespace["app"])
    body = {"trace_id": span.trace_id, "is_positive": True}
    statuses = [
        app.post("/feedback", json=body, headers={"x-user": user}).status_code
        for user in ("taro", "hanako")
    ]
    assert statuses == [403, 200]
    assert stored(span.trace_id) == {"user_thumbs": True}
