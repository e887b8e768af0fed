"""画面の横の運用: リリースと戻し、見張り、断り方。"""

from __future__ import annotations

import time
from collections.abc import Callable

import mlflow
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from openai import OpenAI

from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.shop.chat_panel import alert_detail, create_panel_router, trend
from chapter8_samples._lab.shop.operations import QUALITY, OperationRefusedError, Operations
from chapter8_samples._lab.shop.support_bot import SupportBot
from chapter8_samples._lab.shop.traffic import Traffic
from chapter8_samples.alerting import Alert, AlertStatus
from chapter8_samples.alerting.metrics.measures import TraceRow
from chapter8_samples.alerting.metrics.source import TraceSearch

pytestmark = pytest.mark.slow


@pytest.fixture
def operations(stub_llm: StubLlm, tracking_uri: str) -> Operations:
    mlflow.set_experiment("operations")
    mlflow.openai.autolog()
    traffic = Traffic(SupportBot(OpenAI()), environment="production", service_version="1")
    return Operations("operations", traffic)


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kinds(operations: Operations) -> list[str]:
    return [event["kind"] for event in operations.status()["events"]]


def test_each_release_is_a_new_version(operations: Operations) -> None:
    for version in ("2", "3"):
        operations.release_bad_prompt()
        assert operations.current_version() == version
        with pytest.raises(OperationRefusedError, match="もう本番"):
            operations.release_bad_prompt()
        operations.releases.rollback(reason="test")
        operations.releases = type(operations.releases)("support-bot", cooldown_seconds=0)
    assert kinds(operations) == ["release"] * 2


def test_alert_without_a_release_is_left_to_people(
    operations: Operations, stub_llm: StubLlm
) -> None:
    stub_llm.set_faults(bad_release=True)  # プロンプトは変わらず、モデルの側が悪くなった
    operations.traffic.send(12)
    mlflow.flush_trace_async_logging()
    operations.check()
    status = operations.status()
    assert kinds(operations) == ["alert", "suggest"]
    assert not status["recovering"]  # 戻していないので、質問も送らない
    assert (status["alert"]["firing"], status["alert"]["value"]) == (True, 0.0)
    assert "人の判断" in status["events"][1]["text"] and status["version"] == "1"


def test_panel_answers_in_json_and_says_why_not(operations: Operations, tracking_uri: str) -> None:
    operations.traffic.send(2)
    mlflow.flush_trace_async_logging()
    operations.check()
    app = FastAPI()
    app.include_router(create_panel_router(operations, TraceSearch("operations")))
    client = TestClient(app)
    status = client.get("/status").json()
    assert status["figures"]["requests"] == {"value": 2, "n": 2}
    assert status["figures"]["grounded_rate"] == {"value": 1.0, "n": 2}
    assert status["figures"]["thumbs_up_rate"] == {"value": None, "n": 0}
    assert [value for value in status["trend"]["grounded_rate"] if value is not None] == [1.0]
    assert status["alert"]["detail"] == (
        "直近 30 秒: 根拠のある答え 100%(2 件)、しきい値 80%。8 件になると判定します。"
    )
    operations.release_bad_prompt()
    refused = client.post("/operations/release")
    assert (refused.status_code, "もう本番" in refused.json()["detail"]) == (409, True)


def test_the_alert_closes_by_itself_after_a_rollback(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chapter8_samples._lab.shop.operations.RECOVERY_PAUSE_SECONDS", 0.2)
    operations.release_bad_prompt()
    operations.traffic.send(12)
    operations.start_watching()
    wait_for(lambda: "resolved" in kinds(operations), 90)
    operations.stop()
    assert kinds(operations) == ["release", "alert", "rollback", "resolved"]
    assert not operations.status()["recovering"] and not operations.status()["sending"]


def test_a_resolved_alert_ends_the_recovery(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """次のアラートは別の原因かもしれない。戻していないのに、確かめる質問は送らない。"""
    monkeypatch.setattr(operations, "_firing", lambda: True)
    monkeypatch.setattr(operations, "_rolled_back", True)
    assert operations.status()["recovering"]
    operations._answer(Alert(name="x", status=AlertStatus.RESOLVED))  # pyright: ignore[reportPrivateUsage]
    assert not operations.status()["recovering"]


def row(at: float, *assessments: tuple[str, str], latency_ms: float = 100.0) -> TraceRow:
    return TraceRow(
        trace_id="t", at_ms=round(1000 * at), latency_ms=latency_ms, assessments=assessments
    )


def test_the_alert_says_what_is_true_before_and_after_the_scoring() -> None:
    scored, unscored = row(100, (QUALITY, "yes")), row(100)
    for value, n, rows, text in (
        (None, 0, [], "新しい答えはありません"),
        (None, 0, [unscored, unscored], "2 件をまだ採点していません"),
        (1.0, 8, [scored], "根拠のある答え 100%(8 件)、しきい値 80%。"),
        (0.5, 8, [scored, unscored], "しきい値 80%。採点待ち 1 件。"),
        (1.0, 7, [scored], "8 件になると判定します"),
    ):
        assert text in alert_detail(value, n, rows)
    assert "採点して" not in alert_detail(None, 0, [scored])


@given(st.lists(st.floats(700.001, 1000), max_size=40))
def test_every_answer_is_in_the_trend_once(moments: list[float]) -> None:
    found = trend([row(at, latency_ms=at) for at in moments], 1000)
    latest = found["start"] + found["bin_seconds"] * len(found["latency_p95_ms"])
    assert 1000 < latest <= 1005 and len(found["latency_p95_ms"]) >= 12
    bins = {int(round(1000 * at) / 1000 // 5) for at in moments}
    filled = [
        found["start"] // 5 + i for i, v in enumerate(found["latency_p95_ms"]) if v is not None
    ]
    assert filled == sorted(bins)


def test_unreadable_traces_are_told_and_forgotten(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chapter8_samples._lab.shop.operations.CHECK_SECONDS", 0.05)
    monkeypatch.setattr(operations, "experiment", "renamed")
    operations.start_watching()
    wait_for(lambda: "トレースを読めません" in operations.status()["problem"])
    monkeypatch.setattr(operations, "experiment", "operations")
    wait_for(lambda: operations.status()["problem"] == "")
    operations.stop()


def test_burst_ends_early_when_stopped(operations: Operations) -> None:
    operations.send_burst()
    with pytest.raises(OperationRefusedError, match="途中"):
        operations.send_burst()
    operations.stop()
    assert not operations.status()["sending"]
    mlflow.flush_trace_async_logging()
    assert len(mlflow.search_traces(return_type="list")) < 30


def test_a_rollback_that_does_not_help_stops_asking(
    operations: Operations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chapter8_samples._lab.shop.operations.RECOVERY_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr("chapter8_samples._lab.shop.operations.RECOVERY_SECONDS", 0.05)
    monkeypatch.setattr(operations, "_firing", lambda: True)
    monkeypatch.setattr(operations, "_rolled_back", True)
    monkeypatch.setattr(operations.traffic, "send", lambda _: None)
    assert operations._sending.acquire(blocking=False)  # pyright: ignore[reportPrivateUsage]
    operations._recover()  # pyright: ignore[reportPrivateUsage]
    status = operations.status()
    assert (status["recovering"], status["sending"]) == (False, False)
    assert "戻しても回復しません" in status["events"][-1]["text"]
