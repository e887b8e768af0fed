"""8.5.2 GenAI の標準メトリクス(トークン数、所要時間、ストリーミングの断片までの時間)。

トレースを間引いても、件数・トークン・遅延の集計は全件から作りたい。LLM のスパンが終わるたびに
規約(``conventions.py`` の版)の名前で記録し、OTLP で送る。

Databricks でも同じ。メトリクスの送り先は、Collector か、OTLP を受け付ける監視サービスにする
(MLflow サーバーはメトリクスを受け付けない)。
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import mlflow.tracing
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource

from .._internals import renew_export_lock_in_children, span_hooks
from . import conventions
from .sending import flush_in_time, last_results, make_exporter

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

TOKEN_BUCKETS = [4**power for power in range(14)]
"""トークン数のヒストグラムの境界(1 から 67,108,864 トークン)。"""
SECOND_BUCKETS = [0.01 * 2**power for power in range(14)]
"""秒数のヒストグラムの境界(0.01 から 81.92 秒)。"""
_OPERATIONS = {"CHAT_MODEL": "chat", "LLM": "generate_content", "EMBEDDING": "embeddings"}
_USAGE_KEYS = {  # ``mlflow.chat.tokenUsage`` の中の名前が、規約と違うもの
    "cache_read.input_tokens": "cache_read_input_tokens",
    "cache_write.input_tokens": "cache_creation_input_tokens",
    "reasoning.output_tokens": "reasoning_output_tokens",
}


@dataclass(frozen=True)
class GenAIMetrics:
    """動いているメトリクス。``setup_genai_metrics`` が返す。"""

    provider: MeterProvider
    hook: Any
    results: Sequence[Any]
    """最後の送信の結果。まだ送っていなければ空。"""

    def flush(self, timeout_seconds: float = 10.0) -> bool:
        """いままでの記録を送り、受け取られたかを返す。``timeout_seconds`` 秒で必ず戻る。"""
        return flush_in_time(self.provider, self.results, timeout_seconds)

    def shutdown(self) -> None:
        """残りを送り、記録をやめる。"""
        others = [hook for hook in span_hooks() if hook is not self.hook]
        mlflow.tracing.configure(span_processors=others)
        self.provider.shutdown()


def setup_genai_metrics(
    endpoint: str,
    service_name: str,
    protocol: str = "grpc",
    *,
    headers: Mapping[str, str] | None = None,
    names: str = "new",
) -> GenAIMetrics:
    """LLM のスパンから標準メトリクスを作り、OTLP で送り始める。

    Args:
        endpoint: ``http://otel-collector:4317``(gRPC)や ``http://otel-collector:4318``(HTTP)。
        service_name: メトリクスの ``service.name``。
        protocol: ``"grpc"`` か ``"http/protobuf"``。
        headers: 認証などのヘッダー。
        names: ``"new"`` は規約のいまの名前だけ、``"both"`` は古いダッシュボードのために 1.41 の
            名前でも送る。embeddings は、どちらでも 1.41 の名前(新しい名前がない)。

    60 秒(``OTEL_METRIC_EXPORT_INTERVAL`` ミリ秒)ごとに送る。
    ``mlflow.tracing.configure`` の span_processors に 1 つ足す(前からあるものは残す)。
    ``mlflow.set_tracking_uri`` で消えるので、その後で呼ぶ。

    Raises:
        ValueError: 送り先、方式、``names`` の誤り。
        RuntimeError: もう始めている(2 重に数えないため)。``shutdown()`` してから呼ぶ。
    """
    if names not in ("new", "both"):
        raise ValueError(f"names {names!r} is not 'new' or 'both'")
    if any(getattr(hook, "__name__", "") == "genai_metrics" for hook in span_hooks()):
        raise RuntimeError("GenAI metrics are already recorded: call shutdown() on them first")
    exporter = make_exporter("metrics", endpoint, protocol, headers)
    reader = PeriodicExportingMetricReader(exporter)
    renew_export_lock_in_children(reader)
    resource = Resource.create({"service.name": service_name})
    provider = MeterProvider(metric_readers=[reader], resource=resource)
    hook = _recorder(_Instruments(provider, with_old_names=names == "both"))
    metrics = GenAIMetrics(provider, hook, last_results(exporter))
    mlflow.tracing.configure(span_processors=[*span_hooks(), hook])
    return metrics


def _recorder(instruments: _Instruments) -> Any:
    def genai_metrics(span: LiveSpan) -> None:
        seconds = (time.time_ns() - span.start_time_ns) / 1e9
        first, following = _chunk_seconds(span, seconds)
        operation = _OPERATIONS.get(str(span.span_type))
        if operation is None and first is not None:  # 8.1 の traced_stream のスパンには種類がない
            operation = "chat"
        if operation is not None:
            labels = _labels(span, operation)
            instruments.record_call(labels, seconds, _error(span), _tokens(span))
            if first is not None:
                instruments.record_chunks(labels, first, following)

    return genai_metrics


class _Instruments:
    """メトリクスの計器。``with_old_names`` では、1.41 の名前でも記録する。"""

    def __init__(self, provider: MeterProvider, with_old_names: bool) -> None:
        self._with_old_names = with_old_names
        self._meter = provider.get_meter("chapter8.genai", conventions.SEMCONV_VERSION)
        self._histograms: dict[str, Any] = {}
        for name in conventions.SECONDS:
            self._histograms[name] = self._histogram(name, "s", SECOND_BUCKETS)
        for name in conventions.TOKENS:
            self._histograms[name] = self._histogram(name, "{token}", TOKEN_BUCKETS)
        self._counters: dict[str, Any] = {
            kind: self._meter.create_counter(name, unit="{token}")
            for kind, name in conventions.USAGE.items()
        }

    def _histogram(self, name: str, unit: str, buckets: Sequence[float]) -> Any:
        return self._meter.create_histogram(
            name, unit=unit, explicit_bucket_boundaries_advisory=buckets
        )

    def record_call(
        self,
        labels: dict[str, str],
        seconds: float,
        error: dict[str, str],
        tokens: dict[str, int],
    ) -> None:
        """呼び出し 1 回の秒数とトークン数。"""
        is_inference = labels["gen_ai.operation.name"] != "embeddings"
        if is_inference:
            self._record(conventions.DURATION, seconds, labels | error)
            self._record_tokens(labels, error, tokens)
        if self._with_old_names or not is_inference:
            self._record(conventions.OLD_DURATION, seconds, labels | error)
            for kind in ("input", "output"):
                if (count := tokens.get(f"{kind}_tokens")) is not None:
                    typed = labels | {"gen_ai.token.type": kind}
                    self._record(conventions.OLD_TOKENS, count, typed)

    def _record_tokens(
        self, labels: dict[str, str], error: dict[str, str], tokens: dict[str, int]
    ) -> None:
        for kind, count in tokens.items():
            # 種類ごと(文字、画像など)の数は、MLflow のスパンにはない
            self._counters[kind].add(count, labels | {"gen_ai.token.modality": "unknown"})
            if kind in conventions.PER_CALL and not error:
                self._record(conventions.PER_CALL[kind], count, labels)

    def record_chunks(self, labels: dict[str, str], first: float, following: list[float]) -> None:
        """最初の断片までの秒数と、その後の断片 1 つずつの秒数。"""
        self._record(conventions.FIRST_CHUNK, first, labels)
        for seconds in following:
            self._record(conventions.NEXT_CHUNK, seconds, labels)

    def _record(self, name: str, value: float, labels: dict[str, str]) -> None:
        self._histograms[name].record(value, labels)


def _chunk_seconds(span: LiveSpan, seconds: float) -> tuple[float | None, list[float]]:
    """最初の断片までと、断片の間の秒数。ストリーミングでなければ None と空。

    autolog のスパンは断片ごとのイベントの時刻から、8.1 の ``traced_stream`` のスパンは、最初の断片
    までの秒数と断片の数から求める(後者の間隔は、平均)。
    """
    chunks = [e.timestamp for e in span.events if e.name.startswith("mlflow.chunk.item.")]
    if chunks:
        gaps = [(after - before) / 1e9 for before, after in pairwise(chunks)]
        return (chunks[0] - span.start_time_ns) / 1e9, gaps
    first = span.get_attribute("gen_ai.response.time_to_first_chunk")
    if first is None:
        return None, []
    following = int(span.get_attribute("stream.chunks") or 1) - 1
    return float(first), [max(0.0, seconds - first) / following] * following if following else []


def _tokens(span: LiveSpan) -> dict[str, int]:
    usage = span.get_attribute("mlflow.chat.tokenUsage") or {}
    found = {
        kind: usage.get(_USAGE_KEYS.get(kind, kind), span.get_attribute(f"gen_ai.usage.{kind}"))
        for kind in conventions.USAGE
    }
    return {kind: count for kind, count in found.items() if count is not None}


def _labels(span: LiveSpan, operation: str) -> dict[str, str]:
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
