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

    for key, value in span.attributes.items():
        if key not in _SYSTEM_ATTRIBUTES and (changed := change(value)) != value:
            _set(span, key, changed)
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


def _event_attributes(events: list[Any], change: Change) -> list[dict[str, Any]]:
    """イベントの属性。ストリーミングの断片は何件ものイベントに分かれるので、まとめて隠す。"""
    # LangChain の "new_token" の token は、秘密ではなく文の断片
    marks = [" piece" if event.name == "new_token" else "" for event in events]
    values = [
        {f"{key}{mark}": value for key, value in (event.attributes or {}).items()}
        for event, mark in zip(events, marks, strict=True)
    ]
    changed = change(values)
    if not isinstance(changed, list):  # 隠す処理が失敗したとき
        return [{"removed": changed} for _ in events]
    return [
        {key.removesuffix(mark): value for key, value in attributes.items()}
        for attributes, mark in zip(cast("list[dict[str, Any]]", changed), marks, strict=True)
    ]


def _rewrite_info(info: Any, change: Change) -> None:
    for values in (info.tags, info.trace_metadata):
        for key, value in values.items():
            if not key.startswith(_SYSTEM_KEYS):
                values[key] = change(value)
    for name in ("request_preview", "response_preview", "client_request_id"):
        if value := getattr(info, name):
            setattr(info, name, change(value))
    for assessment in info.assessments:
        _rewrite_assessment(assessment, change)


def _rewrite_assessment(assessment: Any, change: Change) -> None:
    """トレースが開いている間に付けられた評価(``mlflow.log_feedback`` など)。"""
    feedback, error = assessment.feedback, assessment.error
    places = [
        (assessment, "rationale"),
        (assessment, "metadata"),
        (assessment.source, "source_id"),
        (feedback, "value"),
        (assessment.expectation, "value"),
    ]
    for fault in (error, feedback and feedback.error):
        places += [(fault, "error_message"), (fault, "stack_trace")]
    for owner, name in places:
        if (value := getattr(owner, name, None)) is not None:
            changed = change(value)
            if isinstance(value, dict) and not isinstance(changed, dict):
                changed = {"removed": changed}
            setattr(owner, name, changed)
