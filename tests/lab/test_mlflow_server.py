"""本物の mlflow server を起動し、どう終わってもプロセスもポートも残さないこと。"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests

from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.servers import mlflow_server
from chapter8_samples._lab.servers.mlflow_server import MlflowServer, MlflowServerError

GUARD = Path(mlflow_server.__file__).with_name("process_guard.py")

posix_only = pytest.mark.skipif(os.name != "posix", reason="process groups exist on POSIX only")


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def port_open(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) == 0


@posix_only
@pytest.mark.slow
def test_real_server_survives_a_kill_with_its_data_and_leaves_nothing(tmp_path: Path) -> None:
    with MlflowServer(tmp_path / "home") as server:
        url, group = server.url, server.pid
        mlflow.set_tracking_uri(url)
        mlflow.set_experiment("server-test")
        with mlflow.start_span("work") as span:
            span.set_outputs("完了")
        mlflow.flush_trace_async_logging()
        assert "Security middleware" in server.log_path.read_text(encoding="utf-8")
        assert (tmp_path / "home" / "mlflow.db").exists()
        server.kill()
        assert eventually(lambda: not group_alive(group)) and not port_open(url)
        server.start()
        assert server.url == url
        group = server.pid
        assert mlflow.get_trace(span.trace_id) is not None
    assert not group_alive(group) and not port_open(url)
    server.stop()
    with pytest.raises(RuntimeError, match="not running"):
        _ = server.pid


@posix_only
@pytest.mark.slow
def test_no_orphan_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = f"""
        import os, sys, time
        from pathlib import Path
        from chapter8_samples._lab.servers.mlflow_server import MlflowServer
        server = MlflowServer(Path({str(tmp_path / "home")!r}), jobs=True).start()
        heir = os.fork()  # 見張りへのパイプの写しを持ったまま、親が終わっても残る
        if heir:
            print(server.pid, server.url, heir, flush=True)
        time.sleep(600)
    """
    root = Path(mlflow_server.__file__).resolve().parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    assert parent.stdout is not None
    group, url, heir = parent.stdout.readline().split()
    children = _group_members(int(group))
    assert len(children) >= 3 and port_open(url)
    parent.kill()
    parent.wait(10)
    assert eventually(lambda: not group_alive(int(group)))
    assert not port_open(url)
    assert not any(_alive(pid) for pid in children)
    os.kill(int(heir), signal.SIGKILL)  # いなければ、ここで失敗する
    parent.communicate(timeout=10)


@pytest.mark.slow
def test_gateway_of_the_job_server_reaches_the_stub(tmp_path: Path, stub_llm: StubLlm) -> None:
    with MlflowServer(tmp_path, jobs=True) as server:
        api = f"{server.url}/api/3.0/mlflow/gateway"
        secret = _post(
            f"{api}/secrets/create",
            secret_name="judge-key",
            secret_value={"api_key": "sk-local"},
            provider="openai",
            auth_config={"api_base": stub_llm.base_url},
        )["secret"]["secret_id"]
        model = _post(
            f"{api}/model-definitions/create",
            name="judge-model",
            secret_id=secret,
            provider="openai",
            model_name="gpt-4.1-mini",
        )["model_definition"]["model_definition_id"]
        link = {"model_definition_id": model, "linkage_type": "PRIMARY", "weight": 1.0}
        _post(f"{api}/endpoints/create", name="judge", model_configs=[link], usage_tracking=False)
        reply = _post(
            f"{server.url}/gateway/judge/mlflow/invocations",
            messages=[{"role": "user", "content": "こんにちは"}],
        )
    assert "こんにちは" in reply["choices"][0]["message"]["content"]
    assert reply["model"] == "gpt-4.1-mini-2025-04-14"


@pytest.mark.slow
def test_stop_waits_until_the_port_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """強制終了では、見張りが先に終わり、サーバーがまだポートを閉じていないことがある。"""
    code = (
        "import http.server, sys\n"
        "class Ok(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Ok).serve_forever()\n"
    )
    server, waited = MlflowServer(tmp_path), list[int]()
    monkeypatch.setattr(
        server, "_command", lambda: [sys.executable, "-c", code, server.url.rsplit(":", 1)[1]]
    )
    monkeypatch.setattr(mlflow_server, "_wait_until_closed", waited.append)
    with server:
        port = int(server.url.rsplit(":", 1)[1])
    assert waited == [port]


@pytest.mark.slow
def test_failed_start_shows_the_end_of_the_log(tmp_path: Path) -> None:
    server = MlflowServer(tmp_path, backend_store_uri="nonsense://db")
    with pytest.raises(MlflowServerError, match="exited while starting") as caught:
        server.start()
    assert "nonsense" in str(caught.value)
    assert str(server.log_path) in str(caught.value)
    server.stop()


@pytest.mark.slow
def test_slow_start_is_given_up_and_cleaned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlflow_server, "_READY_SECONDS", 0.2)
    server = MlflowServer(tmp_path)
    with pytest.raises(MlflowServerError, match=r"did not answer /health in 0\.2 s"):
        server.start()
    assert not port_open(server.url)


def test_port_in_use_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MlflowServerError, match=f"port {port} is not free"):
            MlflowServer(tmp_path, port=port).start()
    assert not (tmp_path / "mlflow-server.log").exists()


@pytest.mark.slow
def test_settings_of_the_caller_do_not_leak_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://elsewhere")
    script = "import os; print(sorted(k for k in os.environ if k[:7] in ('MLFLOW_', 'OTEL_EX')))"
    server = MlflowServer(tmp_path, env={"MLFLOW_EXTRA": "1"})
    monkeypatch.setattr(server, "_command", lambda: [sys.executable, "-c", script])
    with pytest.raises(MlflowServerError, match="exited") as caught:
        server.start()
    assert "MLFLOW_EXTRA" in str(caught.value)
    assert "MLFLOW_TRACKING_URI" not in str(caught.value)
    assert "OTEL" not in str(caught.value)


@posix_only
@pytest.mark.slow
@pytest.mark.parametrize("stubborn", [False, True])
def test_guard_ends_the_group_at_end_of_input(stubborn: bool) -> None:
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if stubborn else ""
    child = f"import signal, time; {ignore}\nprint('up', flush=True); time.sleep(600)"
    guard = subprocess.Popen(
        [sys.executable, str(GUARD), "0.3", sys.executable, "-c", child],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert guard.stdin is not None and guard.stdout is not None
    assert guard.stdout.readline() == b"up\n"
    guard.stdin.close()
    assert guard.wait(10) == -signal.SIGKILL
    assert guard.stdout.read() == b""  # 子も書き口を閉じた
    assert eventually(lambda: not group_alive(guard.pid))
    guard.stdout.close()


def _group_members(group: int) -> list[int]:
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,pgid="], capture_output=True, text=True, check=True
    ).stdout
    pairs = [line.split() for line in listing.splitlines()]
    return [int(pid) for pid, pgid in pairs if int(pgid) == group]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _post(url: str, **body: Any) -> dict[str, Any]:
    reply = requests.post(url, json=body, timeout=30)
    assert reply.ok, reply.text
    return reply.json()
