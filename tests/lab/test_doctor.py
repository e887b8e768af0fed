"""診断: 何を見つけ、何と直し方を示し、何を決して見せないか。"""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any
from urllib.parse import quote

import mlflow
import pytest
from conftest import without_settings
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import ROOT, run_as_reader

from chapter8_samples.__main__ import main
from chapter8_samples._lab.doctor import checks, run, setup_problems
from chapter8_samples._lab.doctor import settings as rules
from chapter8_samples._lab.doctor.setup_problems import Finding, shown

DUAL = {"MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT": "true"}
GRPC = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4317"}
HTTP = {
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}


def named(findings: Any, name: str) -> Finding:
    found = [finding for finding in findings if finding.name == name]
    assert len(found) == 1, (name, findings)
    return found[0]


def levels(environment: dict[str, str]) -> dict[str, str]:
    return {finding.name: finding.level for finding in rules.conflicts(environment)}


def test_examples_in_the_docstrings() -> None:
    assert doctest.testmod(setup_problems).failed == 0


# 秘密 ----------------------------------------------------------------------

SECRETS = st.text(alphabet="abcdefghij0123456789:/@?#&=%+ ", min_size=8, max_size=30).filter(
    lambda text: text == text.strip() and any(c.isalnum() for c in text)
)
HOSTS = st.sampled_from(["127.0.0.1:9", "[::1]:9", "h.invalid"])


@given(SECRETS, HOSTS, st.booleans())
@example("//q1w2e3r4", "127.0.0.1:9", False)
@example("q1://w2e3r4", "127.0.0.1:9", False)
def test_addresses_are_shown_without_their_secrets(secret: str, host: str, spelled: bool) -> None:
    secret = quote(secret, safe="") if spelled else secret
    assert shown(f"http://user:{secret}@{host}/v1/traces") == f"http://{host}/v1/traces"
    assert shown(f"postgresql://user:{secret}@{host}/db") == f"postgresql://{host}/db"
    assert shown(f"https://{secret}@{host}") == f"https://{host}"
    assert shown(f"user:{secret}@{host}") == host  # 種類のない URL。secret は "//" でも始まる


@given(SECRETS.filter(lambda s: "@" not in s), HOSTS)
def test_queries_and_paths_of_addresses_are_dropped(secret: str, host: str) -> None:
    secret = f"Q{secret}Q"
    assert secret not in shown(f"https://{host}/{secret}/v1/traces?token={secret}#{secret}")


@settings(max_examples=20)
@given(SECRETS, st.booleans())
@example("p//q://r@s", False)
def test_no_finding_repeats_a_secret(secret: str, spelled: bool) -> None:
    secret = f"Q{secret}Q"
    password = quote(secret, safe="") if spelled else secret
    for address in (
        f"http://user:{password}@127.0.0.1:9",
        f"user:{password}@127.0.0.1:9",
        f"127.0.0.1:9?token={quote(secret, safe='')}",
    ):
        environment = {
            "MLFLOW_TRACKING_URI": address,
            "MLFLOW_TRACKING_TOKEN": secret,
            "OPENAI_API_KEY": secret,
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": address,
            "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Basic%20{password}",
        }
        findings = run.diagnose(environment)
        printed = run.to_text(findings) + run.to_json(findings)
        assert secret not in printed and quote(secret, safe="") not in printed


