"""画面の横の運用: リリースと戻し、見張り、断り方。"""

from __future__ import annotations

import time
from collections.abc import Callable

import mlflow
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from openai import OpenAI

from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.shop.chat_panel import create_panel_router
from chapter8_samples._lab.shop.operations import OperationRefusedError, Operations
from chapter8_samples._lab.shop.support_bot import SupportBot
from chapter8_samples._lab.shop.traffic import Traffic
from chapter8_samples.alerting.metrics.source import metric_source

pytestmark = pytest.mark.slow


@pytest.fixture
def operations(stub_llm: StubLlm, tracking_uri: str) -> Operations:
    mlflow.set_experiment("operations")
    mlflow.openai.autolog()
    traffic = Traffic(SupportBot(OpenAI()), environment="production", service_version="1")
    return Operations("operations", traffic)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def kinds(operations: Operations) -> list[str]:
    return [event["kind"] for event in operations.status()["events"]]


def test_each_release_is_a_new_version_and_can_be_taken_back(operations: Operations) -> None:
    with pytest.raises(OperationRefusedError, match="戻すリリース"):
        operations.roll_back()
    for version in ("2", "3"):
        operations.release_bad_prompt()
        assert operations.current_version() == version
        with pytest.raises(OperationRefusedError, match="もう本番"):
            operations.release_bad_prompt()
        operations.roll_back()
        assert operations.current_version() == "1"
        operations.releases = type(operations.releases)("support-bot", cooldown_seconds=0)
    assert kinds(operations) == ["release", "rollback"] * 2


def test_alert_without_a_release_is_left_to_people(
    operations: Operations, stub_llm: StubLlm
) -> None:
    stub_llm.set_faults(bad_release=True)  # プロンプトは変わらず、モデルの側が悪くなった
    operations.traffic.send(12)
    mlflow.flush_trace_async_logging()
    operations.score()
    operations.check()
    status = operations.status()
    assert kinds(operations) == ["alert", "suggest"]
    assert (status["alert"]["firing"], status["alert"]["value"]) == (True, 0.0)
    assert "人の判断" in status["events"][1]["text"] and status["version"] == "1"


def test_panel_answers_in_json_and_says_why_not(operations: Operations, tracking_uri: str) -> None:
    operations.traffic.send(2)
    mlflow.flush_trace_async_logging()
    operations.score()
    operations.check()
    app = FastAPI()
    app.include_router(create_panel_router(operations, metric_source("operations")))
    client = TestClient(app)
    status = client.get("/status").json()
    assert status["figures"]["requests"] == {"value": 2, "n": 2}
    assert status["figures"]["grounded_rate"] == {"value": 1.0, "n": 2}
    assert status["figures"]["thumbs_up_rate"] == {"value": None, "n": 0}
    refused = client.post("/operations/rollback")
    assert (refused.status_code, refused.json()) == (409, {"detail": "戻すリリースはありません。"})
    assert client.post("/operations/auto", json={"enabled": False}).json() == {"ok": True}
    assert client.get("/status").json()["auto_rollback"] is False


def test_slow_judge_is_told_and_does_not_hold_up_the_alert(
    operations: Operations, stub_llm: StubLlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    operations.traffic.send(1)
    mlflow.flush_trace_async_logging()
    monkeypatch.setattr("chapter8_samples._lab.shop.operations.SLOW_SCORING_SECONDS", 0.0)
    stub_llm.set_faults(latency_seconds=3)
    operations.start_watching()
    wait_for(lambda: "採点が進みません" in operations.status()["problem"])
    before = operations.engine.last_evaluated_at
    wait_for(lambda: operations.engine.last_evaluated_at != before)
    assert "採点が進みません" in operations.status()["problem"]  # 採点を待たずに評価した
    operations.stop()
    assert operations.status()["problem"] == ""


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
