"""OpenTelemetry Collector の代わりに OTLP を受け取るサーバー。

gRPC と HTTP/protobuf で、トレースとメトリクスを受け取る。届いたスパンを読みやすい形で記録する。
失敗と遅延を注入して、送る側の再送も確かめられる。
"""

from __future__ import annotations

import gzip
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    add_TraceServiceServicer_to_server,
)

from .http_server import Answer, LoopbackServer, Received

_UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}
_REQUEST_TYPES: dict[str, Any] = {
    "/v1/traces": ExportTraceServiceRequest,
    "/v1/metrics": ExportMetricsServiceRequest,
}
_GRPC_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True)
class ReceivedEvent:
    """スパンのイベント 1 件(例外など)。"""

    name: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ReceivedSpan:
    """届いたスパン 1 件。id は 16 進の文字列、`parent_span_id` はルートなら空文字列。"""

    trace_id: str
    span_id: str
    parent_span_id: str
    name: str
    status_code: int
    status_message: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    events: list[ReceivedEvent]
    links: list[tuple[str, str]]  # (trace_id, span_id)
    end_time_unix_nano: int


@dataclass(frozen=True)
class ReceivedMetric:
    """届いたメトリクス 1 件。`points` は点ごとの属性と値(histogram は count と sum)。"""

    name: str
    unit: str
    points: list[dict[str, Any]]
    resource: dict[str, Any]


@dataclass(frozen=True)
class ReceivedRequest:
    """エクスポート 1 回。`status` は 200 か、失敗の状態コード。ヘッダー名は小文字。"""

    path: str
    status: int
    headers: dict[str, str]


class OtlpReceiver:
    """OTLP の受信側。`with OtlpReceiver() as otlp:` の間だけ両方のポートで待ち受ける。

    Args:
        tls: 証明書と秘密鍵の PEM ファイル。渡すと両方のポートが TLS になる。

    Attributes:
        grpc_endpoint: `http://127.0.0.1:PORT`(OTLP/gRPC)。
        http_endpoint: `http://127.0.0.1:PORT/v1/traces`(OTLP/HTTP)。
        spans: 届いたスパン(届いた順)。
        metrics: 届いたメトリクス。
        requests: エクスポートの記録(失敗させたものも含む)。
        delay_seconds: 答える前に待つ秒数。
    """

    def __init__(self, tls: tuple[Path, Path] | None = None) -> None:
        self._tls = tls
        self.spans: list[ReceivedSpan] = []
        self.metrics: list[ReceivedMetric] = []
        self.requests: list[ReceivedRequest] = []
        self.delay_seconds = 0.0
        self._failures: list[int] = []
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    def __enter__(self) -> OtlpReceiver:
        scheme = "https" if self._tls else "http"
        self._grpc, port = _start_grpc(self, self._tls)
        self._http = LoopbackServer(self._respond, self._tls)
        self.grpc_endpoint = f"{scheme}://127.0.0.1:{port}"
        self.http_endpoint = f"{scheme}://127.0.0.1:{self._http.server_port}/v1/traces"
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """両方のポートと、開いている接続を閉じる。記録は残り、もう増えない。何度呼んでもよい。"""
        if not self._stopping.is_set():
            with self._changed:
                self._stopping.set()
            self._grpc.stop(0).wait()
            self._http.stop()

    def fail_next(self, count: int, status: int = 503) -> None:
        """次の `count` 回のエクスポートを失敗させる。gRPC には対応するコードで答える。"""
        with self._changed:
            self._failures += [status] * count

    def wait_for(self, *, spans: int, timeout_seconds: float = 5) -> list[ReceivedSpan]:
        """`spans` 件以上届くまで待ち、届いた全件を返す。間に合わなければ TimeoutError。"""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.spans) >= spans, timeout_seconds):
                raise TimeoutError(
                    f"{len(self.spans)} of {spans} spans arrived in {timeout_seconds} s"
                )
            return list(self.spans)

    def receive(self, path: str, headers: dict[str, str], message: Any, status: int = 200) -> int:
        """1 回のエクスポートを記録し、返すべき状態コードを答える(200 は失敗に変わりうる)。"""
        self._stopping.wait(self.delay_seconds)
        with self._changed:
            if self._stopping.is_set():
                return 503
            if status == 200 and self._failures:
                status = self._failures.pop(0)
            if status == 200 and path == "/v1/traces":
                self.spans += _read_spans(message)
            elif status == 200:
                self.metrics += _read_metrics(message)
            self.requests.append(ReceivedRequest(path, status, headers))
            self._changed.notify_all()
        return status

    def _respond(self, request: Received) -> Answer:
        """HTTP の 1 件を読む。知らないパスは 404、読めない本文は 400。"""
        message, status = None, 200
        unpack = _UNPACK.get(request.headers.get("Content-Encoding") or "", bytes)
        try:
            message = _REQUEST_TYPES[request.path].FromString(unpack(request.body))
        except KeyError:
            status = 404
        except (DecodeError, OSError, EOFError, zlib.error):
            status = 400
        headers = {name.lower(): value for name, value in request.headers.items()}
        status = self.receive(request.path, headers, message, status)
        # 空の応答(すべて受け取った)は、どの型でも 0 バイトになる
        return Answer(status, {"Content-Type": "application/x-protobuf"}, b"")


