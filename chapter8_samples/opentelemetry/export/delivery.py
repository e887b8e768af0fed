"""8.5.3 OTLP が届いたことの確認: 届いた数と失われた数、送り先が受け取るか。

OpenTelemetry の ``force_flush()`` は、全部失われていても True を返し、渡した期限も守らない。
期限を守って書き出し、数で結果を返す。

Databricks でも同じ。``flush_all`` は MLflow への書き出しと OTLP への書き出しの両方を待つ。
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import mlflow.tracing
from mlflow.tracing.processor.base_mlflow import BaseMlflowSpanProcessor
from mlflow.tracing.processor.otel import OtelSpanProcessor
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from .._internals import change_before_export, processors_of, unwrapped, wrapped_by
from ..deadlines import run_in_time
from .config import OtlpConfig, OtlpConfigError


@dataclass(frozen=True)
class DeliveryCounts:
    """数え始めてから OTLP へ渡したスパンの数。"""

    accepted: int = 0
    """送信待ちに入れた数。"""
    delivered: int = 0
    """送信先が受け取ったと答えた数。"""
    lost: int = 0
    """再送してもだめで捨てた数。"""

    @property
    def pending(self) -> int:
        """まだ結果の出ていない数(キューがあふれて捨てた分も含む)。"""
        return self.accepted - self.delivered - self.lost


@dataclass(frozen=True)
class FlushReport:
    """``flush_all`` の結果。数は ``setup_otlp_export`` からの累計。"""

    mlflow_seconds: float | None
    """MLflow への書き出しにかかった秒数。期限までに終わらなければ None。"""
    otlp_seconds: float | None
    """OTLP への書き出しにかかった秒数。期限までに終わらなければ None。"""
    accepted: int
    delivered: int
    lost: int
    """捨てた数。書き出しが終わったのに結果がないもの(キューあふれ)も含む。"""

    @property
    def timed_out(self) -> bool:
        """どちらかが期限に間に合わなかった。"""
        return self.mlflow_seconds is None or self.otlp_seconds is None

    @property
    def complete(self) -> bool:
        """期限内に終わり、OTLP に渡したスパンが全部届いた(呼んだ後に増えた分があれば False)。"""
        return not self.timed_out and self.delivered == self.accepted


class _Tally:
    """1 回の設定の間の数。前の設定の遅れてきた結果は、前の数に入る。"""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts = DeliveryCounts()

    def add(self, *, accepted: int = 0, delivered: int = 0, lost: int = 0) -> None:
        with self._lock:
            c = self.counts
            self.counts = DeliveryCounts(
                c.accepted + accepted, c.delivered + delivered, c.lost + lost
            )

    def restart(self) -> None:
        """0 に戻す。fork した子は、親の送信待ちを引き継がない。"""
        self._lock = threading.Lock()
        self.counts = DeliveryCounts()


_tally = _Tally()


def delivery_counts() -> DeliveryCounts:
    """いまの累計。"""
    return _tally.counts


def watch_delivery() -> None:
    """OTLP へ渡したスパンとその結果を、0 から数え始める。送信を始めるときに呼ばれる。"""
    global _tally
    _count_spans()
    _tally = _Tally()


def _count_spans() -> None:
    if change_before_export("counts_spans", _counted) and hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _tally.restart())


def _counted(processor: OtelSpanProcessor, span: ReadableSpan) -> ReadableSpan:
    _count_results(processor.span_exporter)
    context = span.get_span_context()
    _tally.add(accepted=int(bool(context and context.trace_flags.sampled)))
    return span


def _count_results(exporter: Any) -> None:
    """この exporter の結果を数える。プロバイダーが作り直されるたびに新しい exporter になる。"""
    if "counts_results" in vars(exporter):  # export は、8.1 も包むことがある
        return
    export, tally = exporter.export, _tally

    def counted(spans: Any) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = export(spans)
        finally:
            ok = result is SpanExportResult.SUCCESS
            tally.add(delivered=len(spans) if ok else 0, lost=0 if ok else len(spans))
        return result

    vars(exporter).update(export=counted, counts_results=True)


def flush_all(timeout_seconds: float = 10.0) -> FlushReport:
    """MLflow と OTLP の両方を書き出す。``timeout_seconds`` 秒で必ず戻る。

    ``mlflow.flush_trace_async_logging()`` は OTLP を書き出さない。プロセスを終える前
    (``os._exit`` やシグナルのハンドラーの中)では、代わりにこれを呼ぶ。
    """
    _count_spans()
    before = delivery_counts()
    jobs = [mlflow.flush_trace_async_logging, _flush_otlp]
    mlflow_seconds, otlp_seconds = run_in_time(jobs, timeout_seconds)
    counts = delivery_counts()
    lost = counts.lost
    if otlp_seconds is not None:  # 書き出しが終わっても結果のないものは、キューからあふれた
        lost = max(lost, before.accepted - counts.delivered)
    return FlushReport(mlflow_seconds, otlp_seconds, counts.accepted, counts.delivered, lost)


def _flush_otlp() -> None:
    for processor in unwrapped(processors_of(mlflow.tracing.get_bridged_tracer_provider())):
        # 包むほう(テールサンプリングなど)は、中身だけを書き出す
        if not (wrapped_by(processor) or isinstance(processor, BaseMlflowSpanProcessor)):
            processor.force_flush()


# ---- 送り先が本当に受け取るか ----


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
    seconds: float


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
        endpoint: HTTP では ``/v1/traces`` まで書く(足したり消したりしない)。``OtlpConfig`` を
            1 つ渡してもよい(``check_config`` と同じ)。
        protocol: ``"grpc"`` か ``"http/protobuf"``。
        headers: 認証などのヘッダー。
        timeout_seconds: 答えを待つ秒数。
        certificate_file: プライベート CA の証明書。HTTP では、エクスポーターと同じく、環境変数
            ``REQUESTS_CA_BUNDLE`` ``CURL_CA_BUNDLE`` があればそちらが使われる。
    """
    if isinstance(endpoint, OtlpConfig):
        return check_config(endpoint, timeout_seconds)
    started, known = time.monotonic(), dict(headers or {})
    given: Any = {"endpoint": endpoint, "protocol": protocol, "headers": known}
    given |= {"timeout_seconds": timeout_seconds, "certificate_file": certificate_file}
    try:
        OtlpConfig(service_name="otlp-connection-check", **given)
    except OtlpConfigError as error:
        return ConnectionCheck(False, "invalid", f"{error}; {_FIXES['invalid']}", 0.0)
    probe, endpoint = _grpc_probe if protocol == "grpc" else _http_probe, endpoint.strip()
    reason, answer = probe(endpoint, known, timeout_seconds, certificate_file)
    detail = f"{endpoint}: {answer}; {_FIXES[reason]}"
    return ConnectionCheck(reason == "ok", reason, detail, time.monotonic() - started)


def check_config(config: OtlpConfig, timeout_seconds: float = 10.0) -> ConnectionCheck:
    """``OtlpConfig`` (``build_otlp_config`` や ``preset`` の結果)の送り先を確かめる。"""
    return check_otlp_connection(
        config.endpoint,
        config.protocol,
        headers=config.headers,
        timeout_seconds=timeout_seconds,
        certificate_file=config.certificate_file,
    )


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
