"""``serve`` と ``ui``: 起動し、答え、Ctrl-C で何も残さずに終わる。"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from conftest import without_settings
from ports import free_port
from samples import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="only on POSIX: process groups"),
]


@contextmanager
def running(command: str, directory: Path) -> Iterator[str]:
    """コマンドを起動して URL を渡し、最後に Ctrl-C で止める。"""
    environment = without_settings(dict(os.environ)) | {"PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(
        [sys.executable, "-u", "-m", "chapter8_samples", command, "--port", str(free_port())],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert job.stdout is not None
    lines: list[str] = []
    try:
        for line in job.stdout:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                break
        else:
            pytest.fail("".join(lines))
        yield found[0]
        job.send_signal(signal.SIGINT)
        out, _ = job.communicate(timeout=60)
        assert job.returncode in (0, 130), out
        assert "Traceback" not in out, out
        with pytest.raises(ProcessLookupError):
            os.killpg(job.pid, 0)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)


def answer_of(url: str, timeout: float = 30) -> requests.Response:
    """サーバーが受け付け始めるまで試す。"""
    import time

    deadline = time.monotonic() + timeout
    while True:
        try:
            return requests.get(url, timeout=10)
        except requests.ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def test_serve_answers_in_the_browser(tmp_path: Path) -> None:
    with running("serve", tmp_path) as url:
        assert "みどり商店" in answer_of(url).text
        body = {"question": "返品は何日以内ならできますか", "session_id": "s"}
        reply = requests.post(f"{url}/ask", json=body, timeout=60)
        assert "14日以内" in "".join(re.findall(r'"text": "([^"]*)"', reply.text))


def test_ui_shows_the_experiments_of_the_lab(tmp_path: Path) -> None:
    with running("ui", tmp_path) as url:
        assert answer_of(f"{url}/health").text == "OK"
