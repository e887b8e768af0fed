"""OpenTelemetry Collector の代わりに OTLP を受け取るサーバー。

gRPC と HTTP/protobuf で、トレースとメトリクスを受け取る。届いたスパンを読みやすい形で記録する。
失敗と遅延を注入して、送る側の再送も確かめられる。
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc

__all__ = [
    "OtlpReceiver",
    "ReceivedEvent",
    "ReceivedMetric",
    "ReceivedRequest",
    "ReceivedSpan",
]

_UNPACK: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.decompress, "deflate": zlib.decompress}


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
    kind: int
    status_code: int
    status_message: str
    attributes: dict[str, Any]
    resource: dict[str, Any]
    scope: str
    events: list[ReceivedEvent]
    links: list[tuple[str, str]]  # (trace_id, span_id)
    start_time_unix_nano: int
    end_time_unix_nano: int


@dataclass(frozen=True)
class ReceivedMetric:
    """届いたメトリクス 1 件。`points` は点ごとの属性と値(histogram は count と sum)。"""

    name: str
    unit: str
    kind: str
    points: list[dict[str, Any]]
    resource: dict[str, Any]
    scope: str


@dataclass(frozen=True)
class ReceivedRequest:
    """エクスポート 1 回。`status` は 200 か注入した状態コード。ヘッダー名は小文字。"""

    protocol: str
    path: str
    status: int
    items: int
    headers: dict[str, str] = field(default_factory=dict[str, str])


class OtlpReceiver:
    """OTLP の受信側。`with OtlpReceiver() as otlp:` の間だけ両方のポートで待ち受ける。

    Args:
        tls: 証明書と秘密鍵の PEM ファイル。渡すと両方のポートが TLS になる。

    Attributes:
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
        self._grpc: Any = None
        self._grpc_port = 0
        self._http: _HttpServer | None = None

    @property
    def grpc_endpoint(self) -> str:
        """`http://127.0.0.1:PORT`(OTLP/gRPC)。"""
        self._running()
        return f"{self._scheme}://127.0.0.1:{self._grpc_port}"

    @property
    def http_endpoint(self) -> str:
        """`http://127.0.0.1:PORT/v1/traces`(OTLP/HTTP)。"""
        return f"{self._scheme}://127.0.0.1:{self._running().server_port}/v1/traces"

    @property
    def http_metrics_endpoint(self) -> str:
        """`http://127.0.0.1:PORT/v1/metrics`(OTLP/HTTP)。"""
        return f"{self._scheme}://127.0.0.1:{self._running().server_port}/v1/metrics"

    def start(self) -> OtlpReceiver:
        """空いている 2 つのポートで待ち受けを始める。"""
        if self._http is None:
            self._stopping.clear()
            self._grpc, self._grpc_port = _start_grpc(self, self._tls)
            self._http = _HttpServer(self, self._tls)
            threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """両方のポートと、開いている接続を閉じる。記録は残り、もう増えない。何度呼んでもよい。"""
        server, self._http = self._http, None
        if server is not None:
            with self._changed:
                self._stopping.set()
            self._grpc.stop(0).wait()
            server.shutdown()
            server.server_close()
            server.close_connections()

    def __enter__(self) -> OtlpReceiver:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

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

    def clear(self) -> None:
        """記録、注入した失敗、遅延を元に戻す。"""
        with self._changed:
            for records in (self.spans, self.metrics, self.requests, self._failures):
                records.clear()
            self.delay_seconds = 0.0

    def receive(
        self, protocol: str, path: str, headers: dict[str, str], message: Any, status: int = 200
    ) -> int:
        """1 回のエクスポートを記録し、返すべき状態コードを答える(200 は失敗に変わりうる)。"""
        self._stopping.wait(self.delay_seconds)
        with self._changed:
            if self._stopping.is_set():
                return 503
            status = self._failures.pop(0) if self._failures and status == 200 else status
            items = self._store(message) if status == 200 else 0
            self.requests.append(ReceivedRequest(protocol, path, status, items, headers))
            self._changed.notify_all()
        return status

    def _store(self, message: Any) -> int:
        if isinstance(message, trace_pb.ExportTraceServiceRequest):
            spans = list(_read_spans(message))
            self.spans += spans
            return len(spans)
        metrics = list(_read_metrics(message))
        self.metrics += metrics
        return len(metrics)

    @property
    def _scheme(self) -> str:
        return "https" if self._tls else "http"

    def _running(self) -> _HttpServer:
        if self._http is None:
            raise RuntimeError("OtlpReceiver is not running; use it in a with statement")
        return self._http


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return None if kind is None else getattr(value, kind)


