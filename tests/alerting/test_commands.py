"""コマンド: 終了コードで結果が分かり、誤りは 1 行で分かる。"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ports import free_port

from chapter8_samples._lab.servers.receivers import Answer, WebhookReceiver
from chapter8_samples.alerting import Alert, Delivery, MultiChannelNotifier, NotificationHandler
from chapter8_samples.alerting import __main__ as commands
from chapter8_samples.alerting.__main__ import main
from chapter8_samples.alerting.engine.file import StateFile

ROOT = Path(__file__).resolve().parents[2]
RULE = "{name: errors, metric: error_rate, window: 5m, threshold: 0.5, severity: critical}"


PROMETHEUS = """\
groups:
- name: llm-app
  interval: 30s
  rules:
  - alert: errors
    expr: llm_app_error_ratio{window="5m"} > 0.5
    for: 0s
    labels:
      severity: critical
    annotations:
      summary: errors
      value: '{{ $value }}'
  - alert: alert_evaluation_failed
    expr: increase(llm_app_read_failures_total[5m]) > 0 or absent(llm_app_read_failures_total)
    for: 1m
    labels:
      severity: critical
    annotations:
      summary: alert rules could not be read
      value: '{{ $value }}'
"""


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """``watch`` は、プロセスのシグナルの扱いを変える。"""
    names = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, handlers, strict=True):
        signal.signal(name, handler)


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "alerts.yaml"
    path.write_text(f"offset: 0s\nexperiment: app\nrules:\n  - {RULE}\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def failed_trace(tracking_uri: str) -> str:
    import mlflow

    mlflow.set_experiment("app")
    with mlflow.start_span("answer") as span:
        span.set_status("ERROR")
    mlflow.flush_trace_async_logging()
    return tracking_uri


def test_a_wrong_file_ends_with_two_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text("rules: [{name: a}]", encoding="utf-8")
    assert main(["check", str(path)]) == 2
    assert "rules[0].metric: Field required" in capsys.readouterr().err


def test_the_rules_are_written_for_prometheus(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "prometheus", config]) == 0
    assert capsys.readouterr().out == PROMETHEUS


@pytest.mark.parametrize(
    "command", ["", "check", "once", "watch", "replay", "export", "export prometheus"]
)
def test_every_command_explains_itself_in_a_console_of_cp932(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text.encode("cp932")
    assert f"usage: {' '.join(['python -m chapter8_samples.alerting', *command.split()])}" in text


def test_no_command_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["export"], ["alert"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
    assert "usage: python -m chapter8_samples.alerting" in capsys.readouterr().err


def test_an_experiment_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "alerts.yaml"
    path.write_text(f"rules:\n  - {RULE}\n", encoding="utf-8")
    assert main(["once", str(path)]) == 2
    assert "write it in the file or pass --experiment" in capsys.readouterr().err


def test_once_fires_once_and_remembers(
    config: str, failed_trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", config]) == 0
    assert "OK: 1 rules" in capsys.readouterr().out
    assert main(["once", config]) == 1
    assert capsys.readouterr().out == (
        "[発報] CRITICAL errors (error_rate 1, しきい値 0.5, 標本数 1)\n"
    )
    assert main(["once", config]) == 1  # まだ発報中だが、もう知らせない
    assert capsys.readouterr().out == ""
    assert main(["once", config, "--experiment", "nobody"]) == 3
    assert "experiment 'nobody' does not exist" in capsys.readouterr().err


def test_once_tells_the_receivers_that_mlflow_is_down_and_sends_what_was_owed(
    config: str,
    failed_trace: str,
    tmp_path: Path,
    webhooks: WebhookReceiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """止まった MLflow は、受け手の障害と違って誰にも見えない。cron の 1 回目で知らせる。"""
    path, state = tmp_path / "told.yaml", ["--state", str(tmp_path / "state.db")]
    receiver = "receivers: {ops: {type: slack, url_env: OPS_URL}}\n"
    path.write_text(Path(config).read_text(encoding="utf-8") + receiver, encoding="utf-8")
    monkeypatch.setenv("OPS_URL", f"{webhooks.url}/a/b")
    webhooks.script(*[Answer(429, {"Retry-After": "0"})] * 4)
    assert main(["once", str(path), *state]) == 1  # Slack に届かない
    assert len(webhooks.received) == 4
    down = ["--tracking-uri", f"http://127.0.0.1:{free_port()}"]
    for _ in range(2):
        assert main(["once", str(path), *state, *down]) == 3
    texts = sorted(request.json["text"] for request in webhooks.received[4:])
    assert [text.split()[:3] for text in texts] == [
        ["[発報]", "CRITICAL", "alert_evaluation_failed"],
        ["[発報]", "CRITICAL", "errors"],
    ]
    assert main(["once", str(path), *state]) == 1
    assert "[解消] CRITICAL alert_evaluation_failed" in webhooks.received[-1].json["text"]


def test_a_server_that_is_down_is_said_within_seconds_and_a_patient_watchdog_waits(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patient = tmp_path / "patient.yaml"
    text = Path(config).read_text(encoding="utf-8") + "evaluation_failure_for: 30m\n"
    patient.write_text(text, encoding="utf-8")
    down = ["--tracking-uri", f"http://127.0.0.1:{free_port()}"]
    for command in ("once", "watch"):
        began = time.monotonic()
        assert main([command, str(patient), *down, "--state", str(tmp_path / "s.db")]) == 3
        assert time.monotonic() - began < 30
        said = capsys.readouterr()
        assert said.out == "" and "cannot read traces" in said.err


class Patient(NotificationHandler):
    """1 件に 0.3 秒かかる通知先。"""

    sent: ClassVar[list[str]] = []

    def deliver(self, alert: Alert) -> Delivery:
        time.sleep(0.3)
        self.sent.append(alert.name)
        return self.result(alert, ok=True)


class Impatient(MultiChannelNotifier):
    """コマンドが何秒待つように言っても、すぐに待つのをやめる。"""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, 0.01 if name == "wait_seconds" else value)


def test_a_run_that_ends_while_it_sends_leaves_the_rest_to_the_next_and_repeats_nothing(
    config: str, failed_trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = Path(config).read_text(encoding="utf-8")
    rules = "".join(f"  - {RULE.replace('errors', name)}\n" for name in "bc")
    Path(config).write_text(text + rules, encoding="utf-8")
    made = Impatient().add_handler("slow", Patient())
    monkeypatch.setattr(commands, "notifier_from_config", lambda _: made)
    for sent in (1, 2, 3, 3):
        assert main(["once", config, "--state", str(tmp_path / "state.db")]) == 1
        assert len(Patient.sent) == sent
    assert sorted(Patient.sent) == ["b", "c", "errors"]


def test_a_second_engine_is_refused_and_told_who_holds_the_state(
    config: str, failed_trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = StateFile(tmp_path / "state.db")
    first.hold()
    assert main(["once", config, "--state", str(tmp_path / "state.db")]) == 2
    problem = capsys.readouterr()
    assert (
        f"is held by pid {os.getpid()} on {socket.gethostname()}; its lease ends at 20"
        in problem.err
    )
    assert problem.out == ""
    first.release()
    assert main(["once", config, "--state", str(tmp_path / "state.db")]) == 1


def test_alertmanager_is_told_how_long_the_schedule_is(
    config: str,
    failed_trace: str,
    tmp_path: Path,
    webhooks: WebhookReceiver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10 分おきの once で、次の回の前に解消とみなされない。"""
    path, state = tmp_path / "am.yaml", ["--state", str(tmp_path / "state.db")]
    text = Path(config).read_text(encoding="utf-8")
    text += "receivers: {am: {type: alertmanager, url_env: AM_URL}}\n"
    monkeypatch.setenv("AM_URL", webhooks.url)
    path.write_text(text, encoding="utf-8")
    assert main(["once", str(path), *state]) == 2  # 間隔が分からない
    path.write_text(f"{text}interval: 10m\n", encoding="utf-8")
    for _ in range(2):
        assert main(["once", str(path), *state]) == 1
    posted = [request.json[0] for request in webhooks.received]
    held = [datetime.fromisoformat(a["endsAt"]) - datetime.now(timezone.utc) for a in posted]
    assert len(posted) >= 2 and all(timedelta(minutes=20) < left for left in held)


