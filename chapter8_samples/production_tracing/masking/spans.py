"""終わりかけのスパンの、書き換えられるすべての場所。"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

Change = Callable[[Any], Any]

_SYSTEM_ATTRIBUTES = (
    "mlflow.traceRequestId",
    "mlflow.experimentId",
    "mlflow.spanStartTimeNs",
    "mlflow.spanType",
    "mlflow.spanLogLevel",
    "mlflow.chat.tokenUsage",
)
_SYSTEM_KEYS = (
    "mlflow.trace_schema",
    "mlflow.trace.tokenUsage",
    "mlflow.trace.cost",
    "mlflow.artifactLocation",
)


def rewrite(span: LiveSpan, change: Change) -> None:
    """スパンと、そのトレースの、書き換えられるすべての場所に ``change`` を当てる。"""
    # 文字列だけを隠すときは、MLflow なしで使えるようにここで読み込む
    from .._internals import open_trace_info, rewrite_events, rewrite_status

    attributes = span.attributes
    for key, value in _values(attributes, change).items():
        if key not in _SYSTEM_ATTRIBUTES and value != attributes[key]:
            _set(span, key, value)
    rewrite_events(span, lambda events: _event_attributes(events, change))
    rewrite_status(span, change)
    with open_trace_info(span.trace_id) as info:
        if info is not None:
            _rewrite_info(info, change)


def _set(span: LiveSpan, key: str, value: Any) -> None:
    if key == "mlflow.spanInputs":
        span.set_inputs(value)
    elif key == "mlflow.spanOutputs":
        span.set_outputs(value)
    else:
        span.set_attribute(key, value)


def _values(values: dict[str, Any], change: Change) -> dict[str, Any]:
    """``change`` を当てた値。キーの名前("password" など)も、隠すかどうかを決める。"""
    changed = change(values)
    if not isinstance(changed, dict):  # 隠す処理が失敗したとき
        return dict.fromkeys(values, changed)
    return dict(zip(values, cast("dict[Any, Any]", changed).values(), strict=True))


def _event_attributes(events: list[Any], change: Change) -> list[dict[str, Any]]:
    """イベントの属性。ストリーミングの断片は何件ものイベントに分かれるので、まとめて隠す。"""
    originals = [dict(event.attributes or {}) for event in events]
    # LangChain の "new_token" の token は、秘密ではなく文の断片
    values = [
        {
            f"{key} piece" if event.name == "new_token" else key: attributes[key]
            for key in attributes
        }
        for event, attributes in zip(events, originals, strict=True)
    ]
    changed = change(values)
    if not isinstance(changed, list):
        return [dict.fromkeys(attributes, changed) for attributes in originals]
    return [
        dict(zip(attributes, new.values(), strict=True))
        for attributes, new in zip(originals, cast("list[dict[Any, Any]]", changed), strict=True)
    ]


def _rewrite_info(info: Any, change: Change) -> None:
    for values in (info.tags, info.trace_metadata):
        own = {key: value for key, value in values.items() if not key.startswith(_SYSTEM_KEYS)}
        values.update(_values(own, change))
    for name in ("request_preview", "response_preview", "client_request_id"):
        _rewrite_field(info, name, change)
    for assessment in info.assessments:
        _rewrite_assessment(assessment, change)


def _rewrite_assessment(assessment: Any, change: Change) -> None:
    """トレースが開いている間に付けられた評価(``mlflow.log_feedback`` など)。"""
    feedback = assessment.feedback
    _rewrite_field(assessment, "rationale", change)
    _rewrite_field(assessment.source, "source_id", change)
    _rewrite_field(feedback, "value", change)
    _rewrite_field(assessment.expectation, "value", change)
    for error in (assessment.error, getattr(feedback, "error", None)):
        _rewrite_field(error, "error_message", change)
        _rewrite_field(error, "stack_trace", change)
    if assessment.metadata:
        assessment.metadata = _values(assessment.metadata, change)


def _rewrite_field(owner: Any, name: str, change: Change) -> None:
    if (value := getattr(owner, name, None)) is not None:
        setattr(owner, name, change(value))
