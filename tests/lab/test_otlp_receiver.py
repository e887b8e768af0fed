"""OTLP の受信側に、本物のエクスポーター(gRPC と HTTP、gzip、メトリクス)で送れること。"""

from __future__ import annotations

import contextlib
import logging
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import requests
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (
    OTLPMetricExporter as GrpcMetricExporter,
)
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
    OTLPSpanExporter as GrpcSpanExporter,
)
from opentelemetry.exporter.otlp.proto.http import Compression as HttpCompression
from opentelemetry.exporter.otlp.proto.http.metric_exporter import (
    OTLPMetricExporter as HttpMetricExporter,
)
from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
    OTLPSpanExporter as HttpSpanExporter,
)
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter

from chapter8_samples._lab.servers.receivers import OtlpReceiver

Factory = Callable[[OtlpReceiver], SpanExporter]

EXPORTERS: dict[str, Factory] = {
    "grpc": lambda o: GrpcSpanExporter(endpoint=o.grpc_endpoint, headers=(("x-key", "k"),)),
    "grpc-gzip": lambda o: GrpcSpanExporter(
        endpoint=o.grpc_endpoint, compression=grpc.Compression.Gzip
    ),
    "http": lambda o: HttpSpanExporter(endpoint=o.http_endpoint, headers={"X-Key": "k"}),
    "http-gzip": lambda o: HttpSpanExporter(
        endpoint=o.http_endpoint, compression=HttpCompression.Gzip
    ),
    "http-deflate": lambda o: HttpSpanExporter(
        endpoint=o.http_endpoint, compression=HttpCompression.Deflate
    ),
}
ATTRIBUTES: dict[str, Any] = {"text": "返品", "count": 3, "ratio": 0.5, "ok": True, "list": [1, 2]}
RESOURCE = Resource({"service.name": "shop", "deployment.environment.name": "test"})


def send(exporter: SpanExporter) -> None:
    """親子 2 つのスパンを送る。子は例外で終わる。"""
    provider = TracerProvider(resource=RESOURCE)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer = provider.get_tracer("shop.scope")
    with tracer.start_as_current_span("parent") as parent:
        parent.set_attributes(ATTRIBUTES)
        with pytest.raises(ValueError), tracer.start_as_current_span("child"):
            raise ValueError("bad value")
    provider.shutdown()


def test_spans_arrive_whole(otlp: OtlpReceiver) -> None:
    for number, name in enumerate(EXPORTERS, 1):
        send(EXPORTERS[name](otlp))
        child, parent = otlp.wait_for(spans=2 * number)[-2:]
        assert (parent.name, parent.parent_span_id) == ("parent", "")
        assert parent.attributes == ATTRIBUTES
        assert parent.resource["service.name"] == "shop"
        assert (child.trace_id, child.parent_span_id) == (parent.trace_id, parent.span_id)
        assert (len(child.trace_id), len(child.span_id)) == (32, 16)
        assert (child.status_code, child.status_message) == (2, "ValueError: bad value")
        (event,) = child.events
        assert event.name == "exception" and event.attributes["exception.type"] == "ValueError"
        assert child.end_time_unix_nano <= parent.end_time_unix_nano


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_requests_are_recorded_with_lower_case_headers(otlp: OtlpReceiver, name: str) -> None:
    send(EXPORTERS[name](otlp))
    otlp.wait_for(spans=2)
    assert [(r.path, r.status) for r in otlp.requests] == [("/v1/traces", 200)] * 2
    assert otlp.requests[0].headers["x-key"] == "k"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpc", "http"])
