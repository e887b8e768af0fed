"""8.5.2 HTTP のリクエストから LLM の呼び出しまでを 1 つのトレースにする。"""

from typing import Any
from opentelemetry.context import Context
from opentelemetry.propagators.textmap import CarrierT, Getter, Setter, TextMapPropagator, default_getter, default_setter
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

def use_unified_tracer_provider() -> TracerProvider:
    """MLflow と OpenTelemetry で、同じプロバイダー(プロセスに 1 つ)を使う。

    ``set_tracking_uri`` と ``set_experiment`` の後、``setup_otlp_export`` と最初のトレースの前に
    1 回呼ぶ。後から ``set_tracking_uri`` や ``set_experiment`` を呼ぶと、プロバイダーが作り直されて
    アプリが足したプロセッサーが消える。すべての HTTP リクエストがトレースになるので、死活確認は
    ``FastAPI(telemetry={"exclude": ...})`` などで除く。

    呼び出し元が送ってきた ``traceparent`` は親にせず、リンクとして残す。MLflow は、ルートスパンが
    このプロセスにないトレースを保存できないため。

    Returns:
        共通のプロバイダー。アプリが先に設定したものがあれば、それに MLflow を足したもの。

    Raises:
        RuntimeError: トレースがもう始まっている。または、無効になっている。
    """

class RestartTraces(TextMapPropagator):
    """届いた ``traceparent`` を親にしない。送るほう(``inject``)は元のまま。

    環境変数 ``OTEL_PROPAGATORS=baggage`` でもルートは作り直せるが、この先のサービスへ
    ``traceparent`` を送ることも止まってしまう。
    """

    def __init__(self, inner: TextMapPropagator) -> None:
        self._inner = inner

    def extract(self, carrier: CarrierT, context: Context | None=None, getter: Getter[CarrierT]=default_getter) -> Context:
        """baggage などは読み、呼び出し元のスパンは ``LinkToCaller`` のために控える。"""

    def inject(self, carrier: CarrierT, context: Context | None=None, setter: Setter[CarrierT]=default_setter) -> None:
        """この先のサービスへは、今のスパンを親として送る。"""

    @property
    def fields(self) -> set[str]:
        """使うヘッダーの名前。"""

class LinkToCaller(SpanProcessor):
    """ルートスパンに、呼び出し元のスパンへのリンクを付ける。"""

    def on_start(self, span: Span, parent_context: Context | None=None) -> None:
        ...

def trace_http_requests(app: Any) -> None:
    """リクエストのスパンを自分では作らない FastAPI に、作るミドルウェアを足す。

    新しい FastAPI は自分で作るので何もしない(Python 3.10 に入るのは、作らない版)。
    """

def main() -> None:
    """traceparent を付けた呼び出しが、MLflow と OTLP で 1 つのトレースになるのを見る。"""
