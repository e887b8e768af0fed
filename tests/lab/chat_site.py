"""試験の相手: 別プロセスの ``python -m chapter8_samples serve`` と、そこで開いた画面。"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow
import uvicorn
from conftest import without_settings
from fastapi import FastAPI
from mlflow.entities import TraceInfo
from ports import free_port
from samples import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

EXPERIMENT = "/production/support-bot-chat"
THUMB = {True: '[data-vote="true"]', False: '[data-vote="false"]'}


@dataclass
class Site:
    """動いている ``serve``。"""

    job: subprocess.Popen[str]
    url: str
    mlflow_url: str
    home: Path

    def client(self) -> mlflow.MlflowClient:
        """この ``serve`` が起動した MLflow サーバーのクライアント。"""
        return mlflow.MlflowClient(tracking_uri=self.mlflow_url)

    def traces(self) -> list[TraceInfo]:
        """保存されたトレースすべて(スパンなし。書き込みの途中でも読める)。"""
        client = self.client()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        assert experiment is not None
        found = client.search_traces(
            locations=[experiment.experiment_id], max_results=500, include_spans=False
        )
        return [trace.info for trace in found]

    def trace(self, trace_id: str) -> TraceInfo:
        """1 件のトレース。まだ保存されていなければ ``AssertionError``。"""
        found = {info.trace_id: info for info in self.traces()}
        assert trace_id in found
        return found[trace_id]

    def interrupt(self) -> str:
        """Ctrl-C を押し、終わるまでの出力を返す。"""
        self.job.send_signal(signal.SIGINT)
        out, _ = self.job.communicate(timeout=60)
        return out

    def leftovers(self) -> list[str]:
        """この ``serve`` の場所を使ったまま残っているプロセス。"""
        found: list[str] = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(self.home) in line:
                found.append(line)
        return found


def launch(directory: Path, port: int) -> subprocess.Popen[str]:
    """``serve`` を起動する(待たない)。"""
    return subprocess.Popen(
        [sys.executable, "-u", "-m", "chapter8_samples", "serve", "--port", str(port)],
        cwd=directory,
        env=without_settings(dict(os.environ)) | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def start(directory: Path) -> Site:
    """``serve`` を起動し、2 つのアドレスが表示されるまで待つ。"""
    job = launch(directory, free_port())
    assert job.stdout is not None
    lines: list[str] = []
    urls: list[str] = []
    for line in job.stdout:
        lines.append(line)
        urls += re.findall(r"http://127\.0\.0\.1:\d+", line)
        if len(urls) == 2:
            return Site(job, *urls, home=directory)
    raise AssertionError("".join(lines))


def ask(page: Page, question: str) -> Locator:
    """キーボードで質問し、答え終わった吹き出しを返す。"""
    answers = page.locator("article.bot")
    before = answers.count()
    page.locator("#question").focus()
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    answer = answers.nth(before)
    answer.and_(page.locator('[aria-busy="false"]')).wait_for()
    return answer


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """このプロセスのスレッドで動くアプリの URL。"""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()
