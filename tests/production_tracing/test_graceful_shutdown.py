"""graceful_shutdown: 終わり方ごとの、保存された件数と終了コード。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from chapter8_samples.production_tracing.delivery.flush import flush_traces
from chapter8_samples.production_tracing.graceful_shutdown import setup_graceful_shutdown

SETUP = "setup_graceful_shutdown(timeout_seconds=20)\n"
WORK = "for number in range(15): work(number)\n"
SELF_TERM = "os.kill(os.getpid(), signal.SIGTERM)\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError('x')", 1),
        (SELF_TERM + "time.sleep(60)", -signal.SIGTERM),
        ("os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)", -signal.SIGINT),
    ],
    ids=["normal", "exit3", "exception", "sigterm", "sigint"],
)
def test_every_trace_is_stored_and_the_exit_status_is_kept(
    program: Any, stored: Any, ending: str, code: int
) -> None:
    assert program.run(SETUP + WORK + ending)[0] == code
    assert len(stored("child", include_spans=False)) == 15


@pytest.mark.slow
def test_sigterm_with_300_waiting_traces_stores_300(program: Any, stored: Any) -> None:
    body = "setup_graceful_shutdown(timeout_seconds=50)\n"
    body += "for number in range(300): work(number)\n" + SELF_TERM
    assert program.run(body + "time.sleep(60)")[0] == -signal.SIGTERM
    assert len(stored("child", include_spans=False, max_results=1000)) == 300


@pytest.mark.slow
def test_without_the_handler_sigterm_loses_traces(program: Any, stored: Any) -> None:
    assert program.run(WORK + SELF_TERM + "time.sleep(60)")[0] == -signal.SIGTERM
    assert len(stored("child", include_spans=False)) < 15


@pytest.mark.slow
def test_open_trace_is_closed_and_stored(program: Any, stored: Any) -> None:
    body = SETUP + "with mlflow.start_span('open'):\n    " + SELF_TERM + "    time.sleep(60)"
    assert program.run(body)[0] == -signal.SIGTERM
    (trace,) = stored("child")
    assert trace.info.execution_duration is not None and "IN_PROGRESS" not in str(trace.info.state)


@pytest.mark.slow
def test_previous_handler_is_chained_and_may_keep_the_process_alive(
    program: Any, stored: Any
) -> None:
    body = (
        "seen = []\n"
        "class App:\n"
        "    should_exit = False  # uvicorn.Server にもある名前\n"
        "    def stop(self, *_): seen.append(1)\n"
        "signal.signal(signal.SIGTERM, App().stop)\n"
        + SETUP
        + WORK
        + SELF_TERM
        + "print('alive', seen)"
    )
    code, out, _ = program.run(body)
    assert (code, out.strip()) == (0, "alive [1]")
    assert len(stored("child", include_spans=False)) == 15


@pytest.mark.slow
def test_ignored_signal_stays_ignored(program: Any) -> None:
    body = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SETUP + SELF_TERM + "print('on')"
    assert program.run(body)[:2] == (0, "on\n")


@pytest.mark.slow
def test_exit_code_chosen_by_the_previous_handler_wins(program: Any, stored: Any) -> None:
    body = "signal.signal(signal.SIGTERM, lambda *a: sys.exit(9))\n" + SETUP + WORK + SELF_TERM
    assert program.run(body + "time.sleep(60)")[0] == 9
    assert len(stored("child", include_spans=False)) == 15


HANG = "mlflow.flush_trace_async_logging = lambda: time.sleep(100)\n"
HANG += "setup_graceful_shutdown({limit})\n"


def _seconds_from_the_signal(program: Any, body: str) -> tuple[int, float]:
    """(終了コード, プロセスが自分に SIGTERM を送ってから消えるまでの秒数)。"""
    body += "print(time.time(), flush=True)\n" + SELF_TERM + "time.sleep(60)"
    code, out, _ = program.run(body)
    return code, program.ended - float(out)


@pytest.mark.slow
def test_hanging_delivery_is_cut_at_the_deadline(program: Any) -> None:
    code, seconds = _seconds_from_the_signal(program, HANG.format(limit=2))
    assert code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert 1 < seconds <= 2 + 0.5


@pytest.fixture
def silent_port() -> Iterator[int]:
    """接続は受けるが、決して答えないサーバー。"""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield server.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("server", ["dead", "hanging"])
def test_unreachable_server_does_not_hold_the_exit(
    program: Any, server: str, free_port: int, silent_port: int
) -> None:
    port = free_port if server == "dead" else silent_port
    body = (
        "setup_graceful_shutdown(timeout_seconds=3)\n"
        "from mlflow.entities.trace_location import MlflowExperimentLocation\n"
        f"mlflow.set_tracking_uri('http://127.0.0.1:{port}')\n"
        "mlflow.tracing.set_destination(MlflowExperimentLocation('1'))\n" + WORK
    )
    code, seconds = _seconds_from_the_signal(program, body)
    assert code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert seconds <= 3 + 0.5


@pytest.mark.slow
def test_second_signal_leaves_at_once(program: Any) -> None:
    body = HANG.format(limit=50) + "try:\n    " + SELF_TERM + "    time.sleep(60)\n"
    body += "finally:\n    " + SELF_TERM + "    time.sleep(60)\n"
    started = time.monotonic()
    assert program.run(body)[0] == 128 + signal.SIGTERM
    assert time.monotonic() - started < 40


INTERRUPTED = """
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.slow
def test_an_earlier_signal_the_app_survived_is_not_the_first_one(program: Any, stored: Any) -> None:
    body = SETUP + INTERRUPTED + WORK + SELF_TERM
    assert program.run(body + "time.sleep(60)")[0] == -signal.SIGTERM
    assert len(stored("child", include_spans=False)) == 15


