"""8.1.6 アプリのログとトレースを、トレース ID とリクエスト ID で突き合わせる。"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from contextvars import ContextVar
from typing import NamedTuple

from ._internals import active_trace_id


class RequestIds(NamedTuple):
    """``request_scope`` のリクエスト ID と、トレースに付けたリクエスト ID。"""

    scope: str | None = None
    trace: str | None = None
    of_trace: str | None = None


_NO_IDS = RequestIds()
IDS: ContextVar[RequestIds] = ContextVar("request_ids", default=_NO_IDS)


@contextlib.contextmanager
def request_id_scope(request_id: str | None) -> Generator[None, None, None]:
    """この中のログに、リクエスト ID を付ける。"""
    outside = IDS.get().scope
    IDS.set(IDS.get()._replace(scope=request_id))
    try:
        yield
    finally:
        IDS.set(IDS.get()._replace(scope=outside))


def bind_request_id(request_id: str) -> bool:
    """実行中のトレースのログに、リクエスト ID を付ける。トレースの外では ``False``。"""
    trace_id = active_trace_id()
    if trace_id is not None:
        IDS.set(IDS.get()._replace(trace=trace_id, of_trace=request_id))
    return trace_id is not None


class TraceContextFilter(logging.Filter):
    """アプリのログに ``trace_id``(``tr-...``)と ``request_id`` を付ける。ないときは ``-``。

    ``logging.config.dictConfig`` の ``filters`` に次の 1 行を加え、ハンドラーに
    ``"filters": ["trace"]`` と書く(ロガーに付けると、子のロガーのログには効かない)::

        "trace": {"()": "chapter8_samples.production_tracing.TraceContextFilter"}

    ``QueueHandler`` を使うときは、そちらに付ける。書き出すスレッドでは、リクエストが分からない。
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """``record`` に 2 つの属性を足す。先に付いているものは変えない。"""
        try:
            trace_id = active_trace_id()
        except Exception:  # ログの都合で、アプリを止めない
            trace_id = None
        ids = IDS.get()
        request_id = ids.of_trace if trace_id and trace_id == ids.trace else ids.scope
        vars(record).setdefault("trace_id", trace_id or "-")
        vars(record).setdefault("request_id", request_id or "-")
        return bool(super().filter(record))
