"""MLflow の公開されていない名前(3.17.2 で確かめた)。使う理由と一緒に、ここだけに置く。"""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import TYPE_CHECKING

from mlflow.tracing.provider import is_tracing_enabled
from mlflow.tracking import fluent

if TYPE_CHECKING:  # mlflow-tracing だけの環境にはない
    from mlflow.genai.scorers import Scorer


def current_experiment_id() -> str | None:
    """アプリが記録するエクスペリメント。尋ねる公開の関数はない。

    MLflow につながる前(選べず、トレーシングも止めている間)は ``None``。つながれば変わるから。
    """
    chosen = fluent._active_experiment_id  # pyright: ignore[reportPrivateUsage]
    if chosen or is_tracing_enabled():
        return fluent._get_experiment_id()  # pyright: ignore[reportPrivateUsage]
    return fluent._get_experiment_id_from_env()  # pyright: ignore[reportPrivateUsage]


def forget_model_costs() -> None:
    """ジャッジの単価を調べ直す。MLflow は「カタログにない」も覚え、後で載っても見ない。"""
    with suppress(ImportError, AttributeError):
        from mlflow.genai.utils import llm_utils

        llm_utils._fetch_model_cost.cache_clear()  # pyright: ignore[reportPrivateUsage]


def enclosed_constants(scorer: Scorer) -> dict[str, object]:
    """``@scorer`` の関数が、外側の関数から受け取った定数(``longer_than(100)`` の 100)。

    元の関数を尋ねる公開の方法はなく、定義の中身(``model_dump()``)には関数の文しか入っていない。
    """
    function = getattr(scorer, "_original_func", None)
    if function is None:
        return {}
    nonlocals = inspect.getclosurevars(function).nonlocals
    return {k: v for k, v in nonlocals.items() if isinstance(v, str | int | float)}
