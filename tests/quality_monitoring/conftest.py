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
from mlflow.entities import Document, SpanType, TraceInfo

Ask = Callable[..., list[str]]


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """テーブルだけを作った SQLite。作るのに 1 秒以上かかるので、テストごとに写して使う。"""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(tracking_uri=f"sqlite:///{path.as_posix()}").search_experiments()
    return path


@pytest.fixture
def store(_empty_store: Path, tmp_path: Path) -> Iterator[str]:
    """このテストだけの SQLite。トレースはすぐに保存する。値はエクスペリメントの ID。"""
    shutil.copy(_empty_store, tmp_path / "mlflow.db")
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    mlflow.set_tracking_uri(f"sqlite:///{(tmp_path / 'mlflow.db').as_posix()}")
    yield mlflow.set_experiment("quality").experiment_id


@pytest.fixture
def ask() -> Ask:
    """``ask(3)`` でトレースを 3 件作り、ID を返す。"""

    @mlflow.trace(span_type=SpanType.RETRIEVER)
    def search(question: str) -> list[Document]:
        return [Document(page_content=f"{question}は購入から 30 日以内に承ります。")]

    @mlflow.trace
    def answer(question: str, fail: bool = False) -> str:
        if fail:
            raise ValueError("no answer")
        return search(question)[0].page_content

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
