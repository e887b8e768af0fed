"""診断: 何を見つけ、何と直し方を示し、何を決して見せないか。"""

from __future__ import annotations

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
from typing import Any, ClassVar
from urllib.parse import quote

import mlflow
import pytest
from conftest import without_settings
from hypothesis import example, given, settings
from hypothesis import strategies as st
from samples import ROOT, run_as_reader

from chapter8_samples.__main__ import main
from chapter8_samples._lab import doctor as doctor_package
from chapter8_samples._lab.doctor import checks, run, services, setup_problems
from chapter8_samples._lab.doctor import settings as rules
from chapter8_samples._lab.doctor.finding import Finding
from chapter8_samples._lab.doctor.setup_problems import shown

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
    return {f.name: f.level for f in rules.conflicts({**environment, "PYTHONUTF8": "1"})}


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


@given(SECRETS)
@example("p//q://r@s")
def test_passwords_that_are_not_encoded_are_known(secret: str) -> None:
    secret = f"Q{secret}Q"
    for scheme in ("http://", "postgresql://", ""):
        address = f"{scheme}user:{secret}@host/db"
        hidden = sorted(run.secrets({"MLFLOW_TRACKING_URI": address}), key=len, reverse=True)
        for text in (address, f"said {secret}."):
            masked = run._without_secrets(Finding("x", "error", text), hidden)
            assert secret not in masked.detail


@settings(max_examples=30)
@given(SECRETS)
def test_no_finding_repeats_a_secret(secret: str) -> None:
    """どの診断が何を書こうと、最後に必ず伏せる。"""
    # Basic 認証の値に空白はない
    secret, header = f"Q{secret}Q", f"H{secret.replace(' ', '_')}H"
    environment = {
        "OPENAI_API_KEY": secret,
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Basic%20{quote(header, safe='')},x=1",
        "MLFLOW_TRACKING_URI": f"postgresql://user:{quote(secret, safe='')}@host/db?token={secret}",
    }
    hidden = sorted(run.secrets(environment), key=len, reverse=True)
    texts = [*environment.values(), quote(secret, safe=""), f"said {secret}.", f"sent {header}"]
    for text in texts:
        shown_finding = run._without_secrets(Finding("x", "error", text, text), hidden)
        printed = run.to_text([shown_finding]) + run.to_json([shown_finding])
        for value in (secret, header):
            assert value not in printed and quote(value, safe="") not in printed


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


def test_ordinary_words_are_not_taken_for_secrets() -> None:
    """``TOKENIZERS_PARALLELISM=false`` のせいで、直し方の ``false`` まで伏せてしまわない。"""
    environment = {**GRPC, "TOKENIZERS_PARALLELISM": "false", "USE_AUTH": "True", "A_KEY": "tru3"}
    assert run.secrets(environment) == {"tru3"}
    text = run.to_text(run.diagnose({**environment, "PYTHONUTF8": "1"}))
    assert "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT=true にするか" in text


# 食い違う設定 --------------------------------------------------------------


def test_nothing_to_say_about_a_clean_environment() -> None:
    assert levels({}) == {"設定の食い違い": "ok"}
    assert levels({**GRPC, **DUAL}) == levels({**HTTP, **DUAL}) == {"設定の食い違い": "ok"}


