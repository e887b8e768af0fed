"""サンプル 1 本を動かす作業場: 接続先、エクスペリメント、LLM スタブを用意し、後で元に戻す。"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from .doctor.setup_problems import backend_problem, explained, mlflow_problem, require
from .environment import bypass_proxy, go_offline, home, use_real_llm

# MLflow の公開 API では、SQLite の成果物の置き場所(既定は ./mlruns)を変えられない(3.17.2)
ARTIFACT_ROOT = "_MLFLOW_SERVER_ARTIFACT_ROOT"


@dataclass(frozen=True)
class Lab:
    """1 本のサンプルに渡す、手元の環境。"""

    home: Path
    tracking_uri: str
    experiment_id: str | None = None


@contextlib.contextmanager
def sample(
    experiment: str | None = None, *, llm: bool = False, fresh_store: bool = False
) -> Iterator[Lab]:
    """サンプル 1 本を、接続先の設定なしで動く状態にして、終わったら元に戻す。

    Args:
        experiment: 使うエクスペリメント。手元の SQLite では毎回空から始める。
        llm: LLM スタブを起動し、``OPENAI_BASE_URL`` と ``OPENAI_API_KEY`` を向ける。
            本物の鍵があれば何もしない。
        fresh_store: 共有の ``mlflow.db`` ではなく、このサンプル専用の空の SQLite を使う。

    用意の誤り(サーバーがない、鍵が違う、書けない、など)は、直し方の分かる説明を標準エラーに書き、
    終了ステータス 1 で終わる。
    """
    require(mlflow_problem())
    import mlflow

    saved_environment = dict(os.environ)
    saved_uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    go_offline()
    bypass_proxy()
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, saved_environment, saved_uri)
        stack.enter_context(explained())
        if llm and not use_real_llm():
            stack.enter_context(_stub_llm())
        own = not os.environ.get("MLFLOW_TRACKING_URI")
        uri = local_store(fresh_store) if own else os.environ["MLFLOW_TRACKING_URI"]
        if own:
            os.environ[ARTIFACT_ROOT] = (home() / "mlruns").as_uri()
        mlflow.set_tracking_uri(uri)
        require(backend_problem(uri))
        stack.callback(_flush)
        experiment_id = None
        if experiment:
            if own:
                set_aside(experiment)
            experiment_id = mlflow.set_experiment(experiment).experiment_id
        yield Lab(home(), uri, experiment_id)


def local_store(fresh: bool = False) -> str:
    """手元の SQLite の URI。``fresh`` なら、このサンプル専用の空のもの。"""
    path = home() / "mlflow.db"
    if fresh:
        path = home() / "samples" / f"{Path(sys.argv[0]).stem or 'sample'}.db"
        shutil.rmtree(path.parent / path.stem, ignore_errors=True)
        path.parent.mkdir(exist_ok=True)
        for file in path.parent.glob(f"{path.name}*"):
            file.unlink()
    return f"sqlite:///{path.as_posix()}"


def set_aside(experiment: str) -> None:
    """前回のエクスペリメントの名前に日時を付けて残し、次が空から始まるようにする。"""
    import mlflow

    client = mlflow.MlflowClient()
    old = client.get_experiment_by_name(experiment)
    if old is not None:
        name = f"{experiment} ({datetime.now():%m-%d %H.%M.%S.%f})"
        client.rename_experiment(old.experiment_id, name)


@contextlib.contextmanager
def _stub_llm() -> Iterator[None]:
    from .llm.server import StubLlm

    with StubLlm() as stub:
        os.environ["OPENAI_BASE_URL"] = stub.base_url
        os.environ["OPENAI_API_KEY"] = "sk-local-stub"
        yield


def _flush() -> None:
    import mlflow

    mlflow.flush_trace_async_logging()


def _restore(environment: dict[str, str], tracking_uri: str | None) -> None:
    import mlflow

    # None は「未設定」に戻す。set_tracking_uri は環境変数も変えるので、環境はその後で戻す
    mlflow.set_tracking_uri(tracking_uri)  # type: ignore[arg-type]
    os.environ.clear()
    os.environ.update(environment)
