"""8.1.2 トレースの設計指針・8.1.6 メタデータとタグ(リスト8.5, 8.7, 8.8)。

「あのユーザーの、あの会話」を後から探せるように、リクエストの文脈をトレースに付ける。ユーザーと
セッションはタグではなくメタデータに入れないと、MLflow のセッション一覧にまとまらない。

実行::

    $ python chapter8_samples/01_production_tracing/metadata_tagging.py
    ユーザー user-tanaka: 2 件 ['req-1', 'req-2']、スパン 4 個
    セッション session-2: 2 件 ['req-3', 'req-4']、スパン 4 個
    リクエスト req-2: 1 件 ['req-2']、スパン 2 個
    本番の web: 4 件 ['req-1', 'req-2', 'req-3', 'req-4']、スパン 8 個
    エラー: 1 件 ['req-4']、スパン 2 個
      種類: TimeoutError  top_k: 3
    トレースの外で呼ぶと: False

Databricks でも同じ検索式が使える。メタデータは 250 文字を超えるとトレース情報ごと拒否されるため、
``RequestContext`` が作る時点で長さを確かめる。
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import mlflow
import mlflow.tracing
from mlflow.entities import Trace

from chapter8_samples.production_tracing import log_context, metadata, propagation
from chapter8_samples.production_tracing.propagation import incoming_trace, run_with_context
from chapter8_samples.production_tracing.propagation import outgoing_headers as outgoing_headers
from chapter8_samples.production_tracing.spans import traced_step


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """1 リクエストの文脈。値はすべて文字列で、長さは作るときに確かめる。"""

    user_id: str | None = None
    """個人を直接表す値(メールアドレスなど)ではなく、社内の ID を入れる。"""
    session_id: str | None = None
    request_id: str = field(default_factory=lambda: f"req-{uuid.uuid4().hex}")
    """省略すると自動で作る。外から受け取った値はアクセスログと突き合わせられる。"""
    environment: str | None = None
    service_version: str | None = None
    region: str | None = None
    extra_tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        metadata.check_context(vars(self))
        # 渡した辞書が後で変わっても、影響を受けない
        object.__setattr__(self, "extra_tags", dict(self.extra_tags))

    def tags(self) -> dict[str, str]:
        """トレースに付けるタグ(値のないものは含まない)。"""
        named = {
            "environment": self.environment,
            "service.version": self.service_version,
            "deployment.region": self.region,
            "request_id": self.request_id,
        }
        return {**self.extra_tags, **{key: value for key, value in named.items() if value}}


def add_trace_metadata(context: RequestContext) -> bool:
    """実行中のトレースに文脈を付ける。トレースの中(スパンの中)で呼ぶ。

    トレースが間引かれたとき、トレースの外、トレーシングが無効のときは ``False`` を返す。
    """
    if not log_context.bind_request_id(context.request_id):
        return False
    if metadata.sends_only_otlp():  # トレースのタグは届かない
        return metadata.add_root_attributes(context.tags(), context.user_id, context.session_id)
    mlflow.update_current_trace(
        user=context.user_id,
        session_id=context.session_id,
        client_request_id=context.request_id,
        tags=context.tags(),
    )
    return True


@contextlib.contextmanager
def request_scope(context: RequestContext) -> Generator[RequestContext, None, None]:
    """この中で始まるトレースすべてに文脈を付ける。

    自動トレース(``mlflow.openai.autolog`` など)のように、自分のコードがないところで使う。
    ``client_request_id`` は付かないので、リクエスト ID はタグ ``request_id`` で探す。
    """
    scope = mlflow.tracing.context(
        user=context.user_id, session_id=context.session_id, tags=context.tags()
    )
    with scope:
        yield context


def context_from_headers(headers: Mapping[str, str]) -> RequestContext:
    """``X-User-Id`` などのヘッダーから文脈を作る。長すぎる値は切り詰める。

    ユーザーが自由に書ける値である。本番では認証の結果から作る関数に差し替える。
    """
    lowered = {key.lower(): value for key, value in headers.items()}

    def read(name: str) -> str | None:
        return lowered.get(name, "").strip()[: metadata.MAX_METADATA_CHARS] or None

    context = RequestContext(user_id=read("x-user-id"), session_id=read("x-session-id"))
    return replace(context, request_id=read("x-request-id") or context.request_id)


ContextReader = Callable[[Mapping[str, str]], RequestContext]


class RequestContextMiddleware(propagation.AsgiMiddleware):
    """FastAPI などの ASGI ミドルウェア: リクエストごとに ``request_scope`` を張る。

    ``app.add_middleware(RequestContextMiddleware)``。ストリーミングの応答が終わるまで有効。
    呼び出し元(``traceparent``)のトレースには、``join_caller=True`` のときだけ加わる。
    """

    def __init__(
        self, app: Any, read: ContextReader = context_from_headers, join_caller: bool = False
    ) -> None:
        super().__init__(app, lambda headers: _http_request(headers, read, join_caller))


def init_flask(
    app: Any, read: ContextReader = context_from_headers, join_caller: bool = False
) -> None:
    """Flask アプリで、リクエストごとに ``request_scope`` を張る(ストリーミングも同じ)。"""
    propagation.scope_flask_requests(app, lambda headers: _http_request(headers, read, join_caller))


@contextlib.contextmanager
def _http_request(
    headers: Mapping[str, str], read: ContextReader, join_caller: bool
) -> Generator[None, None, None]:
    context = propagation.read_safely(read, headers) or RequestContext()
    with incoming_trace(headers, join_caller=join_caller) as joined, request_scope(context):
        if not joined:  # OpenTelemetry の計装が、先にトレースを始めていることがある
            add_trace_metadata(context)
        yield


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
        experiment_ids: 省略すると、いまのエクスペリメント。

    Raises:
        ValueError: 検索式に書けない値(``'`` と ``"`` の両方を含む文字列など)か、ID の代わりの
            エクスペリメント名。
    """
    equal = {
        "metadata.`mlflow.trace.user`": user,
        "metadata.`mlflow.trace.session`": session,
        "tags.request_id": request_id,
        "tags.environment": environment,
        "status": status,
        "name": name,
        **{metadata.tag_field(key): value for key, value in (tags or {}).items()},
    }
    found = mlflow.search_traces(
        locations=metadata.check_experiment_ids(experiment_ids),
        filter_string=metadata.filter_string(equal, min_latency_ms),
        max_results=max_results,
        order_by=["timestamp_ms DESC"],
        return_type="list",
    )
    return cast("list[Trace]", found)


