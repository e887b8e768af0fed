"""8.5.3 OTLP の送り先が本当に受け取るかを、1 スパンを送って確かめる。"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider

from .config import OtlpConfig, OtlpConfigError


@dataclass(frozen=True)
class ConnectionCheck:
    """``check_otlp_connection`` の結果。"""

    ok: bool
    """送信先がスパンを 1 つ受け取った。"""
    reason: str
    """``ok`` ``refused`` ``dns`` ``tls`` ``unauthorized`` ``not_found`` ``timeout``
    ``busy`` ``wrong_protocol`` ``rejected`` ``invalid`` (設定の誤り)のどれか。"""
    detail: str
    """送信先の答えと、直すところ(英語)。"""


_FIXES = {
    "ok": "one span was accepted",
    "refused": "nothing listens there; check host, port and that the collector is running",
    "dns": "the host name does not resolve",
    "tls": "TLS failed; use http:// for a plain port, or set certificate_file for a private CA "
    "(over HTTP, REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE win over it)",
    "unauthorized": "the key was not accepted; check the header name and the value",
    "not_found": "no OTLP receiver at this path; HTTP needs .../v1/traces",
    "timeout": "no answer in time; a firewall or an overloaded collector",
    "busy": "reachable but refusing for now; it will be retried",
    "wrong_protocol": "another protocol answers there; 4317 is usually grpc, 4318 http/protobuf",
    "rejected": "the receiver does not accept this data",
    "invalid": "nothing was sent",
}


def check_otlp_connection(
    endpoint: str | OtlpConfig,
    protocol: str = "grpc",
    *,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 2.0,
    certificate_file: str | None = None,
) -> ConnectionCheck:
    """スパンを 1 つ実際に送り、受け取られたかを答える。送信先に 1 スパン残る。

    Args:
        endpoint: HTTP では ``/v1/traces`` まで書く(足したり消したりしない)。``OtlpConfig`` なら、
            ``timeout_seconds`` のほかの引数は要らない。
        protocol: ``"grpc"`` か ``"http/protobuf"``。
        headers: 認証などのヘッダー。
        timeout_seconds: 答えを待つ秒数。
        certificate_file: プライベート CA の証明書。HTTP では、エクスポーターと同じく、環境変数
            ``REQUESTS_CA_BUNDLE`` ``CURL_CA_BUNDLE`` があればそちらが使われる。
    """
    if isinstance(endpoint, OtlpConfig):
        return check_otlp_connection(
            endpoint.endpoint,
            endpoint.protocol,
            headers=endpoint.headers,
            timeout_seconds=timeout_seconds,
            certificate_file=endpoint.certificate_file,
        )
    given: Any = {"endpoint": endpoint, "protocol": protocol, "headers": headers or {}}
    given |= {"timeout_seconds": timeout_seconds, "certificate_file": certificate_file}
    try:
        OtlpConfig(service_name="otlp-connection-check", **given)
    except OtlpConfigError as error:
        return ConnectionCheck(False, "invalid", f"{error}; {_FIXES['invalid']}")
    url = endpoint.strip()
    probe = _grpc_probe if protocol == "grpc" else _http_probe
    reason, answer = probe(url, dict(headers or {}), timeout_seconds, certificate_file)
    return ConnectionCheck(reason == "ok", reason, f"{url}: {answer}; {_FIXES[reason]}")


def _probe_request() -> Any:
    """接続確認の 1 スパン。"""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    provider = TracerProvider(resource=Resource.create({"service.name": "otlp-connection-check"}))
    span = provider.get_tracer(__name__).start_span("otlp.connection_check")
    span.end()
    return encode_spans([span])  # pyright: ignore[reportArgumentType]


def _http_probe(
    endpoint: str, headers: dict[str, str], timeout: float, certificate: str | None
) -> tuple[str, str]:
    import requests

    content = {"Content-Type": "application/x-protobuf"}
    body = _probe_request().SerializeToString()
    try:
        with requests.Session() as session:
            # エクスポーターと同じ渡し方。REQUESTS_CA_BUNDLE と CURL_CA_BUNDLE のほうが優先される
            session.verify = certificate or True
            response = session.post(endpoint, body, headers=headers | content, timeout=timeout)
    except OSError as error:  # requests の例外と、環境変数の指すファイルがないとき
        return _failure(str(error), "wrong_protocol"), _shorten(str(error))
    said = _shorten(response.content.decode(errors="replace"))
    return _http_reason(response), f"HTTP {response.status_code} {said}".strip()


def _http_reason(response: Any) -> str:
    status = response.status_code
    if status in (401, 403):
        return "unauthorized"
    if status in (404, 405):
        return "not_found"
    if status in (429, 502, 503, 504):
        return "busy"
    return _http_receipt(response) if status // 100 == 2 else "rejected"


def _http_receipt(response: Any) -> str:
    """2xx でも受領とは限らない(Web 画面、ログイン画面への転送、スパンを拒否する部分的成功)。"""
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    kind = response.headers.get("Content-Type", "")
    if response.request.method != "POST" or kind.startswith("text/html"):
        return "not_found"
    if not kind.startswith("application/x-protobuf"):
        return "ok"
    try:
        receipt: Any = ExportTraceServiceResponse.FromString(response.content)
    except DecodeError:
        return "not_found"
    return "rejected" if receipt.partial_success.rejected_spans else "ok"


_SIGNS = {
    "dns": ("resolv", "Name or service not known", "getaddrinfo"),
    "tls": ("SSL", "Ssl", "TLS", "certificate"),
    "refused": ("refused", "FD shutdown", "unreachable"),
    "timeout": ("timed out", "timeout="),
    "wrong_protocol": ("connect", "ndshake"),
}


def _failure(text: str, otherwise: str) -> str:
    """つながらなかった理由を、例外の文面から。"""
    found = (reason for reason, words in _SIGNS.items() if any(word in text for word in words))
    return next(found, otherwise)


_GRPC_REASONS = {
    "UNAUTHENTICATED": "unauthorized",
    "PERMISSION_DENIED": "unauthorized",
    "UNIMPLEMENTED": "not_found",
    "DEADLINE_EXCEEDED": "timeout",
    "RESOURCE_EXHAUSTED": "busy",
}


def _grpc_probe(
    endpoint: str, headers: dict[str, str], timeout: float, certificate: str | None
) -> tuple[str, str]:
    import grpc
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub

    url = urlsplit(endpoint)
    roots = Path(certificate).read_bytes() if certificate else None
    secure = (grpc.ssl_channel_credentials(roots),) if url.scheme == "https" else ()
    open_channel: Any = grpc.secure_channel if secure else grpc.insecure_channel
    metadata = [(name.lower(), value) for name, value in headers.items()]
    with open_channel(url.netloc, *secure) as channel:
        stub: Any = TraceServiceStub(channel)
        try:
            receipt = stub.Export(_probe_request(), timeout=timeout, metadata=metadata)
        except grpc.RpcError as error:
            return _grpc_failure(error)
    if receipt.partial_success.rejected_spans:
        return "rejected", _shorten(f"OK, but {receipt.partial_success.error_message}")
    return "ok", "OK"


def _grpc_failure(error: Any) -> tuple[str, str]:
    code, details = error.code().name, _shorten(error.details() or "")
    reason = _GRPC_REASONS.get(code, "rejected")
    if code == "UNAVAILABLE":
        reason = _failure(details, "busy")
    return reason, f"{code} {details}"


def _shorten(text: str, limit: int = 200) -> str:
    """1 行の ASCII にする。相手の答えは、バイナリのこともある。"""
    printable = "".join(c if c.isprintable() else " " for c in text)
    line = " ".join(printable.split()).encode("ascii", "backslashreplace").decode()
    return line if len(line) <= limit else f"{line[:limit]}..."
