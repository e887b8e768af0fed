"""手元だけで動かすための環境: データの置き場所、外へ接続しない既定値、プロキシ、鍵。"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from pathlib import Path

OFFLINE_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    # 空でないと、最初の LLM スパンで価格カタログを取りに行き、つながらないまま数秒待つ
    "MLFLOW_MODEL_CATALOG_URI": "",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # 入っていれば、import のたびに料金を取りに行く
    # 既定の 10 では、トレースの送信と合わせて SQLite の接続(15 本)を使い切り、30 秒待つことがある
    "MLFLOW_GENAI_EVAL_MAX_WORKERS": "4",
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
