"""8.5.3 プライベート CA の TLS で、全部のスパンが届く。"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import (
    OtlpConfig,
    OtlpSetupError,
    build_otlp_config,
    check_otlp_connection,
    flush_all,
    setup_otlp_export,
)

PROTOCOLS = ["grpc", "http/protobuf"]


@pytest.fixture
def secure(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[OtlpReceiver]:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with OtlpReceiver(tls=certificate) as receiver:
        yield receiver


def endpoint_of(otlp: OtlpReceiver, protocol: str) -> str:
    return otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mode", ["dual", "otlp_only"])
def test_every_span_arrives(
    tracking_uri: str,
    secure: OtlpReceiver,
    certificate: tuple[Path, Path],
    protocol: str,
    mode: str,
) -> None:
    endpoint = endpoint_of(secure, protocol)
    authority = str(certificate[0])
    setup_otlp_export(endpoint, "bot", protocol, mode=mode, certificate_file=authority)  # type: ignore[arg-type]
    for number in range(5):
        with mlflow.start_span(f"s{number}"):
            pass
    assert flush_all().complete
    assert sorted(span.name for span in secure.spans) == sorted(f"s{n}" for n in range(5))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_without_the_authority_nothing_arrives_and_the_check_says_why(
    tracking_uri: str, secure: OtlpReceiver, certificate: tuple[Path, Path], protocol: str
) -> None:
    endpoint = endpoint_of(secure, protocol)
    refused = check_otlp_connection(endpoint, protocol)
    assert (refused.ok, refused.reason) == (False, "tls"), refused
    accepted = check_otlp_connection(endpoint, protocol, certificate_file=str(certificate[0]))
    assert accepted.ok, accepted
    setup_otlp_export(endpoint, "bot", protocol, timeout_seconds=1)
    with mlflow.start_span("lost"):
        pass
    report = flush_all()
    assert (report.delivered, report.lost) == (0, 1)
    assert [span.name for span in secure.spans] == ["otlp.connection_check"]


SYSTEM_BUNDLE = requests.certs.where()  # この中に、プライベート CA はない


@pytest.mark.slow
@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_ca_bundle_in_the_environment_wins_over_http(
    tracking_uri: str, secure: OtlpReceiver, certificate: tuple[Path, Path], name: str
) -> None:
    """requests は環境変数を優先するので、渡した CA は使われず、全部失われる。始める前に断る。"""
    os.environ[name] = SYSTEM_BUNDLE
    authority = str(certificate[0])
    with pytest.raises(OtlpSetupError, match=f"^{name}=.* overrides certificate_file"):
        setup_otlp_export(secure.http_endpoint, "bot", "http/protobuf", certificate_file=authority)
    setup_otlp_export(secure.grpc_endpoint, "bot", certificate_file=authority)
    with mlflow.start_span("over grpc"):
        pass
    assert flush_all().complete
    os.environ[name] = authority  # 同じ CA を指していれば、困らない
    setup_otlp_export(secure.http_endpoint, "bot", "http/protobuf", certificate_file=authority)
    with mlflow.start_span("over http"):
        pass
    assert flush_all().complete


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
@pytest.mark.parametrize(
    ("protocol", "bundle", "given", "reason"),
    [
        ("http/protobuf", "system", "private", "tls"),  # 送信と同じく、環境変数が優先される
        ("http/protobuf", "private", None, "ok"),
        ("http/protobuf", "/no/such/file.pem", None, "tls"),
        ("grpc", "system", "private", "ok"),  # gRPC は、この環境変数を読まない
        ("grpc", "private", None, "tls"),
    ],
)
def test_the_check_answers_what_the_exporter_would_do(
    secure: OtlpReceiver,
    certificate: tuple[Path, Path],
    name: str,
    protocol: str,
    bundle: str,
    given: str | None,
    reason: str,
) -> None:
    files = {"system": SYSTEM_BUNDLE, "private": str(certificate[0])}
    os.environ[name] = files.get(bundle, bundle)
    config = build_otlp_config(
        endpoint_of(secure, protocol), "bot", protocol, certificate_file=files.get(given or "")
    )
    check = check_otlp_connection(config)
    assert check.reason == reason, check
    assert _delivered_by_the_exporter(config) is check.ok


def _delivered_by_the_exporter(config: OtlpConfig) -> bool:
    """本物のエクスポーターで 1 スパンを送る。"""
    exporter: Any = GrpcExporter if config.protocol == "grpc" else HttpExporter
    os.environ["OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE"] = config.certificate_file or ""
    provider, sent = TracerProvider(), exporter(endpoint=config.endpoint, timeout=0.5)
    span = provider.get_tracer("test").start_span("probe")
    span.end()
    try:
        return bool(sent.export([span]) is SpanExportResult.SUCCESS)
    except OSError:  # 環境変数の指すファイルがない
        return False
    finally:
        sent.shutdown()
