"""8.1 が使う、MLflow の公開 API にない名前(MLflow 3.17.2 で確かめたもの)。

テールサンプリング、ディスクへの置き場、マスキングが差し替える名前は、それぞれのファイルにある。
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlflow
import mlflow.tracing

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider


def current_provider() -> TracerProvider | None:
    """いまのプロバイダー。公開の ``get_bridged_tracer_provider`` は、なければ作ってしまう
    (データベースの作成や接続を待つ)。
    """
    from mlflow.tracing.provider import provider

    return provider.get()


def renew_trace_buffer() -> None:
    """``MLFLOW_TRACE_BUFFER_MAX_SIZE`` はバッファーを作るときに一度しか読まれず、公開 API では
    作り直せない。
    """
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    InMemoryTraceManager.reset()


def fix_id_generator() -> None:
    """MLflow 3.17 の ID 生成器は、終了時に ``__del__`` が必ず失敗し、まれに終了が止まる。"""
    provider: Any = mlflow.tracing.get_bridged_tracer_provider()
    generator: Any = getattr(provider, "id_generator", None)
    kind: Any = generator.__class__
    if kind.__module__.startswith("mlflow.") and "__del__" in vars(kind):
        del kind.__del__


def reset_but_keep_settings() -> None:
    """``mlflow.tracing.reset()`` が消すもの(マスク処理、``set_destination`` の送り先、無効)を、
    作り直した後にも引き継ぐ。読み出す公開 API がない。
    """
    from mlflow.tracing.config import get_config
    from mlflow.tracing.provider import _MLFLOW_TRACE_USER_DESTINATION as destination
    from mlflow.tracing.provider import is_tracing_enabled

    processors, location = get_config().span_processors, destination._global_value
    enabled = is_tracing_enabled()
    mlflow.tracing.reset()
    mlflow.tracing.configure(span_processors=processors)
    destination._global_value = location
    if not enabled:
        mlflow.tracing.disable()
