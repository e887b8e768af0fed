"""8.1.4 送れない文字(半分に切れた絵文字など)や、64 ビットを超える整数で、トレースを失わない。"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

from mlflow.entities import Assessment, Span, TraceData, TraceInfo
from mlflow.entities.assessment import ExpectationValue, FeedbackValue
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Status

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_LONG_NUMBER = re.compile(rb"\d{19}")
_OBJECTS = TraceInfo, TraceData, Assessment, FeedbackValue, ExpectationValue, Event, Status
_SPAN_FIELDS = (
    "name context parent resource attributes events links kind status start_time end_time "
    "instrumentation_scope"
)


def copied_span(span: ReadableSpan, **changed: Any) -> ReadableSpan:
    """``changed`` だけを替えたコピー(終わったスパンは、書き換えられない)。"""
    same: dict[str, Any] = {name: getattr(span, name) for name in _SPAN_FIELDS.split()}
    return ReadableSpan(**{**same, **changed})


def send_as_utf8(send: Callable[..., Any], *values: Any) -> Any:
    """``send(*values)``。書けないと MLflow は一緒に送るものも失うので、置き換えてもう一度送る。"""
    try:
        return send(*values)
    except Exception as error:
        if not cannot_be_written(error):
            raise
        return send(*map(as_utf8, values))


def cannot_be_written(error: BaseException | None) -> bool:
    """送る側で、文字か整数を書けなかったか(データベースの層は、別の例外に包む)。"""
    while error is not None:
        too_big = isinstance(error, ValueError) and "Value out of range" in str(error)  # protobuf
        if too_big or isinstance(error, UnicodeEncodeError):
            return True
        error = error.__cause__
    return False


def send_cleaned(send: Callable[..., Any], value: Any) -> Any:
    """``send(value)``。書けない属性を OTLP は黙って捨て、SQLite は読めなくするので、先に直す。"""
    return send(as_utf8(value))


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
    if isinstance(value, _OBJECTS):
        cleaned = copy(value)
        vars(cleaned).update(as_utf8(vars(value)))
        return cleaned
    if isinstance(value, Span):
        items = as_utf8(value.attributes).items()  # to_dict では JSON の文字列のまま
        texts = {key: json.dumps(one, ensure_ascii=False) for key, one in items}
        return Span.from_dict({**as_utf8(value.to_dict()), "attributes": texts})
    if isinstance(value, ReadableSpan) and _may_not_be_sent(value):
        texts = {name: getattr(value, name) for name in ("name", "attributes", "events", "status")}
        return copied_span(value, **as_utf8(texts))
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return str(value)
    return value


def _may_not_be_sent(span: ReadableSpan) -> bool:
    events = [dict(event.attributes or {}) for event in span.events]
    texts = [span.name, span.status.description, dict(span.attributes or {}), events]
    try:
        shown = json.dumps(texts, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return True
    return bool(_LONG_NUMBER.search(shown))
