"""MLflow の公開されていない名前(3.17.2 で確かめた)。使う理由と一緒に、ここだけに置く。"""

from __future__ import annotations

from mlflow.tracking import fluent


def current_experiment_id() -> str | None:
    """アプリが ``set_experiment()`` で選んだエクスペリメント。尋ねる公開の関数はない。"""
    return fluent._get_experiment_id()  # pyright: ignore[reportPrivateUsage]