def test_replay_reads_the_stored_traces(
    config: str, failed_trace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", config, "--hours", "1"]) == 0
    assert "errors" in capsys.readouterr().out
    assert main(["replay", config, "--hours", "0.0000001"]) == 3


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_watch_fires_once_and_stops_on_sigterm(
    config: str, failed_trace: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "chapter8_samples.alerting", "watch", config]
    command += ["--interval", "0.2", "--tracking-uri", failed_trace]
    command += ["--state", str(tmp_path / "state.db")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "[発報] CRITICAL errors" in process.stdout.readline()
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 1
        assert process.stdout.read() == ""
    finally:
        process.kill()


def test_a_file_that_cannot_be_written_is_an_error_and_no_traceback(
    config: str, failed_trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["once", config, "--state", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_watch_tells_the_receivers_when_it_cannot_begin(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = ["--state", str(tmp_path / "s.db")]
    down = ["--tracking-uri", f"http://127.0.0.1:{free_port()}"]
    assert main(["watch", config, *state, *down]) == 3
    assert "[発報] CRITICAL alert_evaluation_failed" in capsys.readouterr().out
    assert main(["watch", config, *state, *down]) == 3  # 起動し直されても、もう知らせない
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("port", ["99999", "-1", "http"])
def test_a_port_that_does_not_exist_is_an_error_and_no_traceback(
    port: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve-metrics", config, f"--port={port}"])
    assert ended.value.code == 2 and port in capsys.readouterr().err


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "1e9", "soon"])
def test_a_number_that_makes_no_sense_is_an_error_and_no_traceback(
    hours: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["replay", config, "--hours", hours], ["watch", config, "--interval", hours]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert f"{hours!r} is not a number between 0 and 1000000" in capsys.readouterr().err
