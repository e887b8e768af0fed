"""サンプルを手元だけで動かすための部品。

API キーも Databricks もない環境で、本物の MLflow・openai SDK・OTLP を動かす。
アプリにコピーするものは、ここにはない。各サンプルの ``main()`` だけが import する。
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .llm.server import StubLlm

OFFLINE_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # 空でないと、最初の LLM スパンで価格カタログを取りに行き、つながらないまま数秒待つ
    "MLFLOW_MODEL_CATALOG_URI": "",
}
NOISY_LOGGERS = ("mlflow", "alembic", "httpx")
LOOPBACK = ("127.0.0.1", "localhost")


def home() -> Path:
    """手元のデータの置き場所。既定は ``./.chapter8`` で、``CHAPTER8_LAB`` で変えられる。"""
    path = Path(os.environ.get("CHAPTER8_LAB") or ".chapter8").resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def go_offline() -> None:
    """外へ接続しない既定値にする。利用者が決めた環境変数は変えない。"""
    for name, value in OFFLINE_DEFAULTS.items():
        os.environ.setdefault(name, value)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    # mlflow.genai の関数は、中で古い名前を呼ぶ間だけこの警告を止める。止め方がスレッドごとでは
    # ないので、複数のスレッドから呼ぶと漏れることがある
    warnings.filterwarnings("ignore", r"The `mlflow\..* API is moved to", FutureWarning)
    if "mlflow" in sys.modules:  # import 済みなら、起動時に作られたテレメトリーも止める
        with contextlib.suppress(ImportError):
            from mlflow.telemetry import set_telemetry_client

            set_telemetry_client()


def bypass_proxy() -> None:
    """手元の相手への通信を、``HTTP_PROXY`` などのプロキシに送らないようにする。"""
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    excluded = [host.strip() for host in given.split(",") if host.strip()]
    if "*" not in excluded:
        value = ",".join(dict.fromkeys([*excluded, *LOOPBACK]))
        os.environ.update(NO_PROXY=value, no_proxy=value)


def use_real_llm() -> bool:
    """本物の LLM を使うか。``OPENAI_API_KEY`` があり ``CHAPTER8_OFFLINE`` がないとき。"""
    return bool(os.environ.get("OPENAI_API_KEY")) and not os.environ.get("CHAPTER8_OFFLINE")


@dataclass(frozen=True)
class Lab:
    """1 本のサンプルに渡す、手元の環境。"""

    home: Path
    tracking_uri: str
    experiment_id: str | None = None
    llm: StubLlm | None = None


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
    from .doctor.setup_problems import backend_problem, explained, mlflow_problem, require

    require(mlflow_problem())
    import mlflow

    saved_environment = dict(os.environ)
    saved_uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    go_offline()
    bypass_proxy()
    with contextlib.ExitStack() as stack:
        stack.callback(_restore, saved_environment, saved_uri)
        stack.enter_context(explained())
        stub = stack.enter_context(_stub_llm()) if llm and not use_real_llm() else None
        own = not os.environ.get("MLFLOW_TRACKING_URI")
        uri = local_store(fresh_store) if own else os.environ["MLFLOW_TRACKING_URI"]
        mlflow.set_tracking_uri(uri)
        require(backend_problem(uri))
        stack.callback(_flush)
        experiment_id = None
        if experiment:
            if own:
                set_aside(experiment)
            experiment_id = mlflow.set_experiment(experiment).experiment_id
        yield Lab(home(), uri, experiment_id, stub)


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
def _stub_llm() -> Iterator[StubLlm]:
    try:
        from .llm.server import StubLlm
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"LLM スタブに {error.name} が要ります: pip install -r requirements.txt "
            "(または OPENAI_API_KEY と OPENAI_BASE_URL で LLM の接続先を設定します)"
        ) from error
    with StubLlm() as stub:
        os.environ["OPENAI_BASE_URL"] = stub.base_url
        os.environ["OPENAI_API_KEY"] = "sk-local-stub"
        yield stub


def _flush() -> None:
    import mlflow

    mlflow.flush_trace_async_logging()


def _restore(environment: dict[str, str], tracking_uri: str | None) -> None:
    import mlflow

    # None は「未設定」に戻す。set_tracking_uri は環境変数も変えるので、環境はその後で戻す
    mlflow.set_tracking_uri(tracking_uri)  # type: ignore[arg-type]
    os.environ.clear()
    os.environ.update(environment)
