"""8.1.2 トレースの設計指針・8.1.6 メタデータとタグ(リスト8.5, 8.7, 8.8)。

「あのユーザーの、あの会話」を後から探せるように、リクエストの文脈をトレースに付ける。ユーザーと
セッションはタグではなくメタデータに入れないと、MLflow のセッション一覧にまとまらない。

実行::

    $ python chapter8_samples/01_production_tracing/metadata_tagging.py
    ユーザー user-tanaka: 2 件 ['req-1', 'req-2']、スパン 4 個
    セッション session-2: 1 件 ['req-3']、スパン 2 個
    リクエスト req-2: 1 件 ['req-2']、スパン 2 個
    本番の web: 3 件 ['req-1', 'req-2', 'req-3']、スパン 6 個
    エラー: 0 件 []、スパン 0 個
    トレースの外: False

Databricks でも同じ検索式が使える。メタデータは 250 文字を超えるとトレース情報ごと拒否されるため、
``RequestContext`` が作る時点で長さを確かめる。
"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import contextvars
import functools
import logging
import os
import uuid
from collections.abc import Awaitable, Callable, Generator, Mapping, MutableMapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypeVar, cast

import mlflow
import mlflow.tracing

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan, Trace

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Scope = MutableMapping[str, Any]
AsgiApp = Callable[[Scope, Any, Any], Awaitable[None]]

MAX_METADATA_CHARS = 250
"""ユーザー・セッション・リクエスト ID の上限。超えるとトレース情報が保存されない。"""
MAX_TAG_CHARS = 4096

# 検索式にもこの名前を使う
ENVIRONMENT_TAG = "environment"
VERSION_TAG = "service.version"
REGION_TAG = "deployment.region"
REQUEST_TAG = "request_id"


_MAY_BE_NONE = ("user_id", "session_id", "environment", "service_version", "region")


def _new_request_id() -> str:
    return f"req-{uuid.uuid4().hex}"


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """1 リクエストの文脈。値はすべて文字列で、長さは作るときに確かめる。"""

    user_id: str | None = None
    """個人を直接表す値(メールアドレスなど)ではなく、社内の ID を入れる。"""
    session_id: str | None = None
    request_id: str = field(default_factory=_new_request_id)
    """省略すると自動で作る。外から受け取った値はアクセスログと突き合わせられる。"""
    environment: str | None = None
    service_version: str | None = None
    region: str | None = None
    extra_tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        for name in ("user_id", "session_id", "request_id"):
            _check(name, getattr(self, name), MAX_METADATA_CHARS)
        for name in ("environment", "service_version", "region"):
            _check(name, getattr(self, name), MAX_TAG_CHARS)
        for key, value in self.extra_tags.items():
            _check(f"key of extra_tags {key!r}", key, MAX_METADATA_CHARS)
            _check(f"extra_tags[{key!r}]", value, MAX_TAG_CHARS)
            if key.startswith("mlflow."):
                raise ValueError(f"extra_tags[{key!r}]: names starting with 'mlflow.' are reserved")
        object.__setattr__(self, "extra_tags", dict(self.extra_tags))

    def tags(self) -> dict[str, str]:
        """トレースに付けるタグ(値のないものは含まない)。"""
        named = {
            ENVIRONMENT_TAG: self.environment,
            VERSION_TAG: self.service_version,
            REGION_TAG: self.region,
            REQUEST_TAG: self.request_id,
        }
        return {**self.extra_tags, **{key: value for key, value in named.items() if value}}


def _check(name: str, value: object, limit: int) -> None:
    if value is None and name in _MAY_BE_NONE:
        return
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={value!r} must be a non-empty string")
    if len(value) > limit:
        raise ValueError(f"{name} has {len(value)} characters; MLflow keeps at most {limit}")


def add_trace_metadata(context: RequestContext) -> bool:
    """実行中のトレースに文脈を付ける。トレースの中(スパンの中)で呼ぶ。

    Returns:
        付けたら ``True``。間引かれた・トレースの外・無効のときは ``False``(警告は出ない)。
    """
    span = mlflow.get_current_active_span()
    if span is None:
        return False
    if _otlp_only():
        return _as_root_attributes(span, context)
    mlflow.update_current_trace(
        user=context.user_id,
        session_id=context.session_id,
        client_request_id=context.request_id,
        tags=context.tags(),
    )
    return True


def _otlp_only() -> bool:
    """OTLP だけで送っているか。そのときトレースのタグは届かず、付けるとルートスパンが失われる。"""
    endpoint = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get(
        "OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    enabled = os.environ.get("MLFLOW_ENABLE_OTLP_EXPORTER", "true").lower() not in ("false", "0")
    dual = os.environ.get("MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "").lower() in ("true", "1")
    return bool(endpoint) and enabled and not dual


def _as_root_attributes(span: LiveSpan, context: RequestContext) -> bool:
    """OTLP では、MLflow サーバーがルートスパンの属性をタグ・ユーザー・セッションに直す。"""
    if span.parent_id is not None:
        logger.warning("over OTLP call add_trace_metadata() in the root span, not %r", span.name)
        return False
    values = {f"mlflow.traceTag.{key}": value for key, value in context.tags().items()}
    if context.user_id:
        values["user.id"] = context.user_id
    if context.session_id:
        values["session.id"] = context.session_id
    span.set_attributes(values)
    return True


@contextlib.contextmanager
def request_scope(context: RequestContext) -> Generator[RequestContext, None, None]:
    """この中で始まるトレースすべてに文脈を付ける。

    自動トレース(``mlflow.openai.autolog`` など)のように、自分のコードがないところで使う。
    ``client_request_id`` は付かないので、リクエスト ID はタグ ``request_id`` で探す。
    """
    with mlflow.tracing.context(
        user=context.user_id, session_id=context.session_id, tags=context.tags()
    ):
        yield context


def run_with_context(
    executor: Executor, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
) -> Future[R]:
    """``executor.submit`` と同じだが、実行中のトレースと ``request_scope`` を引き継ぐ。

    素の ``submit`` や ``Thread`` では引き継がれず、別のトレースに分かれてしまう
    (``asyncio.to_thread`` と ``asyncio.gather`` は引き継ぐ)。
    """
    call = functools.partial(function, *args, **kwargs)
    return executor.submit(contextvars.copy_context().run, call)


def outgoing_headers() -> dict[str, str]:
    """次のサービスへ渡す HTTP ヘッダー(``traceparent``)。トレースの外では空。"""
    if mlflow.get_current_active_span() is None:
        return {}
    return mlflow.tracing.get_tracing_context_headers_for_http_request()


@contextlib.contextmanager
def incoming_trace(headers: Mapping[str, str]) -> Generator[bool, None, None]:
    """呼び出し元のトレースに加わる。``traceparent`` がなければ何もせず ``False`` を渡す。

    加わったトレースのユーザーとセッションは、呼び出し元が付けたものになる。
    """
    lowered = {key.lower(): value for key, value in headers.items()}
    if "traceparent" not in lowered:
        yield False
        return
    with mlflow.tracing.set_tracing_context_from_http_request_headers(lowered):
        try:
            yield True
        finally:
            _hand_over_spans()


def _hand_over_spans() -> None:
    """終わったスパンを、トレースの控えが消える前に送信待ちへ移す。

    MLflow 3.17 は抜けるときに控えを消すため、まとめて送る既定の設定では、移さないとすべて
    失われる。通信は待たない。
    """
    from mlflow.tracing.provider import _get_span_processor  # OTLP を待たせないため 1 つだけ選ぶ

    if processor := _get_span_processor():
        processor.force_flush()


def context_from_headers(headers: Mapping[str, str]) -> RequestContext:
    """``X-User-Id`` などのヘッダーから文脈を作る。長すぎる値は切り詰める。

    ユーザーが自由に書ける値である。本番では認証の結果から作る関数に差し替える。
    """
    lowered = {key.lower(): value for key, value in headers.items()}

    def read(name: str) -> str | None:
        return lowered.get(name, "").strip()[:MAX_METADATA_CHARS] or None

    return RequestContext(
        user_id=read("x-user-id"),
        session_id=read("x-session-id"),
        request_id=read("x-request-id") or _new_request_id(),
    )


ContextReader = Callable[[Mapping[str, str]], RequestContext]


class RequestContextMiddleware:
    """FastAPI などの ASGI ミドルウェア: リクエストごとに ``request_scope`` を張る。

    ``app.add_middleware(RequestContextMiddleware)``。ストリーミングの応答が終わるまで有効。
    """

    def __init__(self, app: AsgiApp, read: ContextReader = context_from_headers) -> None:
        """``read`` はヘッダーから文脈を作る関数。"""
        self._app = app
        self._read = read

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """ASGI の入り口。HTTP 以外(lifespan など)はそのまま渡す。"""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        pairs = cast("Sequence[tuple[bytes, bytes]]", scope.get("headers", ()))
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in pairs}
        with incoming_trace(headers), request_scope(self._read(headers)):
            await self._app(scope, receive, send)


def init_flask(app: Any, read: ContextReader = context_from_headers) -> None:
    """Flask アプリで、リクエストごとに ``request_scope`` を張る。"""
    from flask import g, request

    def enter() -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(incoming_trace(dict(request.headers)))
        stack.enter_context(request_scope(read(dict(request.headers))))
        g.trace_scope = stack

    def leave(_error: BaseException | None) -> None:
        if stack := g.pop("trace_scope", None):
            stack.close()

    app.before_request(enter)
    app.teardown_request(leave)


def find_traces(
    *,
    user: str | None = None,
    session: str | None = None,
    request_id: str | None = None,
    environment: str | None = None,
    status: Literal["OK", "ERROR"] | None = None,
    min_latency_ms: int | None = None,
    name: str | None = None,
    tags: Mapping[str, str] | None = None,
    experiment_ids: Sequence[str] | None = None,
    max_results: int = 100,
) -> list[Trace]:
    """条件をすべて満たすトレースを、新しい順に返す。

    Args:
        request_id: ``RequestContext.request_id``(トレース ID ではない)。
        min_latency_ms: これ以上かかったトレースだけ(ミリ秒)。
        experiment_ids: 省略すると、いまのエクスペリメント。

    Raises:
        ValueError: 検索式に書けない値(``'`` と ``"`` の両方を含む文字列など)。
    """
    if isinstance(experiment_ids, str):  # "12" が、エクスペリメント 1 と 2 の検索になってしまう
        raise ValueError(f"experiment_ids={experiment_ids!r} must be a list of experiment ids")
    equal: dict[str, str | None] = {
        "metadata.`mlflow.trace.user`": user,
        "metadata.`mlflow.trace.session`": session,
        f"tags.`{REQUEST_TAG}`": request_id,
        f"tags.`{ENVIRONMENT_TAG}`": environment,
        "status": status,
        "name": name,
        **{f"tags.{_quote_key(key)}": value for key, value in (tags or {}).items()},
    }
    parts = [f"{key} = {_quote(value)}" for key, value in equal.items() if value is not None]
    if min_latency_ms is not None:
        parts.append(f"execution_time_ms >= {int(min_latency_ms)}")
    found = mlflow.search_traces(
        locations=None if experiment_ids is None else list(experiment_ids),
        filter_string=" AND ".join(parts) or None,
        max_results=max_results,
        order_by=["timestamp_ms DESC"],
        return_type="list",
    )
    return cast("list[Trace]", found)


def _quote(value: object) -> str:
    """MLflow の検索式には引用符のエスケープがないので、含まれないほうの引用符で囲む。"""
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be a string")
    for mark in ("'", '"'):
        if mark not in value:
            return f"{mark}{value}{mark}"
    raise ValueError(f"{value!r} contains both kinds of quotes; MLflow filters cannot express it")


def _quote_key(key: str) -> str:
    if "`" in key:
        raise ValueError(f"tag key {key!r} contains a backquote; MLflow filters cannot express it")
    return f"`{key}`"


def main() -> None:
    """2 人のユーザーの会話を記録し、ユーザー・セッション・リクエスト ID で探す。"""
    from chapter8_samples import _lab

    talks = [
        ("user-tanaka", "session-1", "返品の期限は?"),
        ("user-tanaka", "session-1", "送料は誰が払う?"),
        ("user-sato", "session-2", "領収書がほしい"),
    ]
    with _lab.sample("ch8-metadata-tagging"):
        for number, (user, session, question) in enumerate(talks, 1):
            context = RequestContext(
                user_id=user,
                session_id=session,
                request_id=f"req-{number}",
                environment="production",
                service_version="1.4.0",
                region="japaneast",
                extra_tags={"channel": "web"},
            )
            _answer(question, context)
        mlflow.flush_trace_async_logging()
        _show("ユーザー user-tanaka", find_traces(user="user-tanaka"))
        _show("セッション session-2", find_traces(session="session-2"))
        _show("リクエスト req-2", find_traces(request_id="req-2"))
        _show("本番の web", find_traces(environment="production", tags={"channel": "web"}))
        _show("エラー", find_traces(status="ERROR"))
        print("トレースの外:", add_trace_metadata(RequestContext(user_id="user-tanaka")))


@mlflow.trace(name="chat")
def _answer(question: str, context: RequestContext) -> str:
    add_trace_metadata(context)
    with ThreadPoolExecutor(1) as pool:  # 別のスレッドの検索も同じトレースに入る
        return run_with_context(pool, _search, question).result()


@mlflow.trace(name="search", span_type="RETRIEVER")
def _search(question: str) -> str:
    return f"「{question}」への回答"


def _show(title: str, traces: list[Trace]) -> None:
    # 検索は新しい順だが、同じミリ秒に始まったものの順は決まらない
    names = sorted(str(trace.info.client_request_id) for trace in traces)
    spans = sum(len(trace.data.spans) for trace in traces)
    print(f"{title}: {len(traces)} 件 {names}、スパン {spans} 個")


if __name__ == "__main__":
    main()
