"""どう終わっても、起動したものを残さない: ``serve``、``ui``、シナリオ、テストの実行そのもの。"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import without_settings
from leftovers import VARIABLE
from ports import free_port
from samples import ROOT

from chapter8_samples._lab.stopping import Terminated, terminable

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="only on Linux: looks for processes in /proc"
)
READY = {"serve": "MLflow UI: ", "ui": "MLflow UI: ", "": r"\[ 6/"}
"""コマンドと、途中で止めてよい所まで進んだことを示す表示(引数なしは、シナリオの問い合わせ)。"""


def alive(place: Path | str) -> list[str]:
    """コマンドか環境変数に ``place`` を含むプロセス。"""
    found: list[str] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            environment = (process / "environ").read_bytes().decode()
        except (OSError, UnicodeDecodeError):
            continue
        if str(place) in command + environment and "test_leftovers" not in command:
            found.append(command)
    return found


@contextmanager
def started(
    arguments: list[str], directory: Path, ready: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """コマンドを起動し、``ready`` に合う行が出たら渡す。残ったものは、最後に強制終了する。"""
    job = subprocess.Popen(
        [sys.executable, "-u", *arguments],
        cwd=directory,
        env=without_settings(dict(os.environ)) | {"PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        assert job.stdout is not None
        lines: list[str] = []
        for line in iter(job.stdout.readline, ""):
            lines.append(line)
            if re.search(ready, line):
                break
        else:
            pytest.fail("".join(lines))
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("command", READY)
def test_sigterm_ends_like_ctrl_c(command: str, tmp_path: Path) -> None:
    port = ["--port", str(free_port())] if command else []
    arguments = ["-m", "chapter8_samples", *filter(None, [command]), *port]
    with started(arguments, tmp_path, READY[command]) as job:
        assert not command or any("mlflow server" in line for line in alive(tmp_path))
        job.terminate()
        out, _ = job.communicate(timeout=60)
        assert job.returncode == 143, out
        assert "起動していたものはすべて止めました" in out and "Traceback" not in out
        assert alive(tmp_path) == []


def ports_of(pid: int) -> set[int]:
    """プロセスが待ち受けているポート。"""
    inodes: set[str] = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # 見ているあいだに閉じたもの
            inodes.add(str(entry.readlink()))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [row for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    return {int(row[1].rpartition(":")[2], 16) for row in listening}


@pytest.mark.slow
def test_the_story_leaves_no_process_and_no_port(tmp_path: Path) -> None:
    mark = {"CHAPTER8_TEST": str(tmp_path)}
    with started(["-m", "chapter8_samples"], tmp_path, READY[""], **mark) as job:
        ports = ports_of(job.pid)
        assert len(ports) >= 4 and alive(tmp_path)  # LLM、OTLP 2 つ、Slack、PagerDuty
        out, _ = job.communicate(timeout=300)
        assert job.returncode == 0, out
        assert alive(tmp_path) == []
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0, port


def test_a_second_sigterm_does_not_interrupt_the_clean_up() -> None:
    before = signal.getsignal(signal.SIGTERM)
    cleaned = False
    with pytest.raises(Terminated) as end, terminable():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            cleaned = True
    assert cleaned and end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


SUITE = """
import subprocess, sys, time

def test_that_never_ends(FIXTURE, stub_llm):
    command = [sys.executable, "-u", "-m", "chapter8_samples._lab.llm.server", "--port", "0"]
    own = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    own.stdout.readline()
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "fixture"),
    [
        (signal.SIGTERM, "mlflow_server_url"),
        (signal.SIGKILL, "mlflow_server_url"),
        (signal.SIGINT, "webhooks"),
    ],
)
def test_a_test_run_that_is_ended_leaves_nothing(
    number: signal.Signals, fixture: str, tmp_path: Path
) -> None:
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE.replace("FIXTURE", fixture), encoding="utf-8")
    arguments = ["-m", "pytest", "-s", "-p", "conftest", "-p", "no:cacheprovider", str(suite)]
    arguments += [f"--rootdir={ROOT}", f"--config-file={ROOT / 'pyproject.toml'}"]
    arguments += [f"--basetemp={tmp_path / 'runs'}"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    mark = {VARIABLE: tmp_path.as_posix()}
    with started(arguments, tmp_path, "ready", PYTHONPATH=path, **mark) as job:
        commands = "\n".join(alive(tmp_path))
        assert "_lab.llm.server" in commands
        assert ("mlflow server" in commands) == (fixture == "mlflow_server_url")
        job.send_signal(number)
        job.wait(60)
        deadline = time.monotonic() + 30
        while (left := alive(tmp_path)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert left == []
