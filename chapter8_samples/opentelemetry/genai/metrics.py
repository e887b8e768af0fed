"""8.5.2 GenAI の標準メトリクス(トークン数と所要時間)。

トレースを間引いても、件数・トークン・遅延の集計は全件から作りたい。LLM のスパンが終わるたびに
規約(v1.41.1)の 2 つのヒストグラムへ記録し、OTLP で送る。

Databricks でも同じ。メトリクスの送り先は、Collector か、OTLP を受け付ける監視サービスにする
(MLflow サーバーはメトリクスを受け付けない)。
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import mlflow
import mlflow.tracing
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    MetricExporter,
    MetricExportResult,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import Resource

from .._internals import span_hooks

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

TOKEN_BUCKETS = [4**power for power in range(14)]
"""gen_ai.client.token.usage の境界(1 から 67,108,864 トークン)。"""
SECOND_BUCKETS = [0.01 * 2**power for power in range(14)]
"""gen_ai.client.operation.duration の境界(0.01 から 81.92 秒)。"""
_OPERATIONS = {"CHAT_MODEL": "chat", "LLM": "generate_content", "EMBEDDING": "embeddings"}
_LOCK = threading.Lock()


@dataclass(frozen=True)
class GenAIMetrics:
    """動いているメトリクス。``setup_genai_metrics`` が返す。"""

    provider: MeterProvider
    hook: Any
    results: Sequence[MetricExportResult]
    """最後の送信の結果。まだ送っていなければ空。"""

    def flush(self, timeout_seconds: float = 10.0) -> bool:
        """いままでの記録を送り、受け取られたかを返す。``timeout_seconds`` 秒で必ず戻る。"""
        worker = threading.Thread(target=self.provider.force_flush, daemon=True)
        worker.start()
        worker.join(timeout_seconds)
        return not (worker.is_alive() or MetricExportResult.FAILURE in self.results)

    def shutdown(self) -> None:
        """残りを送り、記録をやめる。"""
        _configure([hook for hook in span_hooks() if hook is not self.hook])
        self.provider.shutdown()


def setup_genai_metrics(
    endpoint: str,
    service_name: str,
    protocol: str = "grpc",
    *,
    headers: Mapping[str, str] | None = None,
    interval_seconds: float = 60.0,
) -> GenAIMetrics:
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
    if any(getattr(hook, "__name__", "") == "genai_metrics" for hook in span_hooks()):
        raise RuntimeError("GenAI metrics are already recorded: call shutdown() on them first")
    exporter = _exporter(endpoint, protocol, dict(headers or {}))
    reader = PeriodicExportingMetricReader(exporter, interval_seconds * 1000)
    resource = Resource.create({"service.name": service_name})
    provider = MeterProvider(metric_readers=[reader], resource=resource)
    metrics = GenAIMetrics(provider, _recorder(provider), _results(exporter))
    _configure([*span_hooks(), metrics.hook])
    return metrics


def _exporter(endpoint: str, protocol: str, headers: dict[str, str]) -> MetricExporter:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"endpoint {endpoint!r} needs http:// or https://")
    base = f"{parts.scheme}://{parts.netloc}"
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc import metric_exporter as grpc

        return grpc.OTLPMetricExporter(endpoint=base, headers=headers)
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http import metric_exporter as http

        path = parts.path.removesuffix("/v1/traces").removesuffix("/v1/metrics").rstrip("/")
        return http.OTLPMetricExporter(endpoint=f"{base}{path}/v1/metrics", headers=headers)
    raise ValueError(f"protocol {protocol!r} is not 'grpc' or 'http/protobuf'")


def _results(exporter: Any) -> Sequence[MetricExportResult]:
    """最後の送信の結果を控える(``force_flush`` は、失われていても True を返す)。"""
    export, last = exporter.export, deque[MetricExportResult](maxlen=1)

    def noted(*args: Any, **options: Any) -> MetricExportResult:
        last.append(export(*args, **options))
        return last[0]

    exporter.export = noted
    return last


def _configure(hooks: list[Any]) -> None:
    with _LOCK:
        mlflow.tracing.configure(span_processors=hooks)


def _recorder(provider: MeterProvider) -> Any:
    meter = provider.get_meter("chapter8.genai", "1.0.0")
    tokens = meter.create_histogram(
        "gen_ai.client.token.usage",
        unit="{token}",
        description="Number of input and output tokens used.",
        explicit_bucket_boundaries_advisory=TOKEN_BUCKETS,
    )
    duration = meter.create_histogram(
        "gen_ai.client.operation.duration",
        unit="s",
        description="GenAI operation duration.",
        explicit_bucket_boundaries_advisory=SECOND_BUCKETS,
    )

    def genai_metrics(span: LiveSpan) -> None:
        labels = _labels(span)
        if labels is None:
            return
        seconds = (time.time_ns() - span.start_time_ns) / 1e9
        duration.record(seconds, {**labels, **_error(span)})
        usage = span.get_attribute("mlflow.chat.tokenUsage") or {}
        for kind in ("input", "output"):
            if (count := usage.get(f"{kind}_tokens")) is not None:
                tokens.record(count, {**labels, "gen_ai.token.type": kind})

    return genai_metrics


def _labels(span: LiveSpan) -> dict[str, str] | None:
    operation = _OPERATIONS.get(str(span.span_type))
    if operation is None:
        return None
    provider = span.get_attribute("mlflow.llm.provider") or span.get_attribute(
        "mlflow.message.format"
    )
    model = span.get_attribute("mlflow.llm.model")
    named = {"gen_ai.provider.name": provider or "_OTHER", "gen_ai.request.model": model}
    return {"gen_ai.operation.name": operation} | {k: str(v) for k, v in named.items() if v}


def _error(span: LiveSpan) -> dict[str, str]:
    if span.status.status_code.name != "ERROR":
        return {}
    types = (dict(event.attributes or {}).get("exception.type") for event in span.events)
    return {"error.type": str(next((name for name in types if name), "_OTHER"))}