class _GrpcServicer:
    """trace と metrics の両サービスに共通の `Export`。"""

    def __init__(self, receiver: OtlpReceiver, path: str, response_type: Any) -> None:
        self._receiver, self._path, self._response_type = receiver, path, response_type

    def Export(self, request: Any, context: Any) -> Any:
        headers = {str(name): str(value) for name, value in context.invocation_metadata()}
        status = self._receiver.receive(self._path, headers, request)
        if status != 200:
            context.abort(_GRPC_CODES[status], f"injected {status}")
        return self._response_type()


def _start_grpc(receiver: OtlpReceiver, tls: tuple[Path, Path] | None) -> tuple[Any, int]:
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
    server: Any = grpc.server(futures.ThreadPoolExecutor(4), options=options)
    traces: Any = _GrpcServicer(receiver, "/v1/traces", ExportTraceServiceResponse)
    metrics: Any = _GrpcServicer(receiver, "/v1/metrics", ExportMetricsServiceResponse)
    add_TraceServiceServicer_to_server(traces, server)
    add_MetricsServiceServicer_to_server(metrics, server)
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        certificate, key = (path.read_bytes() for path in tls)
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return server, int(port)


# 読み取り ------------------------------------------------------------------


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)


def _attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _read_spans(message: Any) -> Iterator[ReceivedSpan]:
    for resource_spans in message.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield _read_span(span, resource)


def _read_span(span: Any, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex(),
        name=span.name,
        status_code=span.status.code,
        status_message=span.status.message,
        attributes=_attributes(span.attributes),
        resource=resource,
        events=[ReceivedEvent(e.name, _attributes(e.attributes)) for e in span.events],
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        end_time_unix_nano=span.end_time_unix_nano,
    )


def _read_metrics(message: Any) -> Iterator[ReceivedMetric]:
    for resource_metrics in message.resource_metrics:
        resource = _attributes(resource_metrics.resource.attributes)
        for scope_metrics in resource_metrics.scope_metrics:
            for metric in scope_metrics.metrics:
                kind = metric.WhichOneof("data")
                points = [_point(point, kind) for point in getattr(metric, kind).data_points]
                yield ReceivedMetric(metric.name, metric.unit, points, resource)


def _point(point: Any, kind: str) -> dict[str, Any]:
    attributes = {"attributes": _attributes(point.attributes)}
    if kind in ("sum", "gauge"):
        return attributes | {"value": getattr(point, point.WhichOneof("value"))}
    return attributes | {"count": point.count, "sum": point.sum}
