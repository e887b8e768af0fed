"""graceful_shutdown: uvicorn と gunicorn を本物の SIGTERM で止め、保存された件数を数える。"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import textwrap
import time
from typing import Any

import pytest
import requests

from chapter8_samples.production_tracing.graceful_shutdown import setup_graceful_shutdown

pytestmark = pytest.mark.slow

REQUESTS = 40
IMPORTS = """
import mlflow
from chapter8_samples.production_tracing.graceful_shutdown import *
"""
SETUP = "mlflow.set_experiment('child'); setup_graceful_shutdown(20)\n"
ASGI = (
    IMPORTS
    + """
from fastapi import FastAPI
{before}
app = FastAPI({options})
@app.get("/")
def index():
    with mlflow.start_span("request"): pass
    return "ok"
"""
)
WSGI = (
    IMPORTS
    + """
{before}
def app(environ, start_response):
    with mlflow.start_span("request"): pass
    start_response("200 OK", [])
    return [b"ok"]
"""
)


def serve(program: Any, app: str, port: int, *arguments: str) -> int:
    """サーバーを起動し、リクエストを送って SIGTERM で止め、終了コードを返す。"""
    (program.folder / "app.py").write_text(app, encoding="utf-8")
    child = program.start(sys.executable, *arguments, MLFLOW_TRACKING_URI=program.uri)
    try:
        _send_requests(child, port)
        os.kill(child.pid, signal.SIGTERM)
        return child.wait(40)
    finally:
        child.kill()
        child.communicate()


def _send_requests(child: Any, port: int) -> None:
    deadline = time.monotonic() + 120
    sent = 0
    while sent < REQUESTS:
        assert time.monotonic() < deadline and child.poll() is None, child.stderr.read()
        try:
            sent += requests.get(f"http://127.0.0.1:{port}/", timeout=60).ok
        except requests.ConnectionError:
            time.sleep(0.2)


@pytest.mark.parametrize("workers", [1, 2])
def test_uvicorn_with_lifespan_loses_nothing(
    program: Any, stored: Any, free_port: int, workers: int
) -> None:
    app = ASGI.format(before="mlflow.set_experiment('child')", options="lifespan=tracing_lifespan")
    arguments = ["-m", "uvicorn", "app:app", "--port", str(free_port), "--workers", str(workers)]
    serve(program, app, free_port, *arguments)
    assert len(stored("child", include_spans=False)) == REQUESTS


def test_uvicorn_with_signal_handler_only_loses_nothing(
    program: Any, stored: Any, free_port: int
) -> None:
    app = ASGI.format(before=SETUP, options="")
    arguments = ["-m", "uvicorn", "app:app", "--port", str(free_port)]
    assert serve(program, app, free_port, *arguments) == -signal.SIGTERM
    assert len(stored("child", include_spans=False)) == REQUESTS


@pytest.mark.parametrize(
    ("before", "options"),
    [("mlflow.set_experiment('child')", "lifespan=tracing_lifespan"), (SETUP, "")],
    ids=["lifespan", "handler"],
)
def test_uvicorn_run_loses_nothing(
    program: Any, stored: Any, free_port: int, before: str, options: str
) -> None:
    app = ASGI.format(before=before, options=options)
    app += f"import uvicorn\nif __name__ == '__main__': uvicorn.run(app, port={free_port})\n"
    assert serve(program, app, free_port, "app.py") == -signal.SIGTERM
    assert len(stored("child", include_spans=False)) == REQUESTS


def post_fork_of_the_docstring() -> str:
    """``setup_graceful_shutdown`` の説明にある gunicorn.conf.py。"""
    text = inspect.getdoc(setup_graceful_shutdown) or ""
    start = text.index("    # gunicorn.conf.py")
    snippet = textwrap.dedent(text[start : text.index("Raises:")])
    assert "def post_fork(server, worker):" in snippet
    return IMPORTS + snippet.replace("/production/my-llm-app", "child")


WARM_UP = "for _ in range(20):\n    with mlflow.start_span('warm-up'): pass\n"


@pytest.mark.parametrize(
    ("before", "preload", "configured", "expected"),
    [
        (SETUP, False, False, REQUESTS),
        ("", True, True, REQUESTS),
        (SETUP + WARM_UP, True, False, REQUESTS + 20),
    ],
    ids=["no-preload", "preload-post_fork", "preload-traced-before-fork"],
)
def test_gunicorn_loses_nothing(
    program: Any,
    stored: Any,
    free_port: int,
    before: str,
    preload: bool,
    configured: bool,
    expected: int,
) -> None:
    pytest.importorskip("gunicorn")
    arguments = ["-m", "gunicorn", "app:app", "--bind", f"127.0.0.1:{free_port}", "-w", "2"]
    # 起動の途中のワーカーは SIGTERM を受け損なうことがある(gunicorn)。リクエストも受けていない
    arguments += ["--graceful-timeout", "10"]
    arguments += ["--preload"] * preload
    if configured:
        config = program.folder / "gunicorn.conf.py"  # カレントディレクトリーの既定の名前
        config.write_text(post_fork_of_the_docstring(), encoding="utf-8")
    assert serve(program, WSGI.format(before=before), free_port, *arguments) == 0
    assert len(stored("child", include_spans=False)) == expected
