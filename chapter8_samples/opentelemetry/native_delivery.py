"""native のスパンの送信: 送信待ちの上限、届いた数と失われた数、送信スレッドでのマスキング。"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import requests
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, Span
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from .endpoint import split_endpoint

SPAN_TYPE = "mlflow.spanType"
Mask = Callable[[str], str]


@dataclass
class NativeStatus:
    """終わったスパンの数(fork した子は 0 から)。``dropped`` と ``refused`` は失った数。"""

    ended: int = 0
    dropped: int = 0
    """送信待ちに入りきらなかった数と、``shutdown`` の後に終わった数。"""
    delivered: int = 0
    refused: int = 0
    """再送してもだめだった数と、隠せなかった数。"""

    @property
    def pending(self) -> int:
        """まだ結果の出ていない数。"""
        return self.ended - self.dropped - self.delivered - self.refused


# ---- 送り先


class HashedOnce(Resource):
    """ハッシュを 1 回だけ求める(SDK は、送るスパン 1 つごとに、属性を全部 JSON にして求める)。"""

    def __init__(self, made: Resource) -> None:
        super().__init__(made.attributes, made.schema_url)
        self._hash = hash(made)

    def __hash__(self) -> int:
        return self._hash


def base_url(url: str) -> str:
    """``/v1/traces`` を除いた、送り先の URL。"""
    try:
        parts = split_endpoint(url)
    except ValueError as error:
        safe = re.sub("[^/]*@|[?#].*", "", url.strip())  # 鍵かもしれないところは、文面に出さない
        write = "write http://HOST:PORT, and keys in headers"
        raise ValueError(f"endpoint {safe!r} is wrong; {write} ({error})") from None
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/").removesuffix("/v1/traces")


def experiment_id_of(server: str, name: str, headers: Mapping[str, str]) -> str:
    """エクスペリメントの ID。なければ作る(MLflow の REST API)。"""
    api = f"{server}/api/2.0/mlflow/experiments"
    found: dict[str, Any] = {}
    try:
        with requests.Session() as session:
            session.headers.update(headers)
            session.post(f"{api}/create", json={"name": name}, timeout=10)  # あれば、拒否される
            answer = session.get(f"{api}/get-by-name", params={"experiment_name": name}, timeout=10)
        said = f"HTTP {answer.status_code}"
        found = answer.json().get("experiment", {})
    except (requests.RequestException, ValueError) as error:
        said = type(error).__name__  # 文面には、ヘッダーの値が入りうる
    if found.get("lifecycle_stage") != "active":
        raise ConnectionError(
            f"experiment {name!r} cannot be used at {server} ({said}); start an MLflow server "
            "there, check headers, restore it if deleted, or pass experiment=None for a Collector"
        )
    return str(found["experiment_id"])


class Destination(BatchSpanProcessor):
    """送り先 1 つ。SDK の送信待ちは、あふれると数えずに捨てるので、その手前で数えて捨てる。"""

    def __init__(
        self, url: str, headers: Mapping[str, str], masking: Mask | None, max_queue_spans: int
    ) -> None:
        self.exporter = CountingExporter(url, headers, masking)
        self._limit = max_queue_spans
        self._lock = threading.Lock()
        self._open: set[int] = set()  # このプロセスで始まった、まだ終わらないスパン
        batch = min(512, max_queue_spans)
        super().__init__(self.exporter, max_queue_spans, max_export_batch_size=batch)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._restart_in_child)

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """始まったことを覚える(時計は戻ることがあるので、時刻では fork の前か後かが分からない)。"""
        self._open.add(span.get_span_context().span_id)

    def on_end(self, span: ReadableSpan) -> None:
        """送信待ちに入れる。"""
        context = span.get_span_context()
        if context is None or context.span_id not in self._open:  # fork の前からのものは、親が送る
            return
        self._open.remove(context.span_id)
        status = self.exporter.status
        with self._lock:
            is_full = status.ended - status.dropped - self.exporter.taken >= self._limit
            status.ended += 1
            if is_full:
                status.dropped += 1
        if not is_full:
            super().on_end(span)

    def shutdown(self) -> None:
        """残りを送って終える。この後に終わったスパンは、捨てた数に入る。"""
        self._limit = 0
        super().shutdown()

    def _restart_in_child(self) -> None:
        self._lock = threading.Lock()
        self._open = set()
        self.exporter.start()


class CountingExporter(SpanExporter):
    """標準のエクスポーターの前でマスキングをし、結果を数える(送信スレッドで動く)。"""

    def __init__(self, url: str, headers: Mapping[str, str], masking: Mask | None) -> None:
        self._url = f"{url}/v1/traces"
        self._headers = dict(headers)
        self._masking = masking
        self.start()

    def start(self) -> None:
        """数を 0 にし、新しい接続を使う(fork した子は、親の接続を使えない)。"""
        self.status = NativeStatus()
        self.taken = 0  # 送信待ちから取り出した数
        self._exporter = OTLPSpanExporter(self._url, headers=self._headers)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """隠してから送り、結果を数える。"""
        self.taken += len(spans)
        result = SpanExportResult.FAILURE
        try:
            masking = self._masking
            hidden = [hidden_copy(span, masking) for span in spans] if masking else spans
            result = self._exporter.export(hidden)
        except Exception as error:  # マスキングの失敗も。隠せないまま送るより、1 回分を捨てる
            logging.getLogger(__name__).error("sending failed (%s)", type(error).__name__)
        if result is SpanExportResult.SUCCESS:
            self.status.delivered += len(spans)
        else:
            self.status.refused += len(spans)
        return result

    def shutdown(self) -> None:
        """送信中の再送をやめる。"""
        self._exporter.shutdown()


# ---- マスキング


def hidden_copy(span: ReadableSpan, mask: Mask) -> ReadableSpan:
    """名前、属性、イベント、状態の文字列を隠した写し。"""
    events = [
        Event(event.name, _hidden_attributes(event.attributes, mask), event.timestamp)
        for event in span.events
    ]
    status = trace.Status(span.status.status_code, hidden(span.status.description, mask))
    return ReadableSpan(
        name=hidden(span.name, mask),
        attributes=_hidden_attributes(span.attributes, mask),
        events=events,
        status=status,
        context=span.context,
        parent=span.parent,
        resource=span.resource,
        links=span.links,
        instrumentation_scope=span.instrumentation_scope,
        start_time=span.start_time,
        end_time=span.end_time,
    )


def _hidden_attributes(given: Any, mask: Mask) -> dict[str, Any]:
    return {
        name: value if name == SPAN_TYPE else hidden(value, mask)
        for name, value in (given or {}).items()
    }


def hidden(value: Any, mask: Mask) -> Any:
    """JSON は、エスケープを解いてから中のキーと文字列と数を調べ、JSON に戻す。"""
    if isinstance(value, dict):
        return {str(mask(key)): hidden(item, mask) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hidden(item, mask) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str) and value.startswith(("{", "[", '"')):
        with suppress(json.JSONDecodeError):
            return json.dumps(hidden(json.loads(value), mask), ensure_ascii=False)
    text = str(mask(str(value)))
    return value if text == str(value) else text
