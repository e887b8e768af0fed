"""8.1.6 トレースとリクエストの文脈を、スレッド・HTTP・Web フレームワークの先へ引き継ぐ。

``traceparent`` は入り口のプロキシもブラウザーも付け、誰でも書ける。MLflow が作ったものでなければ、
加わったトレースは保存されないか、``IN_PROGRESS`` のまま残る。だからリクエストごとに自分のトレースを
始め、呼び出し元の ID はメタデータに控える。加わるのは、呼び出し元を信用すると書いたときだけ。
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, MutableMapping
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager
from typing import Any, ParamSpec, TypeVar

import mlflow.tracing
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ._internals import active_trace_id, current_span, hand_over_spans, otel_span_is_current

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# 呼び出し元の ID を控えるメタデータ(16 進 32 桁と 16 桁)
CALLER_TRACE_ID = "caller.trace_id"
CALLER_SPAN_ID = "caller.span_id"


def run_with_context(
    executor: Executor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> Future[R]:
    """``executor.submit`` と同じだが、実行中のトレースと ``request_scope`` を引き継ぐ。

    素の ``submit`` や ``Thread`` では、別のトレースに分かれる(``asyncio.to_thread`` は引き継ぐ)。
    """
    call = functools.partial(function, *args, **kwargs)
    return executor.submit(contextvars.copy_context().run, call)


def outgoing_headers() -> dict[str, str]:
    """次のサービスへ渡す HTTP ヘッダー(``traceparent``)。トレースの外では空。"""
    if active_trace_id() is None:
        return {}
    return mlflow.tracing.get_tracing_context_headers_for_http_request()


@contextlib.contextmanager
def incoming_trace(
    headers: Mapping[str, str], *, join_caller: bool = False
) -> Generator[bool, None, None]:
    """届いたリクエストのトレースを始められるようにする。呼び出し元に加わったら ``True`` を渡す。

    ``join_caller`` は、呼ぶのが同じ MLflow に記録するサービスだけのときに使う。ユーザーも、呼び出し
    元のものになる。``traceparent`` がない・壊れている・記録しない印(``-00``)なら加わらない。
    """
    lowered = {key.lower(): value for key, value in headers.items()}
    caller = trace.get_current_span(TraceContextTextMapPropagator().extract(lowered, Context()))
    joins = join_caller and caller.get_span_context().trace_flags.sampled
    with _joined(caller, lowered) if joins else _own_trace(caller.get_span_context()):
        yield joins


@contextlib.contextmanager
def _own_trace(caller: trace.SpanContext) -> Generator[None, None, None]:
    # ほかの計装が ``traceparent`` を先に読み、呼び出し元のトレースや、MLflow が記録していない
    # トレースのスパンを始めていれば、そこから離れる
    ids = {
        CALLER_TRACE_ID: trace.format_trace_id(caller.trace_id),
        CALLER_SPAN_ID: trace.format_span_id(caller.span_id),
    }
    span = current_span()
    here = span.get_span_context()
    is_unknown = span.is_recording() and active_trace_id() is None
    with contextlib.ExitStack() as stack:
        if here.is_remote or is_unknown or here.trace_id == caller.trace_id:
            stack.enter_context(otel_span_is_current(trace.INVALID_SPAN))
        stack.enter_context(mlflow.tracing.context(metadata=ids if caller.is_valid else None))
        yield


_joining = threading.Lock()
_requests: Counter[int] = Counter()  # 加わっているトレースごとの、続いているリクエスト
_leave: dict[int, Callable[[], object]] = {}


@contextlib.contextmanager
def _joined(caller: trace.Span, headers: Mapping[str, str]) -> Generator[None, None, None]:
    # 同じトレースのリクエストは並んで届く。MLflow の控えをリクエストごとに作ると、先に終わったもの
    # が、ほかのスパンごと捨てる。最初のもので作り、最後のもので消す
    trace_id = caller.get_span_context().trace_id
    with _joining:
        if not _requests[trace_id]:
            _leave[trace_id] = _join(headers)
        _requests[trace_id] += 1
    try:
        with otel_span_is_current(caller):
            yield
    finally:
        hand_over_spans()
        with _joining:
            _requests[trace_id] -= 1
            if not _requests[trace_id]:
                del _requests[trace_id]
                _leave.pop(trace_id)()


def _join(headers: Mapping[str, str]) -> Callable[[], object]:
    context = contextvars.copy_context()
    joined = mlflow.tracing.set_tracing_context_from_http_request_headers(dict(headers))
    context.run(joined.__enter__)
    return lambda: context.run(joined.__exit__, None, None, None)


# ---- Web フレームワーク ----

RequestScope = Callable[[Mapping[str, str]], AbstractContextManager[object]]


def read_safely(read: Callable[[Mapping[str, str]], R], headers: Mapping[str, str]) -> R | None:
    """``read(headers)``。失敗しても、記録の都合で応答は失敗させない(``None`` を返す)。"""
    try:
        return read(headers)
    except Exception as error:
        kind = type(error).__name__
        logger.warning("%r failed (%s); this request has no user or session", read, kind)
        return None


class AsgiMiddleware:
    """HTTP のリクエストごとに ``scope(ヘッダー)`` に入り、応答を送り終えたら出る ASGI アプリ。"""

    def __init__(self, app: Any, scope: RequestScope) -> None:
        self._app = app
        self._scope = scope

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """ASGI の入り口。HTTP 以外(lifespan や websocket)はそのまま渡す。"""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[str, str] = {}
        for pair in scope.get("headers", ()):
            name, value = (text.decode("latin-1") for text in pair)
            headers[name] = f"{headers[name]},{value}" if name in headers else value
        with self._scope(headers):
            await self._app(scope, receive, send)


def scope_flask_requests(app: Any, scope: RequestScope) -> None:
    """Flask アプリで、リクエストごとに ``scope(ヘッダー)`` に入り、応答を送り終えたら出る。

    ``teardown_request`` では早すぎる。ストリーミングの本体は、その後でサーバーが読む。
    """
    wsgi_app = app.wsgi_app

    def call(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        headers = {
            key.removeprefix("HTTP_").replace("_", "-").title(): value
            for key, value in environ.items()
            if key.startswith("HTTP_")
        }
        view = functools.partial(wsgi_app, environ, start_response)
        answer = _in_one_context(view, scope(headers))
        next(answer)  # ビューは、ここで動く
        return answer

    app.wsgi_app = call


def _in_one_context(
    view: Callable[[], Any], scope: AbstractContextManager[object]
) -> Generator[bytes, None, None]:
    """1 リクエストを、応答の本体まで 1 つの ``contextvars.Context`` で動かす。"""
    context = contextvars.copy_context()
    stack = contextlib.ExitStack()
    try:
        context.run(stack.enter_context, scope)
        body = context.run(view)
        stack.callback(getattr(body, "close", lambda: None))
        chunks: Any = context.run(iter, body)
        yield b""
        while (chunk := context.run(next, chunks, None)) is not None:
            yield chunk
    finally:  # サーバーが close() を呼ばず、捨てただけのときも
        context.run(stack.close)
