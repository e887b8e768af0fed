"""8.1.4 送れない文字(半分に切れた絵文字など)や、64 ビットを超える整数で、トレースを失わない。

どれも、送る前に直す。そのまま送ると、MLflow は一緒に送るものも失い、OTLP はその属性を黙って捨て、
SQLite では読めなくなる。
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import copy
from typing import Any

from mlflow.entities import Assessment, Span, Trace, TraceData, TraceInfo
from mlflow.entities.assessment import ExpectationValue, FeedbackValue
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Status

from .._internals import copy_resource

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_LONG_NUMBER = re.compile(rb"(?<![\d.])\d{19}")  # 小数部(埋め込みや料金)は、直さなくてよい
_OF_MLFLOW = Trace, TraceInfo, TraceData, Assessment, FeedbackValue, ExpectationValue
_SPAN_FIELDS = (
    "name context parent resource attributes events links kind status start_time end_time "
    "instrumentation_scope"
)


def copied_span(span: ReadableSpan, **changed: Any) -> ReadableSpan:
    """``changed`` だけを替えたコピー(終わったスパンは、書き換えられない)。"""
    same: dict[str, Any] = {name: getattr(span, name) for name in _SPAN_FIELDS.split()}
    return ReadableSpan(**{**same, **changed})


def as_utf8(value: Any) -> Any:
    """UTF-8 にできない文字を置き換え、64 ビットを超える整数を文字列にしたコピー。"""
    if type(value) is str:  # 文字列でもある列挙型は、そのまま
        return _SURROGATE.sub(chr(0xFFFD), value)
    if isinstance(value, Mapping):
        return {as_utf8(key): as_utf8(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [as_utf8(item) for item in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, (*_OF_MLFLOW, Event, Status)):
        cleaned = copy(value)
        vars(cleaned).update(as_utf8(vars(value)))
        return cleaned
    if isinstance(value, Span | ReadableSpan):
        return _cleaned_span(value) if _may_not_be_sent(value) else value
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return value


def _cleaned_span(span: Span | ReadableSpan) -> Span | ReadableSpan:
    if isinstance(span, Span):
        items = as_utf8(span.attributes).items()  # to_dict では JSON の文字列のまま
        texts = {key: json.dumps(one, ensure_ascii=False) for key, one in items}
        cleaned = Span.from_dict({**as_utf8(span.to_dict()), "attributes": texts})
        copy_resource(span, cleaned)
        return cleaned
    texts = {name: getattr(span, name) for name in ("name", "attributes", "events", "status")}
    return copied_span(span, **as_utf8(texts))


def _may_not_be_sent(span: Span | ReadableSpan) -> bool:
    events = [(event.name, dict(event.attributes or {})) for event in span.events]
    texts = [span.name, span.status.description, dict(span.attributes or {}), events]
    try:
        shown = json.dumps(texts, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return bool(_LONG_NUMBER.search(shown))
