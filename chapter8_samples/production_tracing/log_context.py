"""8.1.6 アプリのログとトレースを、トレース ID とリクエスト ID で突き合わせる。"""

from __future__ import annotations

import logging

from ._internals import active_trace_id, open_trace_info, scope_tags

REQUEST_ID = "request_id"
"""リクエスト ID を入れる、トレースのタグ。"""


def bind_request_id(request_id: str) -> bool:
    """実行中のトレースのログに、リクエスト ID を付ける。トレースの外では ``False``。"""
    with open_trace_info(active_trace_id() or "") as info:
        if info is not None:
            info.client_request_id = request_id
        return info is not None


class TraceContextFilter(logging.Filter):
    """アプリのログに ``trace_id``(``tr-...``)と ``request_id`` を付ける。ないときは ``-``。

    ``logging.config.dictConfig`` の ``filters`` に次の 1 行を加え、ハンドラーに
    ``"filters": ["trace"]`` と書く(ロガーに付けると、子のロガーのログには効かない)::

        "trace": {"()": "chapter8_samples.production_tracing.TraceContextFilter"}

    ``QueueHandler`` を使うときは、そちらに付ける。書き出すスレッドでは、リクエストが分からない。
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """``record`` に 2 つの属性を足す。先に付いているものは変えない。"""
        trace_id = request_id = None
        try:
            trace_id = active_trace_id()
            with open_trace_info(trace_id or "") as info:
                request_id = info and (info.client_request_id or info.tags.get(REQUEST_ID))
            request_id = request_id or scope_tags().get(REQUEST_ID)
        except Exception:  # ログの都合で、アプリを止めない
            pass
        vars(record).setdefault("trace_id", trace_id or "-")
        vars(record).setdefault("request_id", request_id or "-")
        return bool(super().filter(record))
