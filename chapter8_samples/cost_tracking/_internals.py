"""MLflow の公開されていない名前(3.17.2 で確かめた)。使う理由と一緒に、ここだけに置く。"""

from __future__ import annotations

from typing import Any

from mlflow.entities import Span


def stored_attributes(span: Span) -> dict[str, Any]:
    """MLflow が JSON の文字列で持つ属性のコピー。``get_attribute`` で 7 つ読むより 3 倍速い。"""
    return getattr(span, "_span").attributes.copy()  # noqa: B009