@pytest.mark.slow
def test_second_ctrl_c_leaves_at_once(program: Any) -> None:
    body = HANG.format(limit=50)
    body += "again = threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT))\n"
    body += "again.daemon = True\nagain.start()\nos.kill(os.getpid(), signal.SIGINT)\n"
    started = time.monotonic()
    assert program.run(body + "time.sleep(60)")[0] == 128 + signal.SIGINT
    assert time.monotonic() - started < 40


@pytest.mark.slow
def test_closed_stdout_does_not_hide_the_signal(program: Any, stored: Any) -> None:
    code, _, error = program.run(SETUP + WORK + "sys.stdout = None\n" + SELF_TERM)
    assert code == -signal.SIGTERM and "Traceback" not in error
    assert len(stored("child", include_spans=False)) == 15


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_limits_that_are_no_time_are_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="must be > 0 and finite"):
        flush_traces(limit)
    with pytest.raises(ValueError, match="must be > 0 and finite"):
        setup_graceful_shutdown(limit)


@pytest.mark.slow
def test_non_daemon_thread_does_not_hold_the_process(program: Any) -> None:
    body = "setup_graceful_shutdown(timeout_seconds=3)\n" + WORK
    body += "threading.Thread(target=time.sleep, args=(100,)).start()\n" + SELF_TERM
    assert program.run(body + "time.sleep(60)")[0] == 128 + signal.SIGTERM


@pytest.mark.slow
def test_multiprocessing_children_lose_nothing(program: Any, stored: Any) -> None:
    body = (
        SETUP
        + WORK
        + (
            "import multiprocessing\n"
            "def many():\n"
            f"    {SETUP}"  # 呼んでも、Pool を止めるシグナルは元のまま
            "    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL\n"
            "    for number in range(20): work(number)\n"
            "child = multiprocessing.get_context('fork').Process(target=many)\n"
            "child.start(); child.join(); print(child.exitcode)\n"
        )
    )
    code, out, err = program.run(body)
    assert (code, out.strip()) == (0, "0"), err
    assert len(stored("child", include_spans=False)) == 35


@pytest.mark.slow
@pytest.mark.parametrize("where", ["module", "target"])
def test_spawned_children_lose_nothing(program: Any, stored: Any, where: str) -> None:
    at_import, in_child = (SETUP, "pass") if where == "module" else ("pass\n", SETUP.strip())
    body = (
        "import multiprocessing\n"
        + at_import
        + f"def many():\n    {in_child}\n    for number in range(20): work(number)\n"
        "if __name__ == '__main__':\n"
        f"    {SETUP}"
        "    context = multiprocessing.get_context('spawn')\n"
        "    children = [context.Process(target=many) for _ in range(2)]\n"
        "    for child in children: child.start()\n"
        "    for child in children: child.join()\n"
        "    print([child.exitcode for child in children])\n"
    )
    code, out, err = program.run_fresh(body)
    assert (code, out.strip()) == (0, "[0, 0]"), err
    assert len(stored("child", include_spans=False)) == 40


# os._exit() は、たまっている印字を捨てる
FLUSHED_CHILD = "    print(flush_traces(), flush=True)\n    os._exit(0)\nos.wait()\n"


@pytest.mark.slow
def test_forked_child_keeps_the_span_processors_and_the_destination(
    program: Any, stored: Any
) -> None:
    """MLflow の ``reset()`` は、どちらも消す。子の分は、隠されずに、既定の送り先に入ってしまう。"""
    body = "from mlflow.entities.trace_location import MlflowExperimentLocation\n"
    body += "other = mlflow.create_experiment('destination')\n"
    body += "mlflow.tracing.set_destination(MlflowExperimentLocation(other))\n"
    body += "mlflow.tracing.configure(span_processors=[lambda s: s.set_inputs('masked')])\n"
    body += SETUP + "work(1)\nif os.fork() == 0:\n    work(2)\n" + FLUSHED_CHILD
    code, out, err = program.run(body)
    assert code == 0 and "ok=True" in out, err
    assert [trace.data.spans[0].inputs for trace in stored("destination")] == ["masked"] * 2


