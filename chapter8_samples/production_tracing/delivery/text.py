"""8.1.4 UTF-8 にできない文字で、トレースを失わない。

半分に切れた絵文字(対になっていないサロゲート)は、MLflow の保存先にも OTLP にも書けない。MLflow は
そのトレースだけでなく、一緒に送るはずだったスパンも失い、DEBUG のログにしか残さないことがある。
ここでは、書けなかったときだけ、その文字を U+FFFD に置き換えて送り直す(正常な文字では何もしない)。
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from mlflow.entities import LiveSpan, Span, TraceData, TraceInfo
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import Status

from .._internals import raw_attributes

T = TypeVar("T")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def send_as_utf8(send: Callable[..., T], *values: Any) -> T:
    """``send(*values)``。UTF-8 にできなければ、できない文字を置き換えて、もう一度。"""
    try:
        return send(*values)
    except Exception as error:
        if not _is_about_utf8(error):
            raise
        return send(*map(as_utf8, values))


def replace_surrogates(span: LiveSpan) -> None:
    """スパンプロセッサー: 入出力と属性の、UTF-8 にできない文字を先に置き換える。"""
    for key, value in raw_attributes(span).items():
        try:
            str(value).encode()
        except UnicodeEncodeError:
            span.set_attribute(key, as_utf8(span.get_attribute(key)))


def _is_about_utf8(error: BaseException | None) -> bool:
    """データベースの層は、原因の ``UnicodeEncodeError`` を別の例外に包む。"""
    while error is not None and not isinstance(error, UnicodeEncodeError):
        error = error.__cause__
    return error is not None


def as_utf8(value: Any) -> Any:
    """文字列、その入れ物、トレース情報、スパンの、UTF-8 にできない文字を置き換えた写し。

    >>> as_utf8({"answer": ["ok " + chr(0xD83D)]})
    {'answer': ['ok \\ufffd']}
    """
    if type(value) is str:  # 文字列でもある列挙型は、そのまま
        return _SURROGATE.sub(chr(0xFFFD), value)
    if isinstance(value, Mapping):
        return {as_utf8(key): as_utf8(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_utf8(item) for item in value]
    if isinstance(value, TraceInfo):
        return replace(value, **{f.name: as_utf8(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, TraceData):
        return TraceData(as_utf8(value.spans))
    if isinstance(value, Span):
        return Span.from_dict(as_utf8(value.to_dict()))
    return _otel_span(value) if isinstance(value, ReadableSpan) else value


def _otel_span(span: ReadableSpan) -> ReadableSpan:
    return ReadableSpan(
        name=as_utf8(span.name),
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        attributes=as_utf8(span.attributes),
        events=[Event(as_utf8(e.name), as_utf8(e.attributes), e.timestamp) for e in span.events],
        links=span.links,
        kind=span.kind,
        status=Status(span.status.status_code, as_utf8(span.status.description)),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
