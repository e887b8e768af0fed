"""8.1.2 トレースの設計指針・8.1.6 メタデータとタグ(リスト8.5, 8.7, 8.8)。"""

import contextlib
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from mlflow.entities import Trace
from . import propagation
from .propagation import outgoing_headers as outgoing_headers

@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """1 リクエストの文脈。値はすべて文字列で、長さは作るときに確かめる。"""
    user_id: str | None = None
    '個人を直接表す値(メールアドレスなど)ではなく、社内の ID を入れる。'
    session_id: str | None = None
    request_id: str = field(default_factory=lambda: f'req-{uuid.uuid4().hex}')
    '省略すると自動で作る。外から受け取った値はアクセスログと突き合わせられる。'
    environment: str | None = None
    service_version: str | None = None
    region: str | None = None
    extra_tags: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        ...

    def tags(self) -> dict[str, str]:
        """トレースに付けるタグ(値のないものは含まない)。"""

def add_trace_metadata(context: RequestContext) -> bool:
    """実行中のトレースに文脈を付ける。トレースの中(スパンの中)で呼ぶ。

    トレースが間引かれたとき、トレースの外、トレーシングが無効のときは ``False`` を返す。
    """

@contextlib.contextmanager
def request_scope(context: RequestContext) -> Generator[RequestContext, None, None]:
    """この中で始まるトレースすべてに文脈を付ける。

    自動トレース(``mlflow.openai.autolog`` など)のように、自分のコードがないところで使う。
    ``client_request_id`` は付かないので、リクエスト ID はタグ ``request_id`` で探す。
    """

def context_from_headers(headers: Mapping[str, str]) -> RequestContext:
    """``X-User-Id`` などのヘッダーから文脈を作る。長すぎる値は切り詰める。

    ユーザーが自由に書ける値である。本番では認証の結果から作る関数に差し替える。
    """
ContextReader = Callable[[Mapping[str, str]], RequestContext]

class RequestContextMiddleware(propagation.AsgiMiddleware):
    """FastAPI などの ASGI ミドルウェア: リクエストごとに ``request_scope`` を張る。

    ``app.add_middleware(RequestContextMiddleware)``。ストリーミングの応答が終わるまで有効。
    呼び出し元(``traceparent``)のトレースには、``join_caller=True`` のときだけ加わる。
    """

    def __init__(self, app: Any, read: ContextReader=context_from_headers, join_caller: bool=False) -> None:
        ...

def init_flask(app: Any, read: ContextReader=context_from_headers, join_caller: bool=False) -> None:
    """Flask アプリで、リクエストごとに ``request_scope`` を張る(ストリーミングも同じ)。"""

def find_traces(*, user: str | None=None, session: str | None=None, request_id: str | None=None, environment: str | None=None, status: Literal['OK', 'ERROR'] | None=None, min_latency_ms: int | None=None, name: str | None=None, tags: Mapping[str, str] | None=None, experiment_ids: Sequence[str] | None=None, max_results: int=100) -> list[Trace]:
    """条件をすべて満たすトレースを、新しい順に返す。

    Args:
        request_id: ``RequestContext.request_id``(トレース ID ではない)。
        experiment_ids: 省略すると、いまのエクスペリメント。

    Raises:
        ValueError: 検索式に書けない値(``'`` と ``"`` の両方を含む文字列など)か、ID の代わりの
            エクスペリメント名。
    """

def main() -> None:
    """2 人のユーザーの会話を記録し、ユーザー・セッション・リクエスト ID・エラーで探す。"""