@pytest.mark.slow
def test_forked_child_stays_disabled(program: Any, stored: Any) -> None:
    body = "mlflow.tracing.disable()\n" + SETUP
    body += "if os.fork() == 0:\n    work(1)\n" + FLUSHED_CHILD
    code, out, err = program.run(body)
    assert code == 0 and "ok=True" in out, err
    assert stored("child") == []


@pytest.mark.slow
@pytest.mark.parametrize("graceful", ["", "setup_graceful_shutdown(10)"])
def test_a_fork_while_others_trace_returns_and_the_child_delivers(
    program: Any, stored: Any, mlflow_server_url: str, graceful: str
) -> None:
    body = f"""
    from chapter8_samples.production_tracing import flush_traces, setup_production_tracing
    setup_production_tracing("forks{len(graceful)}", tracking_uri={mlflow_server_url!r})
    {graceful}
    stop = threading.Event()
    def load():
        while not stop.wait(0.01): work(0)
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    time.sleep(1)
    children = []
    for number in range(5):
        if (child := os.fork()) == 0:
            with mlflow.start_span("of the child"): pass
            os._exit(0 if flush_traces(20).ok else 1)
        children.append(child)
    stop.set()
    ended = {{}}
    for _ in range(600):
        for child in set(children) - set(ended):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid: ended[pid] = status
        if len(ended) == 5: break
        time.sleep(0.1)
    for child in set(children) - set(ended): os.kill(child, signal.SIGKILL)
    print(sorted(ended.values()), flush=True)
    """
    _, out, err = program.run(body, timeout=120)
    assert out.split("\n")[0] == "[0, 0, 0, 0, 0]", err
    found = stored(f"forks{len(graceful)}", max_results=5000)
    assert sum(trace.data.spans[0].name == "of the child" for trace in found) == 5


def test_flush_deadline_and_failure_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()
    monkeypatch.setattr(mlflow, "flush_trace_async_logging", answered.wait)
    result = flush_traces(0.2)
    assert not result.ok and "not finished within 0.2s" in str(result.error)
    answered.set()

    def broken() -> None:
        raise OSError("disk")

    monkeypatch.setattr(mlflow, "flush_trace_async_logging", broken)
    assert "OSError: disk" in str(flush_traces(30).error)


@pytest.mark.slow
def test_process_that_never_traced_touches_no_backend(program: Any, tmp_path: Path) -> None:
    """データベースを作らず、止まったサーバーも待たない。"""
    code = "from chapter8_samples.production_tracing.graceful_shutdown import *\n" + SETUP
    uri = f"sqlite:///{tmp_path.as_posix()}/never.db"
    child = program.start(sys.executable, "-c", code, MLFLOW_TRACKING_URI=uri)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 0, error
    assert not (tmp_path / "never.db").exists() and "INFO" not in error


def test_setup_is_idempotent_and_refuses_other_values() -> None:
    handler = setup_graceful_shutdown(7)
    try:
        assert setup_graceful_shutdown(7) is handler
        with pytest.raises(ValueError, match="unregister"):
            setup_graceful_shutdown(8)
    finally:
        handler.unregister()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_setup_in_a_thread_warns_and_is_completed_in_the_main_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    thread = threading.Thread(target=setup_graceful_shutdown, args=(7,))
    thread.start()
    thread.join()
    assert "call setup_graceful_shutdown in the main thread" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    handler = setup_graceful_shutdown(7)
    assert signal.getsignal(signal.SIGTERM) == handler._on_signal
    handler.unregister()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_on_windows_the_setup_says_what_to_use_with_uvicorn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from uvicorn import Config, Server

    from chapter8_samples.production_tracing.delivery import shutdown

    monkeypatch.setattr(shutdown, "_ON_WINDOWS", True)
    before = signal.signal(signal.SIGTERM, Server(Config("app:app")).handle_exit)
    try:
        setup_graceful_shutdown(5).unregister()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "use FastAPI(lifespan=tracing_lifespan)" in caplog.text


@pytest.mark.slow
def test_a_signal_that_uvicorn_got_before_the_setup_stores_what_was_traced(
    program: Any, stored: Any
) -> None:
    """アプリの import の途中で届いた SIGTERM。uvicorn は、後で自分に送り直して、即死する。"""
    body = """
    import uvicorn
    def load():
        for number in range(15): work(number)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        setup_graceful_shutdown(timeout_seconds=20)
    class Config(uvicorn.Config):
        def load(self):
            load()
    uvicorn.Server(Config("app:app")).run()
    """
    assert program.run(body)[0] == -signal.SIGTERM
    assert len(stored("child", include_spans=False)) == 15
