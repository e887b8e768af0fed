"""終わりかけのスパンの、書き換えられるすべての場所。"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

Change = Callable[[Any], Any]

_SYSTEM_KEYS = (
    "mlflow.traceRequestId",
    "mlflow.experimentId",
    "mlflow.span",
    "mlflow.chat.tokenUsage",
    "mlflow.trace_schema",
    "mlflow.trace.tokenUsage",
    "mlflow.trace.cost",
    "mlflow.artifactLocation",
)


def rewrite(span: LiveSpan, change: Change) -> None:
    """スパンと、そのトレースの、書き換えられるすべての場所に ``change`` を当てる。"""
    # 文字列だけを隠すときは、MLflow なしで使えるようにここで読み込む
    from .._internals import open_trace_info, rewrite_events, rewrite_status

    if span.inputs is not None:
        span.set_inputs(change(span.inputs))
    if span.outputs is not None:
        span.set_outputs(change(span.outputs))
    attributes = span.attributes
    for key, value in _values(attributes, change).items():
        if value != attributes[key]:  # 変わらないものは、もとの書き方のまま残す
            span.set_attribute(key, value)
    rewrite_events(span, lambda events: _event_attributes(events, change))
    rewrite_status(span, change)
    with open_trace_info(span.trace_id) as info:
        if info is not None:
            _rewrite_info(info, change)


def _values(values: dict[str, Any], change: Change) -> dict[str, Any]:
    """``change`` を当てた値。キーの名前("password" など)も、隠すかどうかを決める。"""
    own = {key: value for key, value in values.items() if not key.startswith(_SYSTEM_KEYS)}
    changed = change(own)
    if not isinstance(changed, dict):  # 隠す処理が失敗したとき
        return dict.fromkeys(own, changed)
    return dict(zip(own, cast("dict[Any, Any]", changed).values(), strict=True))


def _event_attributes(events: list[Any], change: Change) -> list[dict[str, Any]]:
    """イベントの属性。ストリーミングの断片は何件ものイベントに分かれるので、まとめて隠す。"""
    originals = [dict(event.attributes or {}) for event in events]
    changed = change([{key: _parsed(one[key]) for key in one} for one in originals])
    if not isinstance(changed, list):
        return [dict.fromkeys(one, changed) for one in originals]
    values = [list(new.values()) for new in cast("list[dict[Any, Any]]", changed)]
    return [
        {key: _like(one[key], new) for key, new in zip(one, news, strict=True)}
        for one, news in zip(originals, values, strict=True)
    ]


def _parsed(value: Any) -> Any:
    """MLflow は、断片を JSON の文字列にしてイベントに入れる。"""
    if not isinstance(value, str) or value[:1] not in ("{", "[", '"'):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _like(original: Any, new: Any) -> Any:
    """``new`` を、もとと同じ書き方(JSON かそのままか)にしたもの。"""
    old = _parsed(original)
    if new == old:
        return original
    return new if old is original else json.dumps(new, ensure_ascii=original.isascii())


def _rewrite_info(info: Any, change: Change) -> None:
    for values in (info.tags, info.trace_metadata):
        values.update(_values(values, change))
    _rewrite_fields(info, ("request_preview", "response_preview", "client_request_id"), change)
    for one in info.assessments:  # トレースが開いている間に付けられた評価
        _rewrite_fields(one, ("rationale", "metadata"), change)
        _rewrite_fields(one.source, ("source_id",), change)
        _rewrite_fields(one.expectation, ("value",), change)
        _rewrite_fields(one.feedback, ("value",), change)
        for error in (one.error, getattr(one.feedback, "error", None)):
            _rewrite_fields(error, ("error_message", "stack_trace"), change)


def _rewrite_fields(owner: Any, names: tuple[str, ...], change: Change) -> None:
    for name in names:
        if (value := getattr(owner, name, None)) is not None:
            setattr(owner, name, change(value))