def doctor(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """このプロセスで診断した、終了ステータスと表示。"""
    status = main(["doctor", *more])
    return status, capsys.readouterr().out


def test_the_whole_doctor_keeps_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    secrets = [f"S3CRET{i}x" for i in range(7)]
    for name, value in {
        "MLFLOW_TRACKING_URI": f"http://me:{secrets[0]}@127.0.0.1:9/{secrets[1]}?t={secrets[2]}",
        "MLFLOW_TRACKING_TOKEN": secrets[3],
        "OPENAI_API_KEY": secrets[4],
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"http://u:{secrets[5]}@127.0.0.1:9",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": f"x-api-key={secrets[6]}",
    }.items():
        monkeypatch.setenv(name, value)
    for more in ([], ["--json"]):
        status, out = doctor(capsys, *more)
        assert status == 1
        assert not [secret for secret in secrets if secret in out]


# 食い違う設定 --------------------------------------------------------------


def test_nothing_to_say_about_a_clean_environment() -> None:
    assert levels({}) == {"設定の食い違い": "ok"}
    assert levels({**GRPC, **DUAL}) == levels({**HTTP, **DUAL}) == {"設定の食い違い": "ok"}


FIGHTS: list[tuple[dict[str, str], str, str]] = [
    (GRPC, "OTLP と MLflow", "error"),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4317"}, "OTLP と MLflow", "error"),
    ({**DUAL, **HTTP, "MLFLOW_TRACKING_URI": "http://127.0.0.1:4318"}, "OTLP と MLflow", "error"),
    ({**DUAL, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4317"}, "OTLP のメトリクス", "warning"),
    (
        {**DUAL, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "collector:4317"},
        "OTLP の送り先",
        "error",
    ),
    (
        {**DUAL, **HTTP, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h:4318"},
        "OTLP の送り先",
        "error",
    ),
    ({**DUAL, **GRPC, "OTEL_EXPORTER_OTLP_COMPRESSION": "deflate"}, "OTLP の圧縮", "error"),
    ({"OTEL_SDK_DISABLED": "true"}, "OpenTelemetry", "error"),
    ({"OTEL_RESOURCE_ATTRIBUTES": "team=search,"}, "リソース属性", "warning"),
    ({"MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": ""}, "非同期の記録", "warning"),
    ({"MLFLOW_TRACE_BUFFER_MAX_SIZE": "20000"}, "キューの上限", "warning"),
    ({"MLFLOW_TRACKING_USERNAME": "u"}, "サーバーの認証", "error"),
]


def test_settings_that_fight_each_other() -> None:
    for environment, name, level in FIGHTS:
        found = {finding.name: finding for finding in rules.conflicts(environment)}
        assert found[name].level == level and found[name].fix, (environment, found)


def test_the_name_that_mlflow_does_not_read_is_named() -> None:
    found = rules.conflicts({**GRPC, "MLFLOW_ENABLE_DUAL_EXPORT": "true"})
    assert [finding.level for finding in found] == ["error", "warning"]
    assert "MLFLOW_ENABLE_DUAL_EXPORT は" in found[1].detail


WRONG = (
    ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
    ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
    ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "10000"),  # 仕様はミリ秒、Python の SDK は秒
    ("MLFLOW_TRACE_SAMPLING_RATIO", "10"),
    ("MLFLOW_TRACE_BUFFER_MAX_SIZE", "many"),
)


def test_a_wrong_value_is_named_with_the_fix() -> None:
    for name, value in WRONG:
        found = named(rules.conflicts({**DUAL, **GRPC, name: value}), name)
        assert found.level == "error" and repr(value) in found.detail and found.fix, found


def test_values_that_are_not_used_are_left_alone() -> None:
    assert levels({"OTEL_EXPORTER_OTLP_TIMEOUT": "10s"}) == {"設定の食い違い": "ok"}


GOOD: list[dict[str, str]] = [
    {**GRPC, "MLFLOW_ENABLE_OTLP_EXPORTER": "false"},
    {"MLFLOW_TRACE_SAMPLING_RATIO": "0.1"},
    {"MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true"},
    dict.fromkeys(rules.QUEUE_LIMITS, "20000"),
    {"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p"},
    {"OTEL_RESOURCE_ATTRIBUTES": "team=search,tier=1"},
]


def test_good_settings_are_left_alone() -> None:
    for environment in GOOD:
        assert levels(environment) == {"設定の食い違い": "ok"}, environment


@pytest.mark.slow
def test_our_own_set_up_passes(tracking_uri: str) -> None:
    """8.1 と 8.5 が設定する環境変数に、診断が文句を言わない。"""
    from chapter8_samples.opentelemetry import build_otlp_config
    from chapter8_samples.production_tracing import setup_production_tracing

    before = dict(os.environ)
    setup_production_tracing("doctor", tracking_uri=tracking_uri)
    made = {k: v for k, v in os.environ.items() if before.get(k) != v}
    made.pop("MLFLOW_EXPERIMENT_ID", None)  # MLflow 自身が、set_experiment の後で書く
    otlp = build_otlp_config("http://127.0.0.1:4317", "app").to_env()
    assert levels(made) == levels(otlp) == {"設定の食い違い": "ok"}


def test_a_reader_of_windows_sees_the_whole_list(tmp_path: Path) -> None:
    job = run_as_reader(
        ["-m", "chapter8_samples", "doctor"], tmp_path, environment={"PYTHONPATH": str(ROOT)}
    )
    assert job.returncode == 0, job.stdout + job.stderr
    for name in ("Python", "mlflow", "料金表", "接続先", "ジャッジ", "OTLP", "設定の食い違い"):
        assert f" {name} " in job.stdout
    assert "\\u" not in job.stdout


# 本物の相手 ----------------------------------------------------------------


def diagnosed(environment: dict[str, str]) -> Finding:
    (found,) = checks.backend(environment)
    assert found.name == "接続先"
    return found


@pytest.mark.slow
def test_a_server_that_answers(mlflow_server_url: str) -> None:
    found = diagnosed({"MLFLOW_TRACKING_URI": mlflow_server_url})
    assert (found.level, found.detail) == ("ok", f"{mlflow_server_url} が答えました")


class _Answers(BaseHTTPRequestHandler):
    """決まった答えを返す相手。``status`` が 0 なら答えず、1 なら少しずつ答え続ける。"""

    status, body, release = 200, b"<html>", Event()

    def do_POST(self) -> None:
        if not self.status:
            self.release.wait(30)
            return
        while self.status == 1 and not self.release.wait(0.1):
            self.wfile.write(b"H")
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def stranger() -> Iterator[type[_Answers]]:
    """MLflow でない HTTP サーバー。"""
    kind = type("Kind", (_Answers,), {"release": Event()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    kind.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield kind
    kind.release.set()
    server.shutdown()
    server.server_close()


def test_servers_that_refuse_or_are_no_mlflow(stranger: Any) -> None:
    for status, words in (
        (401, "鍵を受け付けません"),
        (403, "鍵を受け付けません"),
        (200, "答えを返しません"),
        (404, "404"),
    ):
        stranger.status = status
        found = diagnosed({"MLFLOW_TRACKING_URI": stranger.url})
        assert found.level == "error" and words in found.detail and found.fix


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 1])
def test_a_server_that_never_answers_does_not_hang_the_doctor(
    stranger: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    stranger.status = status
    monkeypatch.setattr(checks, "SECONDS", 0.5)
    began = time.monotonic()
    assert diagnosed({"MLFLOW_TRACKING_URI": stranger.url}).level == "error"
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_databases(tmp_path: Path, database_template: Path) -> None:
    path = tmp_path / "mlflow.db"
    uri = {"MLFLOW_TRACKING_URI": f"sqlite:///{path}"}
    assert "まだありません" in diagnosed(uri).detail and not path.exists()
    shutil.copy(database_template, path)
    assert diagnosed(uri).level == "ok"
    path.write_bytes(bytes(range(256)) * 8)
    mlflow.set_tracking_uri(uri["MLFLOW_TRACKING_URI"])
    assert "データベースではありません" in diagnosed(uri).detail
    for wrong in ("sqlite:////no/folder/mlflow.db", str(tmp_path / "mlruns"), "foo://bar"):
        found = diagnosed({"MLFLOW_TRACKING_URI": wrong})
        assert found.level == "error" and found.fix, wrong


def test_the_otlp_receiver_is_shown_with_the_command_that_checks_it() -> None:
    (found,) = checks.otlp(HTTP)
    assert found.detail.startswith("http://127.0.0.1:4318/v1/traces (http/protobuf)")
    assert "python -m chapter8_samples.opentelemetry check" in found.detail
    (off,) = checks.otlp({**GRPC, "MLFLOW_ENABLE_OTLP_EXPORTER": "false"})
    assert "送らない" in off.detail


def test_judges() -> None:
    assert next(checks.judge({})).level == "warning"
    assert next(checks.judge({"OPENAI_API_KEY": "k"})).level == "ok"
    assert next(checks.judge({"MLFLOW_TRACKING_URI": "databricks"})).level == "ok"


def test_a_judge_that_is_no_model_is_named() -> None:
    for model in ("gpt-4o", "openai/gpt-4o", "openai:/", ":/gpt-4o"):
        found = next(checks.judge({"MLFLOW_GENAI_JUDGE_DEFAULT_MODEL": model}))
        assert found.level == "error" and repr(model) in found.detail and "openai:/" in found.fix
    for secret in ("sk-proj-0123456789abcdef0123456789abcdef", "https://user:pw@host.example/v1/x"):
        found = next(checks.judge({"MLFLOW_GENAI_JUDGE_DEFAULT_MODEL": secret}))
        assert secret not in found.detail + found.fix and "pw@" not in found.detail


def test_the_default_judge_is_the_one_of_the_chapter() -> None:
    from chapter8_samples.quality_monitoring.scoring import judges

    assert checks.DEFAULT_JUDGE == judges.DEFAULT_JUDGE


# 終了ステータスと、壊れた環境 ----------------------------------------------


def test_json_for_ci(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in GRPC.items():
        monkeypatch.setenv(name, value)
    status, out = doctor(capsys, "--json")
    told = json.loads(out)
    assert status == 1 and told["ok"] is False
    bad = {item["name"] for item in told["findings"] if item["level"] == "error"}
    assert bad == {"OTLP と MLflow"}
    assert all(item["fix"] for item in told["findings"] if item["level"] != "ok")


def test_one_broken_check_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Iterator[Finding]:
        raise ZeroDivisionError("s3cret")

    monkeypatch.setattr(checks, "judge", broken)
    found = run.diagnose({})
    assert named(found, "ジャッジ").level == "error" and "s3cret" not in run.to_text(found)
    assert named(found, "OTLP").level == "ok"


def old_mlflow(folder: Path, version: str = "3.9.0") -> dict[str, str]:
    """古い MLflow が入っているように見える環境。"""
    info = folder / f"mlflow-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: mlflow\nVersion: {version}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}


@pytest.mark.slow
def test_old_mlflow_is_diagnosed_not_crashed_into(tmp_path: Path) -> None:
    job = run_as_reader(
        ["-m", "chapter8_samples", "doctor"], tmp_path, environment=old_mlflow(tmp_path / "old")
    )
    assert job.returncode == 1 and "MLflow 3.9.0 は古すぎます" in job.stdout, job.stderr
    assert 'pip install -U "mlflow>=3.17,<4"' in job.stdout


def test_the_version_of_mlflow_is_shown_against_the_tested_range(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for version, level in (("3.17.0", "ok"), ("3.18.9", "ok"), ("3.19.0", "warning")):
        monkeypatch.setattr(setup_problems, "version", lambda _, found=version: found)
        found = named(checks.versions(), "mlflow")
        assert found.level == level and version in found.detail
        assert "3.17 以上 3.19 未満" in found.detail
        assert bool(found.fix) == (level == "warning")


def test_works_where_mlflow_cannot_even_be_imported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.py").write_text("raise ImportError('broken')")
    environment = without_settings(dict(os.environ)) | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "PYTHONIOENCODING": "utf-8",
    }
    job = subprocess.run(
        [sys.executable, "-m", "chapter8_samples", "doctor"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=60,
    )
    assert job.returncode == 1 and "Traceback" not in job.stderr, job.stderr
    assert "接続先" in job.stdout and "NG" in job.stdout


def test_the_database_of_another_app_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE customers (name TEXT)")
    before = path.read_bytes()
    (found,) = checks.backend({"MLFLOW_TRACKING_URI": f"sqlite:///{path}?key=s3cret"})
    assert found.level == "ok" and "s3cret" not in found.detail
    assert path.read_bytes() == before
