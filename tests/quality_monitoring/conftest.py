"""8.3 のテストで使う保存先とトレース。"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import TraceInfo

Ask = Callable[..., list[str]]


@pytest.fixture(scope="session")
def _shared_store(tmp_path_factory: pytest.TempPathFactory, database_template: Path) -> str:
    """どのテストも使う 1 つの SQLite。テストごとに開くと、そのたびに 0.1 秒ほどかかる。"""
    path = tmp_path_factory.mktemp("quality") / "mlflow.db"
    shutil.copy(database_template, path)
    return f"sqlite:///{path.as_posix()}"


def _use(uri: str, experiment: str) -> str:
    """トレースはすぐに保存する。値はエクスペリメントの ID。"""
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    mlflow.set_tracking_uri(uri)
    return mlflow.set_experiment(experiment).experiment_id


@pytest.fixture
def store(_shared_store: str) -> Iterator[str]:
    """このテストだけのエクスペリメント ``quality`` の ID。終わったら、次のテストに名前を譲る。"""
    experiment_id = _use(_shared_store, "quality")
    yield experiment_id
    client = MlflowClient(tracking_uri=_shared_store)
    client.rename_experiment(experiment_id, f"quality-{experiment_id}")


@pytest.fixture
def crowd(_shared_store: str, ask: Ask) -> str:
    """20 件のトレースがある、共有のエクスペリメント ``crowd`` の ID。

    トレースは 1 件作るのに 40 ミリ秒かかる。スコアラーの名前は、テストごとに変えること。
    """
    experiment_id = _use(_shared_store, "crowd")
    if not MlflowClient().search_traces(locations=[experiment_id], max_results=1):
        ask(20)
    return experiment_id


@pytest.fixture
def ask() -> Ask:
    """``ask(3)`` でトレースを 3 件作り、ID を返す。"""

    @mlflow.trace
    def answer(question: str, fail: bool = False) -> str:
        if fail:
            raise ValueError("no answer")
        return f"{question}は購入から 30 日以内に承ります。"

    def ask(count: int = 1, *, fail: bool = False) -> list[str]:
        ids: list[str] = []
        for i in range(count):
            with contextlib.suppress(ValueError):
                answer(f"注文 {i} の返品", fail)
            trace_id = mlflow.get_last_active_trace_id(thread_local=True)
            assert trace_id is not None
            ids.append(trace_id)
        return ids

    return ask


@pytest.fixture
def infos(store: str) -> Callable[[], dict[str, TraceInfo]]:
    """保存されているトレースを読み直す。"""

    def read() -> dict[str, TraceInfo]:
        found = MlflowClient().search_traces(
            locations=[store], max_results=500, include_spans=False
        )
        return {trace.info.trace_id: trace.info for trace in found}

    return read