def test_injected_failure_is_retried_by_the_exporter(otlp: OtlpReceiver, name: str) -> None:
    otlp.fail_next(1, status=503)
    send(EXPORTERS[name](otlp))
    assert len(otlp.wait_for(spans=2, timeout_seconds=10)) == 2
    assert [r.status for r in otlp.requests] == [503, 200, 200]


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_refusal_is_not_retried(
    otlp: OtlpReceiver,
    name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # OpenTelemetry は、ほかのテストで出したのと同じログを 1 分間は出さない
    for logger in filter(None, map(logging.getLogger, logging.root.manager.loggerDict)):
        monkeypatch.setattr(logger, "filters", [])
    otlp.fail_next(2, status=401)
    send(EXPORTERS[name](otlp))
    assert otlp.spans == []
    assert [r.status for r in otlp.requests] == [401, 401]
    assert "UNAUTHENTICATED" in caplog.text or "401" in caplog.text


@pytest.mark.parametrize("name", ["grpc", "http"])
def test_metrics_arrive(otlp: OtlpReceiver, name: str) -> None:
    exporter: Any = (
        GrpcMetricExporter(endpoint=otlp.grpc_endpoint)
        if name == "grpc"
        else HttpMetricExporter(endpoint=otlp.http_endpoint.replace("traces", "metrics"))
    )
    provider = MeterProvider([PeriodicExportingMetricReader(exporter)], resource=RESOURCE)
    meter = provider.get_meter("shop.meter")
    meter.create_counter("requests", "1").add(2, {"route": "/chat"})
    meter.create_histogram("duration", "ms").record(5.0)
    provider.shutdown()
    metrics = {metric.name: metric for metric in otlp.metrics}
    assert metrics["requests"].unit == "1"
    assert metrics["requests"].points == [{"attributes": {"route": "/chat"}, "value": 2}]
    assert metrics["duration"].points == [{"attributes": {}, "count": 1, "sum": 5.0}]
    assert metrics["duration"].resource["service.name"] == "shop"
    assert [r.path for r in otlp.requests] == ["/v1/metrics"]


@pytest.mark.slow
def test_delay_slows_the_answer(otlp: OtlpReceiver) -> None:
    otlp.delay_seconds = 0.2
    started = time.monotonic()
    assert requests.post(otlp.http_endpoint, data=b"", timeout=5).status_code == 200
    assert time.monotonic() - started >= 0.2


@pytest.mark.parametrize(("body", "status"), [(b"\xff\xff", 400), (b"", 200)])
def test_broken_payload_is_a_bad_request(otlp: OtlpReceiver, body: bytes, status: int) -> None:
    assert requests.post(otlp.http_endpoint, data=body, timeout=5).status_code == status
    assert [r.status for r in otlp.requests] == [status]


def test_root_url_is_not_an_endpoint(otlp: OtlpReceiver) -> None:
    root = otlp.http_endpoint.removesuffix("/v1/traces")
    assert requests.post(root, data=b"", timeout=5).status_code == 404
    assert [(r.path, r.status) for r in otlp.requests] == [("/", 404)]


def test_wait_for_says_how_many_came(otlp: OtlpReceiver) -> None:
    with pytest.raises(TimeoutError, match=r"0 of 1 spans arrived in 0\.05 s"):
        otlp.wait_for(spans=1, timeout_seconds=0.05)


def test_stop_closes_both_ports_and_keeps_the_record() -> None:
    with OtlpReceiver() as otlp:
        urls = (otlp.grpc_endpoint, otlp.http_endpoint)
        ports = [int(url.split(":")[2].split("/")[0]) for url in urls]
        send(EXPORTERS["grpc"](otlp))
    otlp.stop()
    assert len(otlp.spans) == 2
    for port in ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_stop_ends_connections_that_are_kept_alive() -> None:
    """閉じたはずの受信側が、開いたままの接続で受け取り続けることはない。"""
    with OtlpReceiver() as otlp, requests.Session() as session:
        url = otlp.http_endpoint
        assert session.post(url, data=b"", timeout=5).status_code == 200
        otlp.stop()
        with pytest.raises(requests.ConnectionError):
            session.post(url, data=b"", timeout=5)
    assert len(otlp.requests) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpc", "http"])
def test_stop_does_not_wait_for_delayed_answers_nor_record_them(name: str) -> None:
    with OtlpReceiver() as otlp:
        otlp.delay_seconds = 60
        exporter: Any = EXPORTERS[name](otlp)
        sender = threading.Thread(target=send, args=(exporter,))
        sender.start()
        with contextlib.suppress(TimeoutError):
            otlp.wait_for(spans=1, timeout_seconds=0.3)
        started = time.monotonic()
        otlp.stop()
        assert time.monotonic() - started < 20
        exporter.shutdown()
        sender.join(30)
        assert not sender.is_alive()
    assert otlp.spans == []


def test_stop_is_complete_with_many_open_connections() -> None:
    with OtlpReceiver() as otlp:
        address = ("127.0.0.1", int(otlp.http_endpoint.split(":")[2].split("/")[0]))
        clients = [socket.create_connection(address) for _ in range(20)]
        assert requests.post(otlp.http_endpoint, data=b"", timeout=5).status_code == 200
        otlp.stop()
        for client in clients:
            client.settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert client.recv(1) == b""
            client.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """自分で署名した、127.0.0.1 の証明書と鍵。"""
    home = tmp_path_factory.mktemp("tls")
    files = (home / "cert.pem", home / "key.pem")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext"
    names = ["subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", files[0], "-keyout", files[1]]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return files


@pytest.mark.slow
def test_tls_on_both_ports(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    authority = certificate[0]
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # 渡した証明書より優先されてしまう
        monkeypatch.delenv(name, raising=False)
    with OtlpReceiver(tls=certificate) as otlp:
        assert otlp.grpc_endpoint.startswith("https://")
        credentials = grpc.ssl_channel_credentials(authority.read_bytes())
        send(GrpcSpanExporter(endpoint=otlp.grpc_endpoint, credentials=credentials))
        send(HttpSpanExporter(endpoint=otlp.http_endpoint, certificate_file=str(authority)))
        with pytest.raises(requests.exceptions.SSLError):
            requests.post(otlp.http_endpoint, data=b"", timeout=5)
    assert len(otlp.spans) == 4
