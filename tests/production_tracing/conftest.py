"""8.1 のテスト共通: 設定とサンプラーを毎回元に戻し、子プロセスでの実行を助ける。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import ports
import pytest

from chapter8_samples.production_tracing import basic_setup
from chapter8_samples.production_tracing import sampling as tail

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def start_over(clean_environment: None) -> Iterator[None]:
    yield
    active: Any = vars(tail)["_active"]
    if active is not None:
        active.uninstall()
    basic_setup.reset_production_tracing()


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


class Program:
    """テスト用の短いプログラムを別プロセスで動かす。"""

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder = folder
        self.uri = uri

    def start(self, body: str, *command: str, **environment: str) -> subprocess.Popen[str]:
        head = f"""
            import os, signal, sys, threading, time
            import mlflow
            mlflow.set_tracking_uri({self.uri!r}); mlflow.set_experiment("child")
            from chapter8_samples.production_tracing.graceful_shutdown import *
            @mlflow.trace
            def work(number): return number
        """
        path = self.folder / "program.py"
        path.write_text(textwrap.dedent(head) + textwrap.dedent(body), encoding="utf-8")
        return subprocess.Popen(
            [*(command or (sys.executable, str(path)))],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, body: str, timeout: float = 60, **environment: str) -> tuple[int, str, str]:
        """(終了コード, 標準出力, 標準エラー) を返す。"""
        child = self.start(body, **environment)
        try:
            out, err = child.communicate(timeout=timeout)
        finally:
            child.kill()
        return child.returncode, out, err


@pytest.fixture
def program(tmp_path: Path, tracking_uri: str) -> Program:
    mlflow.set_experiment("child")
    return Program(tmp_path, tracking_uri)


@pytest.fixture
def free_port() -> int:
    """いまは誰も待っていないポート。"""
    return ports.free_port()


@pytest.fixture(scope="session")
def _empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """表を作り終えた SQLite。テストごとに作ると 3 秒かかるので、写して使う。"""
    path = tmp_path_factory.mktemp("template") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking_uri(_empty_database: Path, tmp_path: Path) -> str:
    """このテストだけの SQLite。"""
    path = tmp_path / "mlflow.db"
    shutil.copy(_empty_database, path)
    mlflow.set_tracking_uri(f"sqlite:///{path.as_posix()}")
    return mlflow.get_tracking_uri()
