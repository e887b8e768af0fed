"""graceful_shutdown: 本物のサーバーを SIGTERM で止め、終わったトレースの行き先を 1 件まで数える。

どのテストも「保存された件数 + ログに出た件数 = 応答した件数」を確かめる。
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import ports
import pytest
import requests
from relay import relay

from chapter8_samples.production_tracing.delivery.spool import replay
from chapter8_samples.production_tracing.graceful_shutdown import setup_graceful_shutdown

pytestmark = pytest.mark.slow

REQUESTS = 60
EXPORT_THREADS = 10  # MLflow の既定値(ワーカーごと)
SETUP = "mlflow.set_experiment('child')\nsetup_graceful_shutdown(timeout_seconds=20)\n"
PLAIN = "mlflow.set_experiment('child')\n"
HEAD = """
import os, mlflow
from chapter8_samples.production_tracing import *
{before}
ANSWERED = os.open("answered.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def answer():
    with mlflow.start_span("request"): pass
    os.write(ANSWERED, b".")
"""
ASGI = (
    HEAD
    + """
from fastapi import FastAPI
app = FastAPI({options})
@app.get("/")
async def index():
    answer()
    return "ok"
"""
)
WSGI = (
    HEAD
    + """
def app(environ, start_response):
    answer()
    start_response("200 OK", [])
    return [b"ok"]
"""
)
TASKS = (
    HEAD
    + """
from celery import Celery
app = Celery("tasks", broker="filesystem://")
app.conf.broker_transport_options = {{
    "data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "control"
}}
app.conf.worker_prefetch_multiplier = 1
@app.task(ignore_result=True)
def work(number):
    answer()
"""
)


class Served:
    """動いているサーバー。止めてから、件数と終了コードを読む。"""

    def __init__(self, program: Any, command: list[str], **environment: str) -> None:
        self.folder: Path = program.folder
        # 標準エラーはファイルに書く(パイプは、読まないと詰まる)
        shell = ["sh", "-c", 'exec "$0" "$@" 2>err.txt', sys.executable, *command]
        self.child = program.start(*shell, **{"MLFLOW_TRACKING_URI": program.uri, **environment})
        self.code: int | None = None

    @property
    def answered(self) -> int:
        path = self.folder / "answered.txt"
        return path.stat().st_size if path.exists() else 0

    @property
    def log(self) -> str:
        return (self.folder / "err.txt").read_text("utf-8", "replace")

    @property
    def reported(self) -> int:
        lost = re.findall(r"(\d+) (?:more )?traces (?:are kept|not delivered)", self.log)
        return sum(map(int, lost))

    def wait_for(self, reached: Callable[[], bool], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline and self.child.poll() is None, self.log
            time.sleep(0.05)

    def stop(self, seconds: float = 60, *, whole_group: bool = False) -> None:
        family = [self.child.pid]
        if whole_group:
            children = Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children")
            family += map(int, children.read_text().split())
        for pid in family:
            os.kill(pid, signal.SIGTERM)
        self.code = self.child.wait(seconds)


@contextmanager
def serving(program: Any, app: str, *command: str, **environment: str) -> Iterator[Served]:
    """``app`` を ``app.py`` に置いて、コマンドを動かす。"""
    (program.folder / "app.py").write_text(app, encoding="utf-8")
    served = Served(program, list(command), **environment)
    try:
        yield served
    finally:
        served.child.kill()
        served.child.communicate()


def get(url: str) -> bool:
    try:
        return requests.get(url, timeout=60).ok
    except requests.RequestException:
        return False


def ask_enough(served: Served, port: int) -> None:
    url = f"http://127.0.0.1:{port}/"
    served.wait_for(lambda: get(url))
    while served.answered < REQUESTS:
        assert get(url), served.log


@contextmanager
def load(url: str, clients: int = 4) -> Iterator[None]:
    """終わるまで、つながらなくなっても、リクエストを送り続ける。"""
    over = threading.Event()

    def client() -> None:
        while not over.is_set():
            if not get(url):
                time.sleep(0.05)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def uvicorn(port: int, *more: str) -> list[str]:
    return ["-m", "uvicorn", "app:app", "--port", str(port), "--log-level", "warning", *more]


def gunicorn(port: int, *more: str) -> list[str]:
    pytest.importorskip("gunicorn")
    # 起動の途中のワーカーは SIGTERM を受け損なうことがある(gunicorn)。リクエストも受けていない
    bind = ["--bind", f"127.0.0.1:{port}", "--graceful-timeout", "25", "-w", "2"]
    return ["-m", "gunicorn", "app:app", *bind, *more]


LIFESPAN = ASGI.format(before=PLAIN, options="lifespan=tracing_lifespan")
HANDLER = ASGI.format(before=SETUP, options="")
SYNC = WSGI.format(before=SETUP)
WARM_UP = "for _ in range(20):\n    with mlflow.start_span('warm-up'): pass\n"
RUN = (
    "\nimport uvicorn\nif __name__ == '__main__': uvicorn.run(app, port=int(os.environ['PORT']))\n"
)
SENT_ONLY_AT_THE_END = {
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "600000",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE": "1000",
}
UVICORN_WORKER = ["-k", "uvicorn.workers.UvicornWorker"]


def servers(port: int) -> dict[str, tuple[str, list[str]]]:
    return {
        "uvicorn": (HANDLER, uvicorn(port)),
        "uvicorn.run": (HANDLER + RUN, ["app.py"]),
        "uvicorn-2": (HANDLER, uvicorn(port, "--workers", "2")),
        "uvicorn-2-lifespan": (LIFESPAN, uvicorn(port, "--workers", "2")),
        "gunicorn-sync": (SYNC, gunicorn(port)),
        "gunicorn-gthread": (SYNC, gunicorn(port, "-k", "gthread", "--threads", "4")),
        "gunicorn-uvicorn": (HANDLER, gunicorn(port, *UVICORN_WORKER)),
    }


KINDS = list(servers(0))
DIES_OF_THE_SIGNAL = ("uvicorn", "uvicorn.run")


@pytest.mark.parametrize("kind", KINDS)
def test_idle_server_loses_nothing(program: Any, stored: Any, free_port: int, kind: str) -> None:
    app, command = servers(free_port)[kind]
    with serving(program, app, *command, PORT=str(free_port)) as served:
        ask_enough(served, free_port)
        served.stop()
        assert served.code == (-signal.SIGTERM if kind in DIES_OF_THE_SIGNAL else 0), served.log
        assert (len(stored("child", include_spans=False)), served.reported) == (served.answered, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="children are read from /proc")
@pytest.mark.parametrize("kind", ["uvicorn-2", "uvicorn-2-lifespan", "gunicorn-uvicorn"])
def test_a_signal_to_parent_and_workers_at_once_loses_nothing(
    program: Any, stored: Any, free_port: int, kind: str
) -> None:
    """systemd は全部のプロセスに送る。親も送るので、ワーカーは二度受ける。"""
    app, command = servers(free_port)[kind]
    with serving(program, app, *command) as served:
        ask_enough(served, free_port)
        served.stop(whole_group=True)
        assert (len(stored("child", include_spans=False)), served.reported) == (served.answered, 0)


@pytest.mark.parametrize("kind", ["uvicorn-2", "uvicorn-2-lifespan", "gunicorn-sync"])
def test_server_under_load_accounts_for_every_answer(
    program: Any, stored: Any, free_port: int, kind: str
) -> None:
    app, command = servers(free_port)[kind]
    with serving(program, app, *command) as served:
        with load(f"http://127.0.0.1:{free_port}/"):
            served.wait_for(lambda: served.answered >= REQUESTS)
            served.stop()
        found = len(stored("child", include_spans=False))
        assert found + served.reported == served.answered >= REQUESTS, served.log


def config_of_the_docstring() -> str:
    """``setup_graceful_shutdown`` の説明にある gunicorn.conf.py。"""
    text = inspect.getdoc(setup_graceful_shutdown) or ""
    lines = text[text.index("    # gunicorn.conf.py") :].splitlines(keepends=True)
    indented = itertools.takewhile(lambda line: not line[0].strip(), lines)
    snippet = textwrap.dedent("".join(indented))
    assert "def post_worker_init(worker):" in snippet
    imports = "import mlflow\nfrom chapter8_samples.production_tracing import *\n"
    return imports + snippet.replace("/production/my-llm-app", "child")


@pytest.mark.parametrize(
    ("app", "config", "worker", "earlier"),
    [
        (WSGI.format(before=SETUP + WARM_UP), "", [], 20),
        (WSGI.format(before=""), config_of_the_docstring(), [], 0),
        (
            ASGI.format(before=SETUP + WARM_UP, options=""),
            config_of_the_docstring(),
            UVICORN_WORKER,
            20,
        ),
    ],
    ids=["traced-before-fork", "post_worker_init", "uvicorn"],
)
def test_gunicorn_preload_stores_everything_once(
    program: Any, stored: Any, free_port: int, app: str, config: str, worker: Any, earlier: int
) -> None:
    (program.folder / "gunicorn.conf.py").write_text(config, encoding="utf-8")
    command = gunicorn(free_port, "--preload", *worker)
    with serving(program, app, *command, **SENT_ONLY_AT_THE_END) as served:
        ask_enough(served, free_port)
        served.stop()
        assert len(stored("child", include_spans=False)) == served.answered + earlier


@pytest.mark.parametrize("moment", ["idle", "load"])
def test_celery_children_account_for_every_task(program: Any, stored: Any, moment: str) -> None:
    celery: Any = pytest.importorskip("celery")
    for name in ("queue", "control"):
        (program.folder / name).mkdir()
    producer = celery.Celery("tasks", broker="filesystem://")
    producer.conf.broker_transport_options = {
        "data_folder_in": "queue",
        "data_folder_out": "queue",
        "control_folder": "control",
    }
    count = REQUESTS if moment == "idle" else 600
    for number in range(count):
        producer.send_task("app.work", args=[number])
    options = [
        "--concurrency",
        "2",
        "--loglevel",
        "WARNING",
        "--without-gossip",
        "--without-mingle",
    ]
    command = ["-m", "celery", "-A", "app", "worker", *options]
    with serving(program, TASKS.format(before=SETUP), *command) as served:
        served.wait_for(lambda: served.answered >= REQUESTS)
        served.stop()
        assert served.code == 0, served.log
        found = len(stored("child", include_spans=False))
        assert found + served.reported == served.answered, served.log
        assert found == REQUESTS or moment == "load"


SLOW = "mlflow.set_experiment('slow-{name}')\n{setup}\n"
SPOOLED = "setup_graceful_shutdown(timeout_seconds=5, spool=TraceSpool('spool').install())"


@pytest.mark.parametrize(
    ("name", "setup", "options"),
    [
        ("handler", "setup_graceful_shutdown(timeout_seconds=5)", ""),
        ("lifespan", "", "lifespan=lambda app: tracing_lifespan(app, 5)"),
        ("spool", SPOOLED, ""),
    ],
)
def test_slow_server_and_requests_that_keep_coming(
    program: Any,
    stored: Any,
    free_port: int,
    mlflow_server_url: str,
    name: str,
    setup: str,
    options: str,
) -> None:
    """間に合わない分は、失った件数がログに出る。``TraceSpool`` があれば、ディスクに残る。"""
    # 2 つのワーカーが同時に作ると、負けた側の set_experiment は効かず、Default に記録する
    mlflow.set_experiment(f"slow-{name}")
    app = ASGI.format(before=SLOW.format(name=name, setup=setup), options=options)
    port = ports.free_port()
    environment = {
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
        "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "500",
    }
    command = uvicorn(free_port, "--workers", "2")
    with (
        relay(port, mlflow_server_url, 0.3),
        serving(program, app, *command, **environment) as served,
    ):
        with load(f"http://127.0.0.1:{free_port}/"):
            served.wait_for(lambda: served.answered >= 300)
            served.stop()
        found = len(stored(f"slow-{name}", include_spans=False, max_results=5000))
        assert served.reported > 0, served.log
        if name != "spool":
            assert found + served.reported == served.answered, served.log
            return
        assert found < served.answered
        assert replay(served.folder / "spool").pending == 0
        ids = [trace.info.trace_id for trace in stored("slow-spool", max_results=5000)]
        assert len(ids) == len(set(ids)) == served.answered, served.log
