"""8.5.2 GenAI の標準メトリクス(トークン数と所要時間)。"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricExportResult
TOKEN_BUCKETS = [4 ** power for power in range(14)]
SECOND_BUCKETS = [0.01 * 2 ** power for power in range(14)]

@dataclass(frozen=True)
class GenAIMetrics:
    """動いているメトリクス。``setup_genai_metrics`` が返す。"""
    provider: MeterProvider
    hook: Any
    results: Sequence[MetricExportResult]
    '最後の送信の結果。まだ送っていなければ空。'

    def flush(self, timeout_seconds: float=10.0) -> bool:
        """いままでの記録を送り、受け取られたかを返す。``timeout_seconds`` 秒で必ず戻る。"""

    def shutdown(self) -> None:
        """残りを送り、記録をやめる。"""

def setup_genai_metrics(endpoint: str, service_name: str, protocol: str='grpc', *, headers: Mapping[str, str] | None=None, interval_seconds: float=60.0) -> GenAIMetrics:
    """LLM のスパンから標準メトリクスを作り、OTLP で送り始める。

    Args:
        endpoint: ``http://otel-collector:4317``(gRPC)や ``http://otel-collector:4318``(HTTP)。
        service_name: メトリクスの ``service.name``。
        protocol: ``"grpc"`` か ``"http/protobuf"``。
        headers: 認証などのヘッダー。
        interval_seconds: 送る間隔。

    ``mlflow.tracing.configure`` の span_processors に 1 つ足す(前からあるものは残す)。
    ``mlflow.set_tracking_uri`` で消えるので、その後で呼ぶ。

    Raises:
        RuntimeError: もう始めている(2 重に数えないため)。``shutdown()`` してから呼ぶ。
    """

def main() -> None:
    """LLM の呼び出し 3 回(うち 1 回は失敗)を数えて、届いたメトリクスを見る。"""
