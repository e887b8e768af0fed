"""用意を誤ったとき: トレースバックでなく、直し方の分かる日本語と終了ステータス 1 で終わる。"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from samples import ROOT, run_as_reader

from chapter8_samples import _lab
from chapter8_samples._lab.doctor.setup_problems import bounded, explain

NOWHERE = "http://127.0.0.1:9"
UNWRITABLE = "/dev/null/x"  # root でも書けない
SAMPLE = ROOT / "chapter8_samples/02_cost_tracking/trace_reader.py"
LLM_SAMPLE = ROOT / "chapter8_samples/02_cost_tracking/trace_costs.py"
NOTIFYING_SAMPLE = ROOT / "chapter8_samples/04_alerting/notification_handlers.py"
JOB = ("-m", "chapter8_samples")


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
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def said(
    tmp_path: Path, *arguments: str | Path, environment: Mapping[str, str] | None = None
) -> str:
    """1 で終わったコマンドの、日本語の説明。"""
    settings = {"PYTHONPATH": str(ROOT), **(environment or {})}
    run = run_as_reader(arguments, tmp_path, environment=settings, timeout=100)
    return checked(run)


def checked(run: subprocess.CompletedProcess[str]) -> str:
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr, run.stderr
    assert "\n  -> " in run.stderr, run.stdout + run.stderr
    return run.stderr


def test_no_server(tmp_path: Path) -> None:
    here = {"MLFLOW_TRACKING_URI": NOWHERE}
    for command in ((SAMPLE,), (*JOB, "report", "--experiment", "x")):
        text = said(tmp_path, *command, environment=here)
        assert f"MLflow サーバー {NOWHERE} が答えません" in text and "mlflow server" in text


def test_no_database_server(tmp_path: Path) -> None:
    here = {"MLFLOW_TRACKING_URI": "postgresql+psycopg2://u:s3cret@127.0.0.1:9/db"}
    text = said(tmp_path, SAMPLE, environment=here)
    assert "データベースのサーバー postgresql+psycopg2://127.0.0.1:9/db が答えません" in text


def test_no_databricks(tmp_path: Path) -> None:
    here = {"MLFLOW_TRACKING_URI": "databricks", "HOME": str(tmp_path)}
    text = said(tmp_path, SAMPLE, environment=here)
    assert "Databricks に接続できません" in text and "DATABRICKS_HOST" in text


def test_wrong_key(tmp_path: Path, refusing: str) -> None:
    here = {"MLFLOW_TRACKING_URI": refusing, "MLFLOW_TRACKING_TOKEN": "wrong-s3cret"}
    for command in ((SAMPLE,), (*JOB, "report", "--experiment", "x")):
        text = said(tmp_path, *command, environment=here)
        assert "鍵を受け付けません" in text and "MLFLOW_TRACKING_TOKEN" in text
        assert "wrong-s3cret" not in text


def test_wrong_key_of_the_llm_and_no_llm(tmp_path: Path, refusing: str) -> None:
    for base, words in (
        (f"{refusing}/v1", "API キーを受け付けません"),
        (NOWHERE, "接続できません"),
    ):
        here = {"OPENAI_API_KEY": "sk-wrong", "OPENAI_BASE_URL": base}
        text = said(tmp_path, LLM_SAMPLE, environment=here)
        assert words in text and "CHAPTER8_OFFLINE" in text and "sk-wrong" not in text


def test_wrong_experiment(tmp_path: Path) -> None:
    uri = f"sqlite:///{(tmp_path / 'mlflow.db').as_posix()}"
    mlflow.set_tracking_uri(uri)
    mlflow.delete_experiment(mlflow.create_experiment("ch8-trace-reader"))
    here = {"MLFLOW_TRACKING_URI": uri}
    assert "削除されています" in said(tmp_path, SAMPLE, environment=here)
    text = said(tmp_path, *JOB, "report", "--experiment", "ch8-typo", environment=here)
    assert "エクスペリメント 'ch8-typo' は" in text and "確かめてください" in text


@pytest.mark.parametrize("command", [(SAMPLE,), JOB, (*JOB, "report"), (*JOB, "ui")])
def test_folder_that_cannot_be_written(tmp_path: Path, command: tuple[str | Path, ...]) -> None:
    text = said(tmp_path, *command, environment={"CHAPTER8_LAB": UNWRITABLE})
    assert f"{UNWRITABLE} に書き込めません" in text and "CHAPTER8_LAB" in text


@pytest.mark.parametrize("command", [JOB, (*JOB, "--fresh"), (*JOB, "report")])
def test_data_folder_that_is_a_file(tmp_path: Path, command: tuple[str | Path, ...]) -> None:
    (tmp_path / "file").touch()
    text = said(tmp_path, *command, environment={"CHAPTER8_LAB": str(tmp_path / "file")})
    assert "file に書き込めません" in text and "CHAPTER8_LAB" in text


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("folder", "folder に書き込めません"),
        ("no/report.html", "no がありません"),
        (f"{UNWRITABLE}.html", "/dev/null がありません"),
    ],
)
def test_report_that_cannot_be_written_is_known_first(
    tmp_path: Path, output: str, words: str
) -> None:
    """40 秒のシナリオの最後ではなく、手元のデータを消す前に分かる。"""
    (tmp_path / "folder").mkdir()
    for command in (JOB, (*JOB, "--fresh"), (*JOB, "report")):
        assert words in said(tmp_path, *command, "-o", output)
    assert not (tmp_path / ".chapter8").exists()


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("mlruns", "ファイルの保存先"),
        ("foo://bar", "foo://bar の種類は使えません"),
        ("sqlite:///junk.db", "junk.db は SQLite のデータベースではありません"),
    ],
)
def test_backends_that_do_not_exist(tmp_path: Path, uri: str, words: str) -> None:
    (tmp_path / "junk.db").write_bytes(bytes(range(256)) * 8)
    here = {"MLFLOW_TRACKING_URI": uri}
    assert words in said(tmp_path, SAMPLE, environment=here)
    assert words in said(tmp_path, *JOB, "report", "--experiment", "x", environment=here)


def test_names_that_are_not_there(tracking_uri: str) -> None:
    client = mlflow.MlflowClient()
    for ask, words in (
        (lambda: client.get_experiment("999"), "MLFLOW_EXPERIMENT_ID"),
        (lambda: client.get_registered_model("nobody"), "登録済みモデル 'nobody'"),
    ):
        with pytest.raises(MlflowException) as error:
            ask()
        assert words in str(explain(error.value))


@pytest.mark.parametrize("sample", [LLM_SAMPLE, NOTIFYING_SAMPLE], ids=lambda path: path.stem)
def test_a_proxy_is_not_asked_for_what_is_here(tmp_path: Path, sample: Path) -> None:
    """社内のプロキシを設定した端末でも、手元の LLM スタブと受信サーバーに届く。"""
    names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    proxy = dict.fromkeys(names, NOWHERE) | {"NO_PROXY": "intra.example", "no_proxy": ""}
    run = run_as_reader([sample], tmp_path, environment=proxy)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, "127.0.0.1,localhost"),
        ({"NO_PROXY": "a.example, localhost"}, "a.example,localhost,127.0.0.1"),
        ({"no_proxy": "b.example", "NO_PROXY": "a.example"}, "b.example,127.0.0.1,localhost"),
        ({"no_proxy": "*"}, "*"),
    ],
)
def test_what_the_user_excludes_from_the_proxy_is_kept(
    given: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    _lab.bypass_proxy()
    assert os.environ["no_proxy"] == wanted


def test_port_taken(tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        text = said(tmp_path, *JOB, "ui", "--port", str(port))
    assert f"ポート {port} は" in text and "--port" in text


@pytest.mark.parametrize(
    "command", [(SAMPLE,), JOB, (*JOB, "report"), (*JOB, "ui"), (*JOB, "serve")]
)
def test_old_mlflow(tmp_path: Path, command: tuple[str | Path, ...]) -> None:
    info = tmp_path / "old" / "mlflow-3.9.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mlflow\nVersion: 3.9.0\n")
    path = os.pathsep.join([str(info.parent), str(ROOT)])
    text = said(tmp_path, *command, environment={"PYTHONPATH": path})
    assert "MLflow 3.9.0 は古すぎます" in text and 'pip install -U "mlflow>=3.17,<4"' in text


@pytest.mark.parametrize(
    "error",
    [
        ValueError("bad value"),
        FileNotFoundError(2, "No such file", "x.json"),
        MlflowException("the trace is broken"),
        MlflowException("found 401 traces"),
        RuntimeError("401"),
        ModuleNotFoundError("x", name="chapter8_samples.no_such_module"),
    ],
)
def test_other_errors_keep_their_traceback(error: Exception) -> None:
    """原因の分からない失敗を、分かったふりで隠さない。"""
    assert explain(error) is None
    with pytest.raises(type(error)), _lab.sample("ch8-broken"):
        raise error


def test_settings_are_put_back_after_a_problem(tmp_path: Path) -> None:
    before = dict(os.environ)
    os.environ["MLFLOW_TRACKING_URI"] = NOWHERE
    with pytest.raises(SystemExit, match="答えません"), _lab.sample("x"):
        pass
    assert os.environ["MLFLOW_TRACKING_URI"] == NOWHERE
    assert {**before, "MLFLOW_TRACKING_URI": NOWHERE} == dict(os.environ)


def test_bounded_gives_up_and_passes_errors_on() -> None:
    import threading

    with pytest.raises(TimeoutError):
        bounded(threading.Event().wait, 0.05)
    with pytest.raises(ZeroDivisionError):
        bounded(lambda: 1 / 0, 5)
    assert bounded(lambda: None, 5) is None