def _attributes(pairs: Iterable[Any]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _read_spans(message: Any) -> Iterable[ReceivedSpan]:
    for resource_spans in message.resource_spans:
        resource = _attributes(resource_spans.resource.attributes)
        for scope_spans in resource_spans.scope_spans:
            for span in scope_spans.spans:
                yield _read_span(span, resource, scope_spans.scope.name)


def _read_span(span: Any, resource: dict[str, Any], scope: str) -> ReceivedSpan:
    return ReceivedSpan(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex(),
        name=span.name,
        kind=span.kind,
        status_code=span.status.code,
        status_message=span.status.message,
        attributes=_attributes(span.attributes),
        resource=resource,
        scope=scope,
        events=[ReceivedEvent(e.name, _attributes(e.attributes)) for e in span.events],
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        start_time_unix_nano=span.start_time_unix_nano,
        end_time_unix_nano=span.end_time_unix_nano,
    )


def _read_metrics(message: Any) -> Iterable[ReceivedMetric]:
    for resource_metrics in message.resource_metrics:
        resource = _attributes(resource_metrics.resource.attributes)
        for scope_metrics in resource_metrics.scope_metrics:
            for metric in scope_metrics.metrics:
                kind = metric.WhichOneof("data") or ""
                points = [_point(p, kind) for p in getattr(metric, kind).data_points]
                scope = scope_metrics.scope.name
                yield ReceivedMetric(metric.name, metric.unit, kind, points, resource, scope)


def _point(point: Any, kind: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"attributes": _attributes(point.attributes)}
    if kind in ("sum", "gauge"):
        return entry | {"value": getattr(point, point.WhichOneof("value"))}
    return entry | {"count": point.count, "sum": point.sum}


_REQUEST_TYPES: dict[str, tuple[Any, Any]] = {
    "/v1/traces": (trace_pb.ExportTraceServiceRequest, trace_pb.ExportTraceServiceResponse),
    "/v1/metrics": (
        metrics_pb.ExportMetricsServiceRequest,
        metrics_pb.ExportMetricsServiceResponse,
    ),
}


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # 既定の 5 では、同時につなぐ相手を 1 秒待たせる

    def __init__(self, receiver: OtlpReceiver, tls: tuple[Path, Path] | None) -> None:
        self.receiver = receiver
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _HttpHandler)
        if tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*tls)
            # ハンドシェイクは接続ごとのスレッドで行い、次の接続を待たせない
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """待機中の接続(keep-alive)を切る。ポートを閉じるだけでは、次のリクエストに答え続ける。"""
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # 相手が切った、TLS が合わない、は受信側の誤りではない
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HttpServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        message, status = self._read(body)
        status = self.server.receiver.receive("http", self.path, headers, message, status)
        # 空の応答(すべて受け取った)は、どの型でも 0 バイトになる
        self._answer(status)

    def _read(self, body: bytes) -> tuple[Any, int]:
        if self.path not in _REQUEST_TYPES:
            return None, 404
        unpack = _UNPACK.get(self.headers.get("Content-Encoding") or "", bytes)
        try:
            return _REQUEST_TYPES[self.path][0].FromString(unpack(body)), 200
        except (DecodeError, OSError, EOFError, zlib.error):
            return None, 400

    def log_message(self, format: str, *args: Any) -> None:
        """標準エラーには何も書かない。"""

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", "0")
        self.end_headers()


_GRPC_CODES: Mapping[int, Any] = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.UNIMPLEMENTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    500: grpc.StatusCode.INTERNAL,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class _GrpcServicer:
    """trace と metrics の両サービスに共通の `Export`。"""

    def __init__(self, receiver: OtlpReceiver, path: str, response_type: Any) -> None:
        self._receiver, self._path, self._response_type = receiver, path, response_type

    def Export(self, request: Any, context: Any) -> Any:
        headers = {str(name): str(value) for name, value in context.invocation_metadata()}
        status = self._receiver.receive("grpc", self._path, headers, request)
        if status != 200:
            context.abort(_GRPC_CODES.get(status, grpc.StatusCode.UNKNOWN), f"injected {status}")
        return self._response_type()


def _start_grpc(receiver: OtlpReceiver, tls: tuple[Path, Path] | None) -> tuple[Any, int]:
    options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
    server: Any = grpc.server(futures.ThreadPoolExecutor(4), options=options)
    for path, module, service in (
        ("/v1/traces", trace_grpc, "TraceService"),
        ("/v1/metrics", metrics_grpc, "MetricsService"),
    ):
        add = getattr(module, f"add_{service}Servicer_to_server")
        add(_GrpcServicer(receiver, path, _REQUEST_TYPES[path][1]), server)
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        certificate, key = (path.read_bytes() for path in tls)
        credentials = grpc.ssl_server_credentials([(key, certificate)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    return server, int(port)
