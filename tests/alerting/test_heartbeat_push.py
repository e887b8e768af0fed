"""監視の監視: 届く。止まらない。妨げない。漏らさない。"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from chapter8_samples._lab.receivers import Answer, WebhookReceiver
from chapter8_samples.alerting.alert_config import AlertConfig
from chapter8_samples.alerting.alert_delivery import NotificationConfigError, RetryPolicy
from chapter8_samples.alerting.alert_engine import AlertEngine
from chapter8_samples.alerting.alert_rules import AlertRule
from chapter8_samples.alerting.heartbeat_push import HeartbeatPush, heartbeat_from_env
from chapter8_samples.alerting.trace_metrics import MetricSample

ROOT = Path(__file__).resolve().parents[2]
SECRET = "/ping/0a1b2c3d-SECRET"
FAST = RetryPolicy(attempts=2, base_seconds=0.01, timeout_seconds=1.0, deadline_seconds=20)


class Calm:
    """いつも 0 の出どころ。"""

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        return MetricSample(metric=metric, value=0.0, n=9, start=at - window, end=at)

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int = 3) -> list[str]:
        return []


def test_every_cycle_says_that_it_is_alive(webhooks: WebhookReceiver) -> None:
    push, stop = HeartbeatPush(webhooks.url + SECRET, policy=FAST), threading.Event()
    rules = [AlertRule(name="r", threshold=0.5)]

    def beat() -> None:
        push()
        assert push.wait()
        if push.sent == 3:
            stop.set()

    AlertEngine(AlertConfig(rules=rules), Calm()).run_forever(0.01, stop=stop, heartbeat=beat)
    assert (push.sent, push.failed, push.skipped) == (3, 0, 0)
    assert {r.path for r in webhooks.received} == {SECRET}
    assert webhooks.received[0].json == {"status": "ok"}
    assert push.last_ok_at is not None and push.last_ok_at <= datetime.now(timezone.utc)


def test_a_silent_service_never_holds_the_evaluation(webhooks: WebhookReceiver) -> None:
    webhooks.script(Answer(200, delay_seconds=3.0))
    push = HeartbeatPush(webhooks.url + SECRET)
    began = time.monotonic()
    for _ in range(100):
        push()
    assert time.monotonic() - began < 2.5  # 返事(3 秒)を待っていない
    assert push.skipped == 99
    assert push.wait()
    assert len(webhooks.received) == 1


@pytest.mark.parametrize("answer", [404, 500, Answer(reset=True), Answer(delay_seconds=4.0)])
def test_a_failure_is_noted_and_the_next_beat_goes_out(
    webhooks: WebhookReceiver, caplog: pytest.LogCaptureFixture, answer: int | Answer
) -> None:
    caplog.set_level(logging.DEBUG)
    webhooks.script(*[answer] * (1 if answer == 404 else 2))  # 断られたら、送り直さない
    push = HeartbeatPush(webhooks.url + SECRET, policy=FAST)
    push()
    assert push.wait()
    assert (push.sent, push.failed) == (0, 1)
    assert "heartbeat was not delivered" in caplog.text
    push({"status": "degraded"})
    assert push.wait()
    assert (push.sent, push.last_error) == (1, "")
    assert webhooks.received[-1].json == {"status": "degraded"}
    assert SECRET not in caplog.text + repr(push) and "SECRET" not in caplog.text


def test_nobody_listening_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    with WebhookReceiver() as hooks:
        push = HeartbeatPush(hooks.url + SECRET, policy=FAST)
    push()
    assert push.wait()
    assert push.failed == 1
    push({"status": object()})  # JSON にできないものを渡しても、例外にならない
    assert push.failed == 2
    assert "SECRET" not in caplog.text


def test_a_missing_or_broken_url_is_refused_without_repeating_it() -> None:
    with pytest.raises(NotificationConfigError, match="HEARTBEAT_URL is not set"):
        heartbeat_from_env("HEARTBEAT_URL", {})
    with pytest.raises(NotificationConfigError) as caught:
        heartbeat_from_env("HEARTBEAT_URL", {"HEARTBEAT_URL": "hc.example/SECRET"})
    assert "SECRET" not in str(caught.value)


@pytest.mark.slow
def test_the_command_beats_once_before_it_ends(
    webhooks: WebhookReceiver, tmp_path: Path, tracking_uri: str
) -> None:
    import mlflow

    mlflow.set_experiment("app")
    with mlflow.start_span("answer"):
        pass
    mlflow.flush_trace_async_logging()
    rule = "{name: errors, metric: error_rate, window: 5m, threshold: 0.5}"
    (tmp_path / "a.yaml").write_text(f"experiment: app\nrules: [{rule}]\n", encoding="utf-8")
    command = [sys.executable, "-m", "chapter8_samples.alerting.alert_config", "once", "a.yaml"]
    command += ["--tracking-uri", tracking_uri, "--heartbeat-url-env", "BEAT"]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "BEAT": webhooks.url + SECRET}
    done = subprocess.run(
        command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert [r.path for r in webhooks.received] == [SECRET]
    del environ["BEAT"]
    done = subprocess.run(
        command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, len(webhooks.received)) == (2, 1)
    assert "environment variable BEAT is not set" in done.stderr
