"""終わりかけのスパンの、書き換えられるすべての場所。"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

_CHUNK = "mlflow.chunk.value"  # MLflow が JSON にして入れる、ストリーミングの断片
Change = Callable[..., Any]  # (値, あれば名前) から、隠した値を作る関数
_SYSTEM_KEYS = (
    *("mlflow.traceRequestId", "mlflow.experimentId", "mlflow.span", "mlflow.artifactLocation"),
    *("mlflow.trace_schema", "mlflow.trace.tokenUsage", "mlflow.trace.cost", "mlflow.chat.tokenU"),
)


def rewrite(span: LiveSpan, change: Change) -> None:
    """スパンと、そのトレースの、書き換えられるすべての場所に ``change`` を当てる。"""
    # 文字列だけを隠すときは、MLflow なしで使えるようにここで読み込む
    from .._internals import open_trace_info, rewrite_events, rewrite_status

    if span.inputs is not None:
        span.set_inputs(change(span.inputs))
    if span.outputs is not None:
        span.set_outputs(change(span.outputs))
    span.set_attributes(_changes(span.attributes, change))
    rewrite_events(span, lambda events: _event_attributes(events, change))
    rewrite_status(span, change)
    with open_trace_info(span.trace_id) as info:
        if info is not None:
            _rewrite_info(info, change)


def _changes(values: dict[str, Any], change: Change) -> dict[str, Any]:
    """変わるものだけ(ほかは、もとの書き方のまま残す)。"""
    own = {key: value for key, value in values.items() if not key.startswith(_SYSTEM_KEYS)}
    changed = {key: change(value, key) for key, value in own.items()}
    return {key: new for key, new in changed.items() if new != own[key]}


def _event_attributes(events: list[Any], change: Change) -> list[dict[str, Any]]:
    """イベントの属性。ストリーミングの断片は何件ものイベントに分かれるので、まとめて隠す。"""
    originals = [dict(event.attributes or {}) for event in events]
    changed = change([{key: _parsed(key, one[key]) for key in one} for one in originals])
    if not isinstance(changed, list):  # 隠す処理が失敗した
        return [{} for _ in events]
    return [
        {
            new_key: _like(key, old, new)
            for (key, old), (new_key, new) in zip(one.items(), news.items(), strict=True)
        }
        for one, news in zip(originals, changed, strict=True)
    ]


def _parsed(key: str, value: Any) -> Any:
    """JSON の文字列の中身。MLflow の断片のほかは、"-83" も数ではない。"""
    try:
        parsed = json.loads(value)
    except (ValueError, TypeError, RecursionError):
        return value
    return parsed if key == _CHUNK or isinstance(parsed, str | list | dict) else value


def _like(key: str, old: Any, new: Any) -> Any:
    parsed = _parsed(key, old)
    if new == parsed:
        return old
    return new if parsed is old else json.dumps(new)


def _rewrite_info(info: Any, change: Change) -> None:
    for values in (info.tags, info.trace_metadata):
        values.update(_changes(values, change))
    _rewrite_fields(info, change, "request_preview", "response_preview", "client_request_id")
    for one in info.assessments:  # トレースが開いている間に付けられた評価
        _rewrite_fields(one, change, "rationale", "metadata")
        feedback_error = getattr(one.feedback, "error", None)
        for part in (one.source, one.expectation, one.feedback, one.error, feedback_error):
            _rewrite_fields(part, change, "source_id", "value", "error_message", "stack_trace")


def _rewrite_fields(owner: Any, change: Change, *names: str) -> None:
    for name in names:
        if (value := getattr(owner, name, None)) is not None:
            setattr(owner, name, change(value))
