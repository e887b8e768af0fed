"""8.1.6 アプリのログとトレースを、トレース ID とリクエスト ID で突き合わせる。"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator
from contextvars import ContextVar

from ._internals import active_trace_id

Ids = tuple[str | None, tuple[str, str] | None]
_OF_SCOPE: ContextVar[str | None] = ContextVar("request_of_scope", default=None)
_OF_TRACE: ContextVar[tuple[str, str] | None] = ContextVar("request_of_trace", default=None)


@contextlib.contextmanager
def request_id_scope(request_id: str | None) -> Generator[None, None, None]:
    """この中のログに、リクエスト ID を付ける。"""
    outside = _OF_SCOPE.get()
    _OF_SCOPE.set(request_id)
    try:
        yield
    finally:
        _OF_SCOPE.set(outside)


def bind_request_id(request_id: str) -> bool:
    """実行中のトレースのログに、リクエスト ID を付ける。トレースの外では ``False``。"""
    trace_id = active_trace_id()
    if trace_id is None:
        return False
    _OF_TRACE.set((trace_id, request_id))
    return True


def saved_ids() -> Ids:
    """いまのリクエスト ID(``restore_ids`` に渡す)。"""
    return _OF_SCOPE.get(), _OF_TRACE.get()


def restore_ids(ids: Ids) -> None:
    """``saved_ids`` のときのリクエスト ID に戻す。"""
    _OF_SCOPE.set(ids[0])
    _OF_TRACE.set(ids[1])


def _request_id(trace_id: str | None) -> str | None:
    """トレースに付けたものを、``request_scope`` のものより優先する。"""
    scope, (trace, request) = _OF_SCOPE.get(), _OF_TRACE.get() or (None, None)
    return request if trace is not None and trace == trace_id else scope


class TraceContextFilter(logging.Filter):
    """アプリのログに ``trace_id``(``tr-...``)と ``request_id`` を付ける。ないときは ``-``。

    ``logging.config.dictConfig`` の ``filters`` に次の 1 行を加え、ハンドラーに
    ``"filters": ["trace"]`` と書く(ロガーに付けると、子のロガーのログには効かない)::

        "trace": {"()": "chapter8_samples.production_tracing.TraceContextFilter"}

    ``QueueHandler`` を使うときは、そちらに付ける。書き出すスレッドでは、リクエストが分からない。
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """``record`` に 2 つの属性を足す。先に付いているものは変えない。"""
        values = vars(record)
        try:
            trace_id = active_trace_id()
        except Exception:  # ログの都合で、アプリを止めない
            trace_id = None
        values.setdefault("trace_id", trace_id or "-")
        values.setdefault("request_id", _request_id(trace_id) or "-")
        return bool(super().filter(record))