def main() -> None:
    """2 人のユーザーの会話を記録し、ユーザー・セッション・リクエスト ID・エラーで探す。"""
    from chapter8_samples import _lab

    talks = [
        ("user-tanaka", "session-1", "返品の期限は?"),
        ("user-tanaka", "session-1", "送料は誰が払う?"),
        ("user-sato", "session-2", "領収書がほしい"),
        ("user-sato", "session-2", "在庫はある?"),  # _search がタイムアウトする
    ]
    common = RequestContext(
        environment="production",
        service_version="1.4.0",
        region="japaneast",
        extra_tags={"channel": "web"},
    )
    with _lab.sample("ch8-metadata-tagging"):
        for number, (user, session, question) in enumerate(talks, 1):
            request = replace(common, user_id=user, session_id=session, request_id=f"req-{number}")
            with contextlib.suppress(TimeoutError):
                _answer(question, request)
        mlflow.flush_trace_async_logging()
        _show("ユーザー user-tanaka", find_traces(user="user-tanaka"))
        _show("セッション session-2", find_traces(session="session-2"))
        _show("リクエスト req-2", find_traces(request_id="req-2"))
        _show("本番の web", find_traces(environment="production", tags={"channel": "web"}))
        errors = find_traces(status="ERROR")
        _show("エラー", errors)
        found = errors[0].search_spans(name="search")[0].attributes
        print("  種類:", found["error.type"], " top_k:", found["retrieval.top_k"])
        print("トレースの外で呼ぶと:", add_trace_metadata(RequestContext(user_id="user-tanaka")))


@mlflow.trace(name="chat")
def _answer(question: str, context: RequestContext) -> str:
    add_trace_metadata(context)
    with ThreadPoolExecutor(1) as pool:  # 別のスレッドの検索も同じトレースに入る
        return run_with_context(pool, _search, question).result()


def _search(question: str) -> str:
    attributes = {"retrieval.top_k": 3}  # 例外で抜けると、その種類もスパンの属性に残る
    with traced_step("search", span_type="RETRIEVER", inputs=question, attributes=attributes):
        if "在庫" in question:
            raise TimeoutError("no answer from the stock service in 30 s")
        return f"「{question}」への回答"


def _show(title: str, traces: list[Trace]) -> None:
    # 検索は新しい順だが、同じミリ秒に始まったものの順は決まらない
    names = sorted(str(trace.info.client_request_id) for trace in traces)
    spans = sum(len(trace.data.spans) for trace in traces)
    print(f"{title}: {len(traces)} 件 {names}、スパン {spans} 個")


if __name__ == "__main__":
    main()