FIGHTS: list[tuple[dict[str, str], str, str]] = [
    (GRPC, "OTLP と MLflow", "error"),
    ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4317"}, "OTLP と MLflow", "error"),
    ({**GRPC, "MLFLOW_ENABLE_DUAL_EXPORT": "true"}, "二重送信の名前", "warning"),
    (
        {**DUAL, **HTTP, "MLFLOW_TRACKING_URI": "http://127.0.0.1:4318"},
        "OTLP の送り先",
        "error",
    ),
    (
        {**DUAL, "OTEL_EXPORTER_OTLP_ENDPOINT": "http://h:4317"},
        "OTLP のメトリクス",
        "warning",
    ),
    (
        {**DUAL, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "collector:4317"},
        "OTLP の値",
        "error",
    ),
    ({**DUAL, **GRPC, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}, "OTLP の値", "error"),
    (
        {**DUAL, **HTTP, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://h:4318"},
        "OTLP の値",
        "error",
    ),
    ({**DUAL, **GRPC, "OTEL_EXPORTER_OTLP_COMPRESSION": "deflate"}, "OTLP の値", "error"),
    ({**DUAL, **GRPC, "OTEL_EXPORTER_OTLP_CERTIFICATE": "/no/ca.pem"}, "OTLP の値", "error"),
    ({**DUAL, **GRPC, "OTEL_EXPORTER_OTLP_TIMEOUT": "10000"}, "OTLP の期限", "warning"),
    ({**DUAL, **GRPC, "OTEL_EXPORTER_OTLP_TIMEOUT": "10s"}, "OTLP の値", "error"),
    ({"OTEL_SDK_DISABLED": "true"}, "OpenTelemetry", "error"),
    ({"OTEL_TRACES_SAMPLER": "always_off"}, "OTEL_TRACES_SAMPLER", "warning"),
    ({"OTEL_RESOURCE_ATTRIBUTES": "team=search,"}, "リソース属性", "warning"),
    ({"MLFLOW_EXPERIMENT_ID": "1"}, "エクスペリメントの指定", "warning"),
    ({"MLFLOW_EXPERIMENT_NAME": "x"}, "エクスペリメントの指定", "warning"),
    ({"MLFLOW_TRACE_SAMPLING_RATIO": "0.1"}, "サンプリング", "warning"),
    ({"MLFLOW_TRACE_SAMPLING_RATIO": "10"}, "MLFLOW_TRACE_SAMPLING_RATIO", "error"),
    ({"MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": ""}, "非同期の記録", "warning"),
    ({"MLFLOW_TRACE_BUFFER_MAX_SIZE": "20000"}, "キューの上限", "warning"),
    ({"MLFLOW_TRACE_BUFFER_MAX_SIZE": "many"}, "MLFLOW_TRACE_BUFFER_MAX_SIZE", "error"),
    ({"MLFLOW_TRACE_TIMEOUT_SECONDS": "60"}, "終わらないトレース", "warning"),
    ({"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}, "サーバーのジョブ", "warning"),
    ({"MLFLOW_TRACKING_USERNAME": "u"}, "サーバーの認証", "error"),
    ({"MLFLOW_TRACKING_INSECURE_TLS": "true"}, "サーバーの証明書", "warning"),
    (
        {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_TRACKING_TOKEN": "t"},
        "サーバーの認証",
        "warning",
    ),
    ({"HTTP_PROXY": "http://proxy:8080", "NO_PROXY": "example.com"}, "プロキシ", "warning"),
]


def test_settings_that_fight_each_other() -> None:
    for environment, name, level in FIGHTS:
        found = {f.name: f for f in rules.conflicts({**environment, "PYTHONUTF8": "1"})}
        assert found[name].level == level and found[name].fix, (environment, found)


def test_a_wrong_value_is_named() -> None:
    for name, value in (
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
        ("MLFLOW_TRACE_SAMPLING_RATIO", "10"),
    ):
        (wrong,) = rules.Settings({**DUAL, **GRPC, name: value}).wrong
        assert repr(value) in wrong.detail, wrong


GOOD: list[dict[str, str]] = [
    {**GRPC, "MLFLOW_ENABLE_OTLP_EXPORTER": "false"},
    {"MLFLOW_TRACE_SAMPLING_RATIO": "1.0"},
    {"MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": "true"},
    dict.fromkeys(rules.QUEUE_LIMITS, "20000"),
    {"MLFLOW_TRACKING_USERNAME": "u", "MLFLOW_TRACKING_PASSWORD": "p"},
    {"HTTP_PROXY": "http://proxy:8080", "NO_PROXY": "localhost, 127.0.0.1"},
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


@pytest.mark.parametrize("encoding", ["cp932", "utf-8"])
def test_consoles_that_cannot_show_everything(tmp_path: Path, encoding: str) -> None:
    job = run_as_reader(
        ["-m", "chapter8_samples", "doctor"],
        tmp_path,
        environment={"PYTHONPATH": str(ROOT)},
        encoding=encoding,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert ("端末の文字コード" in job.stdout) == (encoding == "cp932")
    assert "\\u" not in job.stdout


# 本物の相手 ----------------------------------------------------------------


def diagnosed(environment: dict[str, str], experiment: str | None = None) -> list[Finding]:
    return list(checks.backend(environment, experiment))


@pytest.mark.slow
def test_a_server_that_answers(mlflow_server_url: str) -> None:
    name = f"doctor-{time.time_ns()}"
    mlflow.set_experiment(name)
    found = diagnosed({"MLFLOW_TRACKING_URI": mlflow_server_url}, name)
    assert {finding.level for finding in found} == {"ok"}
    assert named(found, "サーバーの版").detail == mlflow.__version__
    assert "読み書きできます" in named(found, "エクスペリメント").detail
    tags = mlflow.get_experiment_by_name(name).tags
    assert checks.TAG not in tags


@pytest.mark.slow
def test_experiments_that_cannot_be_used(mlflow_server_url: str) -> None:
    environment = {"MLFLOW_TRACKING_URI": mlflow_server_url}
    missing = named(diagnosed(environment, "nothere"), "エクスペリメント")
    assert missing.level == "error" and "ありません" in missing.detail
    later = {**environment, "MLFLOW_EXPERIMENT_NAME": "later"}
    assert named(diagnosed(later), "エクスペリメント").level == "warning"
    gone = mlflow.create_experiment(f"gone-{time.time_ns()}")
    mlflow.delete_experiment(gone)
    found = named(diagnosed({**environment, "MLFLOW_EXPERIMENT_ID": gone}), "エクスペリメント")
    assert found.level == "error" and "restore" in found.fix


@pytest.mark.slow
def test_scorers_started_where_no_job_runs(mlflow_server_url: str) -> None:
    from mlflow.genai.scorers import Safety, ScorerSamplingConfig

    from chapter8_samples.quality_monitoring import ensure_judge_endpoint

    mlflow.set_tracking_uri(mlflow_server_url)
    name = f"doctor-scorers-{time.time_ns()}"
    mlflow.set_experiment(name)
    judge = ensure_judge_endpoint("doctor-judge", api_key="sk-x")
    scorer = Safety(name="safety_check", model=judge).register()
    environment = {"MLFLOW_TRACKING_URI": mlflow_server_url}
    assert "サーバーでの採点" not in {f.name for f in diagnosed(environment, name)}
    scorer.start(sampling_config=ScorerSamplingConfig(sample_rate=1.0))
    found = named(diagnosed(environment, name), "サーバーでの採点")
    assert found.level == "error" and "run_scoring_cycle" in found.fix
    gateway = {**environment, "MLFLOW_GENAI_JUDGE_DEFAULT_MODEL": "gateway:/doctor-judge"}
    assert next(services.judge(gateway)).level == "ok"
    gateway["MLFLOW_GENAI_JUDGE_DEFAULT_MODEL"] = "gateway:/nothere"
    assert next(services.judge(gateway)).level == "error"


class _Answers(BaseHTTPRequestHandler):
    """決まった答えを返す相手。``status`` が 0 なら答えず、1 なら少しずつ答え続ける。"""

    status, body, release = 200, b"<html>", Event()
    seen: ClassVar[dict[str, str]] = {}

    def do_POST(self) -> None:
        self.seen.update(self.headers)
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
    kind = type("Kind", (_Answers,), {"release": Event(), "seen": {}})
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
        found = named(diagnosed({"MLFLOW_TRACKING_URI": stranger.url}), "接続先")
        assert found.level == "error" and words in found.detail and found.fix


@pytest.mark.slow
@pytest.mark.parametrize("status", [0, 1])
def test_a_server_that_never_answers_does_not_hang_the_doctor(
    stranger: Any, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    stranger.status = status
    monkeypatch.setattr(checks, "SECONDS", 0.5)
    environment = {"MLFLOW_TRACKING_URI": stranger.url, **HTTP}
    environment["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"] = f"{stranger.url}/v1/traces"
    began = time.monotonic()
    assert named(diagnosed(environment), "接続先").level == "error"
    assert named(services.otlp(environment), "OTLP").level == "error"
    assert time.monotonic() - began < 20


def test_an_experiment_that_was_not_looked_for_is_said(tmp_path: Path) -> None:
    later = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'later.db'}"}
    for environment in ({}, later, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}):
        found = named(diagnosed(environment, "my-app"), "エクスペリメント")
        assert found.level == "warning" and "my-app は調べていません" in found.detail


@pytest.mark.slow
def test_databases(tmp_path: Path, database_template: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert "まだありません" in named(diagnosed({"MLFLOW_TRACKING_URI": uri}), "接続先").detail
    assert not (tmp_path / "mlflow.db").exists()
    sqlite3.connect(tmp_path / "mlflow.db").close()
    (tmp_path / "mlflow.db").touch()
    assert "空です" in named(diagnosed({"MLFLOW_TRACKING_URI": uri}), "接続先").detail
    shutil.copy(database_template, tmp_path / "mlflow.db")
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("x")
    found = diagnosed({"MLFLOW_TRACKING_URI": uri}, "x")
    assert [finding.level for finding in found] == ["ok", "ok"]
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        assert "locked" in named(diagnosed({"MLFLOW_TRACKING_URI": uri}), "接続先").detail
        other.rollback()
    nowhere = {"MLFLOW_TRACKING_URI": "sqlite:////no/folder/mlflow.db"}
    assert named(diagnosed(nowhere), "接続先").level == "error"
    files = {"MLFLOW_TRACKING_URI": str(tmp_path / "mlruns")}
    assert named(diagnosed(files), "接続先").level == "error"


def test_otlp_receivers(otlp: Any) -> None:
    grpc = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": otlp.grpc_endpoint}
    http = {**HTTP, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": otlp.http_endpoint}
    for environment in (grpc, http):
        assert named(services.otlp(environment), "OTLP").level == "ok"
    otlp.wait_for(spans=2)
    wrong = {**http, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": otlp.http_endpoint + "x"}
    assert "受信エンドポイントがありません" in named(services.otlp(wrong), "OTLP").detail
    closed = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:9"}
    assert "接続できません" in named(services.otlp(closed), "OTLP").detail
    off = {**grpc, "MLFLOW_ENABLE_OTLP_EXPORTER": "false"}
    assert "送らない" in named(services.otlp(off), "OTLP").detail


def test_the_key_of_the_otlp_receiver_is_sent(stranger: Any) -> None:
    environment = {**HTTP, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{stranger.url}/v1/traces"}
    environment["OTEL_EXPORTER_OTLP_TRACES_HEADERS"] = "x-api-key=a%20b"
    assert named(services.otlp(environment), "OTLP").level == "ok"
    assert stranger.seen["x-api-key"] == "a b"
    stranger.status = 401
    assert "鍵を受け付けません" in named(services.otlp(environment), "OTLP").detail


def test_every_answer_of_the_connection_check_is_translated() -> None:
    from chapter8_samples.opentelemetry.export import delivery as otlp_delivery

    assert {*services._ANSWERS, "ok"} == {*otlp_delivery._FIXES}


def test_judges() -> None:
    assert next(services.judge({})).level == "warning"
    assert next(services.judge({"OPENAI_API_KEY": "k"})).level == "ok"
    assert next(services.judge({"MLFLOW_TRACKING_URI": "databricks"})).level == "ok"
    gateway = {"MLFLOW_GENAI_JUDGE_DEFAULT_MODEL": "gateway:/judge"}
    for uri in ("sqlite:///x.db", "http://127.0.0.1:9"):
        found = next(services.judge({**gateway, "MLFLOW_TRACKING_URI": uri}))
        assert found.level == "error" and "ensure_judge_endpoint" in found.fix


def test_a_judge_that_is_no_model_is_named() -> None:
    for model in ("gpt-4o", "openai/gpt-4o", "openai:/", ":/gpt-4o"):
        found = next(services.judge({"MLFLOW_GENAI_JUDGE_DEFAULT_MODEL": model}))
        assert found.level == "error" and repr(model) in found.detail and "openai:/" in found.fix


def test_the_default_judge_is_the_one_of_the_chapter() -> None:
    from chapter8_samples.quality_monitoring.scoring import judges

    assert services.DEFAULT_JUDGE == judges.DEFAULT_JUDGE


# 終了ステータスと、壊れた環境 ----------------------------------------------


def test_json_for_ci(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in {**GRPC, "CHAPTER8_LAB": "/dev/null/x"}.items():
        monkeypatch.setenv(name, value)
    status, out = doctor(capsys, "--json")
    told = json.loads(out)
    assert status == 1 and told["ok"] is False
    bad = {item["name"] for item in told["findings"] if item["level"] == "error"}
    assert {"手元のデータ", "OTLP と MLflow"} <= bad
    assert all(item["fix"] for item in told["findings"] if item["level"] != "ok")


def test_one_broken_check_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> Iterator[Finding]:
        yield Finding("途中", "ok", "ここまでは分かった")
        raise ZeroDivisionError("s3cret")

    monkeypatch.setattr(services, "judge", broken)
    found = run.diagnose({})
    assert named(found, "ジャッジ").level == "error" and "s3cret" not in run.to_text(found)
    assert named(found, "OTLP").level == named(found, "途中").level == "ok"


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
        for module in (checks, setup_problems):
            monkeypatch.setattr(module, "version", lambda _, found=version: found)
        found = named(checks.versions(), "mlflow")
        assert found.level == level and version in found.detail
        assert "3.17 以上 3.19 未満" in found.detail
        assert bool(found.fix) == (level == "warning")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydantic", None)
    monkeypatch.delitem(sys.modules, rules.__name__)
    monkeypatch.delitem(sys.modules, services.__name__)
    for module in (rules, services):
        monkeypatch.delattr(doctor_package, module.__name__.rpartition(".")[2])
    found = named(run.diagnose({}), "設定")
    assert found.level == "error" and "pydantic が入っていません" in found.detail


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
