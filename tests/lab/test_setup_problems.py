"""用意を誤ったとき: トレースバックでなく、直し方の分かる日本語と終了ステータス 1 で終わる。"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import mlflow
import pytest
import requests
from mlflow.exceptions import MlflowException
from openai import OpenAI
from samples import ROOT, run_as_reader

from chapter8_samples import _lab
from chapter8_samples.__main__ import main
from chapter8_samples._lab.doctor import setup_problems
from chapter8_samples._lab.doctor.setup_problems import bounded, explain
from chapter8_samples._lab.servers.receivers import WebhookReceiver

NOWHERE = "http://127.0.0.1:9"
UNWRITABLE = "/dev/null/x"  # root でも書けない
LLM_PAGE = ROOT / "chapter8_samples/02_cost_tracking/token_tracking.py"


class _Refuses(BaseHTTPRequestHandler):
    """何にでも 401 と答える。"""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b'{"error": {"message": "bad key"}, "error_code": "UNAUTHENTICATED"}'
        self.send_response(401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def refusing() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Refuses)
    Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def said(run: Callable[[], object]) -> str:
    """``SystemExit`` の、日本語の説明(文字列なら、Python が標準エラーに書いて 1 で終わる)。"""
    with pytest.raises(SystemExit) as end:
        run()
    text = end.value.code
    assert isinstance(text, str) and "\n  -> " in text
    return text


def sample() -> None:
    """どのサンプルの ``main()`` もすること。"""
    with _lab.sample("ch8-problem"):
        mlflow.search_traces()


def report() -> None:
    main(["report", "--experiment", "x"])


@pytest.mark.slow
def test_the_reader_sees_the_explanation_and_no_traceback(tmp_path: Path) -> None:
    here = {"MLFLOW_TRACKING_URI": NOWHERE, "PYTHONPATH": str(ROOT)}
    run = run_as_reader([LLM_PAGE], tmp_path, environment=here)
    assert run.returncode == 1 and "Traceback" not in run.stdout + run.stderr, run.stderr
    assert f"MLflow サーバー {NOWHERE} が答えません" in run.stderr and "\n  -> " in run.stderr


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    for command in (sample, report):
        text = said(command)
        assert f"MLflow サーバー {NOWHERE} が答えません" in text and "mlflow server" in text


def test_no_databricks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    monkeypatch.setenv("HOME", str(tmp_path))
    text = said(sample)
    assert "Databricks に接続できません" in text and "DATABRICKS_HOST" in text


def test_wrong_key(refusing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", refusing)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "wrong-s3cret")
    for command in (sample, report):
        text = said(command)
        assert "鍵を受け付けません" in text and "MLFLOW_TRACKING_TOKEN" in text
        assert "wrong-s3cret" not in text


@pytest.mark.slow
def test_wrong_key_of_the_llm_and_no_llm(
    tracking_uri: str, refusing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> None:
        with _lab.sample(llm=True):
            chat = OpenAI(max_retries=0).chat.completions
            chat.create(model="gpt-4o", messages=[{"role": "user", "content": "返品"}])

    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    for base, words in (
        (f"{refusing}/v1", "API キーを受け付けません"),
        (NOWHERE, "接続できません"),
    ):
        monkeypatch.setenv("OPENAI_BASE_URL", base)
        text = said(ask)
        assert words in text and "CHAPTER8_OFFLINE" in text and "sk-wrong" not in text


@pytest.mark.slow
def test_wrong_experiment(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow.delete_experiment(mlflow.create_experiment("ch8-problem"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    assert "削除されています" in said(sample)
    text = said(report)
    assert "エクスペリメント 'x' は" in text and "確かめてください" in text


@pytest.mark.slow
def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for place in (UNWRITABLE, str(tmp_path / "file")):
        monkeypatch.setenv("CHAPTER8_LAB", place)
        for command in ([], ["--fresh"], ["report"], ["ui"], ["serve"]):
            text = said(lambda command=command: main(command))
            assert f"{place} に書き込めません" in text and "CHAPTER8_LAB" in text
        assert f"{place} に書き込めません" in said(sample)


def test_report_that_cannot_be_written_is_known_first(
    tmp_path: Path, tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 秒のシナリオの最後ではなく、手元のデータを消す前に分かる。"""
    (tmp_path / "health_report.html").mkdir()
    for command in ([], ["--fresh"]):
        assert "health_report.html に書き込めません" in said(lambda c=command: main(c))
    assert not (tmp_path / ".chapter8").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    for output, words in {
        "health_report.html": "health_report.html に書き込めません",
        "no/report.html": "no がありません",
        f"{UNWRITABLE}.html": "/dev/null がありません",
    }.items():
        assert words in said(lambda o=output: main(["report", "-o", o]))


