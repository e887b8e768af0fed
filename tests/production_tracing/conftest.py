"""8.1 のテスト共通: サンプラーを毎回外し、別プロセスで動かすプログラムを助ける。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import ports
import pytest

from chapter8_samples.production_tracing import reset_production_tracing
from chapter8_samples.production_tracing import sampling as tail
from chapter8_samples.production_tracing.delivery.counts import LEDGER

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def start_over(clean_environment: None) -> Iterator[None]:
    yield
    active: Any = vars(tail)["_active"]
    if active is not None:
        active.uninstall()
    reset_production_tracing()
    LEDGER.start_over()


@pytest.fixture
def stored() -> Callable[..., list[Any]]:
    """送り終えてから、いまのエクスペリメントのトレースを読む。"""

    def read(experiment: str | None = None, **options: Any) -> list[Any]:
        mlflow.flush_trace_async_logging()
        if experiment is not None:
            found = mlflow.get_experiment_by_name(experiment)
            assert found is not None
            options["locations"] = [found.experiment_id]
        return mlflow.search_traces(return_type="list", **options)  # type: ignore[return-value]

    return read


@pytest.fixture
def collected(tracking_uri: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Any]]:
    """送信の最後の手前(保存先へ書くところ)で受け取ったトレースを、送り終えてから返す。

    SQLite への書き込みは 1 件およそ 25 ミリ秒かかる。件数の多いテストはこれで待たない。
    """
    from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter as Exporter

    traces: list[Any] = []

    def keep(_exporter: Any, trace: Any, *_args: Any, **_options: Any) -> None:
        traces.append(trace)

    monkeypatch.setattr(Exporter, "_log_trace", keep)
    monkeypatch.setattr(Exporter, "_export_spans_incrementally", lambda *_: None)

    def read() -> list[Any]:
        mlflow.flush_trace_async_logging()
        return traces

    return read


# MLflow を読み込み終えたプロセス。頼まれるたびに fork し、子が 1 つのプログラムを最後まで実行する
# (終了処理も、シグナルも、終了コードも、子のインタープリター自身のもの)
WARM = """
import json, os, sys, time
from queue import Queue
import mlflow, mlflow.store.tracking.sqlalchemy_store
from mlflow.tracing.export import async_export_queue
from chapter8_samples.production_tracing import basic_setup, graceful_shutdown, sampling_strategies

class WakingQueue(Queue):
    def get(self, block=True, timeout=None):
        return super().get(block, timeout and min(timeout, 0.02))

async_export_queue.Queue = WakingQueue

def in_child(job):
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open("stdout.txt", flags), 1)
    os.dup2(os.open("stderr.txt", flags), 2)

for line in iter(sys.stdin.readline, ""):
    job = json.loads(line)
    if (pid := os.fork()) == 0:
        in_child(job)
        break
    print(pid, flush=True)
    status = os.waitpid(pid, 0)[1]
    print(json.dumps([os.waitstatus_to_exitcode(status), time.time()]), flush=True)
else:
    os._exit(0)
names = {"__name__": "__main__", "__file__": job["path"]}
exec(compile(job["source"], job["path"], "exec"), names)
"""


class Warm:
    """``WARM`` のプロセスに、プログラムを 1 つずつ頼む。"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WARM],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: dict[str, Any], timeout: float) -> tuple[int, float]:
        """(終了コード, 終わった時刻) を返す。"""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        pid = int(self._line(120))
        try:
            code, ended = json.loads(self._line(timeout))
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            self._line(10)
            raise
        return code, ended

    def _line(self, timeout: float) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"no answer within {timeout:g}s")
        return self._process.stdout.readline()

    def stop(self) -> None:
        """終わらせる。"""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()


class Program:
    """テスト用の短いプログラムを別プロセスで動かす。"""

    def __init__(self, folder: Path, uri: str, warm: Warm) -> None:
        self.folder = folder
        self.uri = uri
        self.ended = 0.0
        """最後の ``run`` のプロセスが消えた時刻。"""
        self._warm = warm

    def _source(self, body: str) -> str:
        head = f"""
            import os, signal, sys, threading, time
            import mlflow
            mlflow.set_tracking_uri({self.uri!r}); mlflow.set_experiment("child")
            from chapter8_samples.production_tracing.graceful_shutdown import *
            @mlflow.trace
            def work(number): return number
        """
        return textwrap.dedent(head) + textwrap.dedent(body)

    def _environment(self, changes: dict[str, str]) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(REPOSITORY), **changes}

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """コマンドを、このフォルダーで起動する。"""
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env=self._environment(environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run_fresh(self, body: str, timeout: float = 60) -> tuple[int, str, str]:
        """``run`` と同じことを、新しく起動した Python で行う(spawn の子が読むファイルが要る)。"""
        path = self.folder / "program.py"
        path.write_text(self._source(body), encoding="utf-8")
        child = self.start(sys.executable, str(path))
        try:
            out, err = child.communicate(timeout=timeout)
        finally:
            child.kill()
        return child.returncode, out, err

    def run(self, body: str, timeout: float = 60, **environment: str) -> tuple[int, str, str]:
        """(終了コード, 標準出力, 標準エラー) を返す。"""
        job = {
            "folder": str(self.folder),
            "path": str(self.folder / "program.py"),
            "source": self._source(body),
            "environment": self._environment(environment),
        }
        code, self.ended = self._warm.run(job, timeout)
        out, err = (
            (self.folder / name).read_text("utf-8") for name in ("stdout.txt", "stderr.txt")
        )
        return code, out, err


@pytest.fixture(scope="session")
def _warm() -> Iterator[Warm]:
    if not hasattr(os, "fork"):
        pytest.skip("only on POSIX: signals and fork")
    warm = Warm()
    yield warm
    warm.stop()


@pytest.fixture
def program(tmp_path: Path, tracking_uri: str, _warm: Warm) -> Program:
    mlflow.set_experiment("child")
    return Program(tmp_path, tracking_uri, _warm)


@pytest.fixture
def free_port() -> int:
    """いまは誰も待っていないポート。"""
    return ports.free_port()
