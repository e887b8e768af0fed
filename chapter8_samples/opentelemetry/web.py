"""8.5.2 HTTP のリクエストから LLM の呼び出しまでを 1 つのトレースにする。

MLflow は自分専用のプロバイダーでトレースを作るので、FastAPI などの OpenTelemetry のスパンとは
別のトレースになる。プロセスに 1 つの共通のプロバイダーを使えば、親子がつながる。

Databricks でも同じ。トレースの名前は HTTP のスパンの名前(``POST /ask``)になる。
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import mlflow.tracing
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import (
    CarrierT,
    Getter,
    Setter,
    TextMapPropagator,
    default_getter,
    default_setter,
)
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

from ._internals import (
    EndingSpans,
    current_provider,
    processors_of,
    span_hooks,
    unwrapped,
)

logger = logging.getLogger(__name__)
_FLAG = "MLFLOW_USE_DEFAULT_TRACER_PROVIDER"
_CALLER = otel_context.create_key("chapter8-caller")
_masking: Callable[[Any], Any] | None = None  # 2 度目の呼び出しは、省けば前のものを使う


def use_unified_tracer_provider(
    masking: Callable[[Any], Any] | None = None,
) -> TracerProvider:
    """MLflow と OpenTelemetry で、同じプロバイダー(プロセスに 1 つ)を使う。

    最初のトレース、8.1 の設定、``setup_otlp_export`` の前に呼ぶ。それらや ``set_experiment`` は
    プロバイダーを作り直すが、リンクとマスキングは、次のリクエストから付け直す(グローバルの
    propagator を替えるなら、この関数より先に替える)。その前のスパン(起動時の
    処理など)も隠すなら、設定の後でもう一度呼ぶ。作り直しの前にアプリが足したプロセッサーと、取った
    tracer は使われないので、設定の後で足し、取る(``strict=False`` の設定がサーバーを待つ間は、
    プロバイダーが何も記録しないので、``tracing_status().ready`` の後で)。

    呼び出し元が送ってきた ``traceparent`` は親にせず、リンクとして残す。MLflow は、ルートスパンが
    このプロセスにないトレースを保存できないため。HTTP のリクエストはすべてトレースになるので、
    死活確認は ``FastAPI(telemetry={"exclude": ...})`` などで除く。

    Args:
        masking: HTTP のスパンの属性(``url.query``、ヘッダーなど)、名前、イベント、状態を隠す関数。
            辞書を受け取り、同じ形の辞書を返す。省略すると、``mlflow.tracing.configure`` の
            span_processors のうち ``value`` を持つもの(8.1 の ``mask_pii()``)で隠す。

    Returns:
        共通のプロバイダー。アプリが先に設定したものがあれば、それに MLflow を足したもの
        (作り直された後は、そのリソースとサンプラーは使われない)。

    Raises:
        RuntimeError: トレースがもう始まっている。または、無効になっている。
    """
    global _masking
    _masking = masking or _masking
    before = os.environ.get(_FLAG)
    if not _is_unified() and current_provider() is not None:
        raise RuntimeError(
            "MLflow already traces with its own provider; call use_unified_tracer_provider() "
            "before the first trace, before setup_production_tracing() and setup_otlp_export()"
        )
    os.environ[_FLAG] = "false"
    # 最初のリクエストより前に作る。後だと、最初の HTTP スパンが MLflow に記録されない
    mlflow.tracing.get_bridged_tracer_provider()
    unified = current_provider()
    if not isinstance(unified, TracerProvider):
        if before is None:
            del os.environ[_FLAG]
        else:
            os.environ[_FLAG] = before
        raise RuntimeError(
            f"the global tracer provider is {type(unified).__name__}, which records nothing; "
            "enable tracing (mlflow.tracing.enable(), OTEL_SDK_DISABLED) first"
        )
    restarting = propagate.get_global_textmap()
    if not isinstance(restarting, RestartTraces):
        restarting = RestartTraces(restarting)
        propagate.set_global_textmap(restarting)
    restarting.join()
    return unified


def _is_unified() -> bool:
    return os.environ.get(_FLAG, "").lower() in ("false", "0")


def _hidden(content: dict[str, Any], masking: Callable[[Any], Any] | None) -> dict[str, Any]:
    """MLflow の内部の属性のほかを隠す。隠せないまま送るより、中身を捨てる。"""
    hooks = [hook.value for hook in span_hooks() if callable(getattr(hook, "value", None))]
    attributes = content["attributes"]
    own = {k: v for k, v in attributes.items() if k.startswith(("mlflow.trace", "mlflow.exp"))}
    content["attributes"] = {k: v for k, v in attributes.items() if k not in own}
    try:
        for hide in [masking] if masking else hooks:
            content = hide(content)
        content["attributes"] = {**content["attributes"], **own}
        return content
    except Exception as error:  # 例外の文面にも個人情報が入りうるので、種類だけを書く
        logger.error("masking failed (%s); the span content is removed", type(error).__name__)
        events: list[Any] = [{} for _ in content["events"]]
        return {"attributes": own, "events": events, "name": "[MASKING FAILED]", "status": None}


class RestartTraces(TextMapPropagator):
    """届いた ``traceparent`` を親にしない。送るほう(``inject``)は元のまま。

    環境変数 ``OTEL_PROPAGATORS=baggage`` でもルートは作り直せるが、この先のサービスへ
    ``traceparent`` を送ることも止まってしまう。
    """

    def __init__(self, inner: TextMapPropagator) -> None:
        self._inner = inner
        self._joined: Any = None
        self._lock = threading.Lock()

    def join(self) -> None:
        """MLflow のプロバイダーに、リンクとマスキングを付ける(作り直された後は、もう一度)。"""
        mlflow.tracing.get_bridged_tracer_provider()
        current = current_provider()
        if current is self._joined or not isinstance(current, TracerProvider):
            return
        with self._lock:  # 付け終わるまで、ほかのリクエストも待つ
            if not any(isinstance(one, LinkToCaller) for one in unwrapped(processors_of(current))):
                current.add_span_processor(LinkToCaller())
                current.add_span_processor(EndingSpans(lambda one: _hidden(one, _masking)))
            self._joined = current

    def extract(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        getter: Getter[CarrierT] = default_getter,
    ) -> Context:
        """baggage などは読み、呼び出し元のスパンは ``LinkToCaller`` のために控える。"""
        if _is_unified():  # 作り直された後の最初のリクエストでも、HTTP のスパンより先に
            self.join()
        found = self._inner.extract(carrier, context, getter)
        caller = trace.get_current_span(found).get_span_context()
        if not (caller.is_valid and caller.is_remote):
            return found
        without_parent = trace.set_span_in_context(trace.INVALID_SPAN, found)
        return otel_context.set_value(_CALLER, caller, without_parent)

    def inject(
        self,
        carrier: CarrierT,
        context: Context | None = None,
        setter: Setter[CarrierT] = default_setter,
    ) -> None:
        """この先のサービスへは、今のスパンを親として送る。"""
        self._inner.inject(carrier, context, setter)

    @property
    def fields(self) -> set[str]:
        """使うヘッダーの名前。"""
        return self._inner.fields


class LinkToCaller(SpanProcessor):
    """ルートスパンに、呼び出し元のスパンへのリンクを付ける。"""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        caller: Any = otel_context.get_value(_CALLER, parent_context)
        if span.parent is None and caller is not None:
            span.add_link(caller)


def trace_http_requests(app: Any) -> None:
    """リクエストのスパンを自分では作らない FastAPI に、作るミドルウェアを足す。

    新しい FastAPI は自分で作るので何もしない(Python 3.10 に入るのは、作らない版)。
    """
    if find_spec("fastapi.telemetry"):
        return

    @app.middleware("http")
    async def http_span(request: Any, call_next: Any) -> Any:  # pyright: ignore[reportUnusedFunction]
        caller = propagate.extract(request.headers)
        tracer = trace.get_tracer(__name__)  # 作り直された後は、新しいほうから取る
        kind = trace.SpanKind.SERVER
        with tracer.start_as_current_span(request.method, context=caller, kind=kind) as span:
            response = await call_next(request)
            route = getattr(request.scope.get("route"), "path", request.url.path)
            span.update_name(f"{request.method} {route}")
            span.set_attribute("http.response.status_code", response.status_code)
            return response