def test_backends_that_do_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "junk.db").write_bytes(bytes(range(256)) * 8)
    for uri, words in {
        "mlruns": "ファイルの保存先",
        "foo://bar": "foo://bar の種類は使えません",
        "sqlite:///junk.db": "junk.db は SQLite のデータベースではありません",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert words in said(sample)
        assert words in said(report)


@pytest.mark.slow
def test_a_proxy_is_not_asked_for_what_is_here(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """社内のプロキシを設定した端末でも、手元の LLM スタブと受信サーバーに届く。"""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, NOWHERE)
    monkeypatch.setenv("all_proxy", NOWHERE)
    for excluded in ({"NO_PROXY": "intra.example", "no_proxy": ""}, {}):
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name, value in excluded.items():
            monkeypatch.setenv(name, value)
        with _lab.sample(llm=True):
            assert OpenAI(max_retries=0).embeddings.create(model="e", input="返品").data
        with WebhookReceiver() as hooks:
            assert requests.post(hooks.url, timeout=5).status_code == 200


def test_what_the_user_excludes_from_the_proxy_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[dict[str, str], str]] = [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "a.example, localhost"}, "a.example,localhost,127.0.0.1"),
        ({"no_proxy": "b.example", "NO_PROXY": "a.example"}, "b.example,127.0.0.1,localhost"),
        ({"no_proxy": "*"}, "*"),
    ]
    for given, wanted in cases:
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        _lab.bypass_proxy()
        assert os.environ["no_proxy"] == wanted


def test_port_taken() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        text = said(lambda: main(["ui", "--port", str(port)]))
    assert f"ポート {port} は" in text and "--port" in text


def test_old_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_problems, "version", lambda _: "3.9.0")
    runs = [
        lambda command=command: main(command) for command in ([], ["report"], ["ui"], ["serve"])
    ]
    for run in (sample, *runs):
        text = said(run)
        assert "MLflow 3.9.0 は古すぎます" in text
        assert 'pip install -U "mlflow>=3.17,<4"' in text


@pytest.mark.slow
def test_other_errors_keep_their_traceback(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """原因の分からない失敗を、分かったふりで隠さない。"""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    for error in (
        ValueError("bad value"),
        FileNotFoundError(2, "No such file", "x.json"),
        MlflowException("the trace is broken"),
        MlflowException("found 401 traces"),
        RuntimeError("401"),
        ModuleNotFoundError("x", name="chapter8_samples.no_such_module"),
    ):
        assert explain(error) is None
        with pytest.raises(type(error)) as raised, _lab.sample("ch8-broken"):
            raise error
        assert raised.value is error


def test_settings_are_put_back_after_a_problem(tmp_path: Path) -> None:
    before = dict(os.environ)
    os.environ["MLFLOW_TRACKING_URI"] = NOWHERE
    with pytest.raises(SystemExit, match="答えません"), _lab.sample("x"):
        pass
    assert os.environ["MLFLOW_TRACKING_URI"] == NOWHERE
    assert {**before, "MLFLOW_TRACKING_URI": NOWHERE} == dict(os.environ)


def test_bounded_gives_up_and_passes_errors_on() -> None:
    with pytest.raises(TimeoutError):
        bounded(threading.Event().wait, 0.05)
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 / 0, 5)
    assert bounded(lambda: None, 5) is None
