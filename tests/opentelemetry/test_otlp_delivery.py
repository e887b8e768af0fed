"""8.5.3 flush_all は期限を守って本当の数を答え、check_otlp_connection は理由まで答える。"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from ports import free_port

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import (
    build_otlp_config,
    check_otlp_connection,
    disable_otlp_export,
    flush_all,
    setup_otlp_export,
)
from chapter8_samples.opentelemetry.deadlines import run_in_time
from chapter8_samples.opentelemetry.export import delivery, session

from .conftest import wait_until


@pytest.fixture
def silent() -> Iterator[str]:
    """つながるが、何も答えない相手。"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def spans(count: int) -> None:
    for number in range(count):
        with mlflow.start_span(f"span-{number}"):
            pass


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_an_answer_proves_that_a_span_arrived(otlp: OtlpReceiver, protocol: str) -> None:
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    check = check_otlp_connection(endpoint, protocol, headers={"X-Key": "k"})
    assert check.ok and check.reason == "ok"
    said = "OK" if protocol == "grpc" else "HTTP 200"
    assert check.detail == f"{endpoint}: {said}; one span was accepted"
    assert [span.name for span in otlp.spans] == ["otlp.connection_check"]
    assert otlp.requests[0].headers["x-key"] == "k"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "unauthorized"), (403, "unauthorized"), (503, "busy"), (429, "busy"), (400, "rejected")],
)
def test_names_the_reason_of_a_refusal(
    otlp: OtlpReceiver, protocol: str, status: int, reason: str
) -> None:
    otlp.fail_next(1, status)
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    check = check_otlp_connection(endpoint, protocol)
    assert (check.ok, check.reason) == (False, reason), check


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_names_the_reason_when_there_is_no_answer(silent: str, protocol: str) -> None:
    refused = check_otlp_connection(f"http://127.0.0.1:{free_port()}", protocol)
    assert refused.reason == "refused", refused
    unknown = check_otlp_connection("http://no-such-host.invalid:4317", protocol, timeout_seconds=5)
    assert unknown.reason in ("dns", "timeout"), unknown
    started = time.monotonic()
    slow = check_otlp_connection(silent, protocol, timeout_seconds=0.2)
    assert slow.reason == "timeout", slow
    assert time.monotonic() - started < 5


def test_names_wrong_path_and_wrong_protocol(otlp: OtlpReceiver) -> None:
    root = otlp.http_endpoint.removesuffix("/v1/traces")
    missing = check_otlp_connection(root, "http/protobuf")
    assert missing.reason == "not_found"
    assert missing.detail.startswith(f"{root}: HTTP 404; no OTLP receiver at this path")
    swapped = check_otlp_connection(otlp.grpc_endpoint, "http/protobuf")
    assert swapped.reason == "wrong_protocol", swapped
    assert swapped.detail.isascii()  # HTTP/2 の枠がそのまま入っても、cp932 のコンソールに書ける
    swapped = check_otlp_connection(root, "grpc")
    assert not swapped.ok and swapped.reason in ("wrong_protocol", "busy", "timeout"), swapped


@pytest.fixture
def web() -> Iterator[Callable[[str, bytes], str]]:
    """型と本文を決めて、何を送っても 200 と答える Web サーバー。"""
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Type", answer["kind"])
            self.send_header("Content-Length", str(len(answer["body"])))
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    def start(kind: str, body: bytes) -> str:
        answer.update(kind=kind, body=body)
        return f"http://127.0.0.1:{server.server_port}/v1/traces"

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield start
        server.shutdown()


def test_a_200_that_is_no_receipt_is_not_ok(web: Callable[[str, bytes], str]) -> None:
    page = check_otlp_connection(web("text/html; charset=utf-8", b"<html>"), "http/protobuf")
    assert (page.ok, page.reason) == (False, "not_found"), page
    refused = ExportTraceServiceResponse()
    refused.partial_success.rejected_spans = 1
    refused.partial_success.error_message = "span too old"
    endpoint = web("application/x-protobuf", refused.SerializeToString())
    partial = check_otlp_connection(endpoint, "http/protobuf")
    assert (partial.ok, partial.reason) == (False, "rejected"), partial
    assert "span too old" in partial.detail
    assert check_otlp_connection(web("application/json", b"{}"), "http/protobuf").ok


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize(
    ("endpoint", "options", "message"),
    [
        ("127.0.0.1:4317", {}, "no scheme"),
        (None, {}, "None is not a URL"),
        ("http://user:s3cret@127.0.0.1:9", {}, "user name"),
        ("http://127.0.0.1:9", {"headers": {"api-key": "s3cret\n"}}, "value of header 'api-key'"),
        ("http://127.0.0.1:9", {"certificate_file": "no.pem"}, "no.pem"),
        ("http://127.0.0.1:9", {"timeout_seconds": 0}, "timeout_seconds 0"),
        ("http://a..b:9", {}, "not an http"),
    ],
)
def test_a_wrong_setting_is_the_answer_and_never_a_secret(
    endpoint: Any, options: dict[str, Any], message: str, protocol: str
) -> None:
    check = check_otlp_connection(endpoint, protocol, **options)
    assert (check.ok, check.reason) == (False, "invalid"), check
    assert message in check.detail and "s3cret" not in check.detail


@pytest.mark.parametrize("name", ["x!key", "x-key-bin"])
def test_a_header_grpc_cannot_send_is_the_answer(name: str) -> None:
    check = check_otlp_connection("http://127.0.0.1:9", headers={name: "s3cret"})
    assert (check.ok, check.reason) == (False, "invalid"), check
    assert name in check.detail and "s3cret" not in check.detail


def test_a_wrong_protocol_is_the_answer() -> None:
    assert check_otlp_connection("http://127.0.0.1:9", "http/json").reason == "invalid"


def test_a_config_can_be_checked(otlp: OtlpReceiver) -> None:
    config = build_otlp_config(otlp.http_endpoint, "bot", "http/protobuf", headers={"k": "v"})
    assert check_otlp_connection(config).ok
    assert otlp.requests[0].headers["k"] == "v"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_names_tls_when_the_port_is_plain(otlp: OtlpReceiver, protocol: str) -> None:
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    check = check_otlp_connection(endpoint.replace("http://", "https://"), protocol)
    assert check.reason == "tls", check


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_flush_all_counts_what_was_lost(
    tracking_uri: str, otlp: OtlpReceiver, protocol: str
) -> None:
    mlflow.set_experiment("lost")
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    setup_otlp_export(endpoint, "bot", protocol)
    otlp.fail_next(1, 401)
    spans(3)
    report = flush_all()
    assert (report.accepted, report.delivered, report.lost) == (3, 0, 3)
    assert not report.complete and not report.timed_out
    spans(2)
    report = flush_all()
    assert (report.accepted, report.delivered, report.lost) == (5, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_retries_a_short_outage(tracking_uri: str, otlp: OtlpReceiver, protocol: str) -> None:
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    setup_otlp_export(endpoint, "bot", protocol)
    otlp.fail_next(1, 503)
    spans(3)
    assert flush_all().complete
    assert len(otlp.spans) == 3


@pytest.mark.slow
def test_flush_all_counts_what_overflowed_the_queue(tracking_uri: str, otlp: OtlpReceiver) -> None:
    os.environ |= {"OTEL_BSP_MAX_QUEUE_SIZE": "8", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "8"}
    otlp.delay_seconds = 0.2
    setup_otlp_export(otlp.grpc_endpoint, "bot", mode="otlp_only")
    spans(100)
    report = flush_all()
    assert report.accepted == 100
    assert report.delivered == len(otlp.spans) < 100
    assert report.lost == 100 - report.delivered


@pytest.mark.slow
def test_a_hanging_receiver_delays_neither_the_app_nor_the_exit(
    tracking_uri: str, silent: str
) -> None:
    mlflow.set_experiment("hanging")
    setup_otlp_export(silent, "bot", timeout_seconds=60)
    started = time.monotonic()
    spans(50)
    assert time.monotonic() - started < 3
    mlflow.flush_trace_async_logging()  # SQLite が遅い機械でも、下の期限が測るのは OTLP だけにする
    started = time.monotonic()
    report = flush_all(timeout_seconds=2)
    assert time.monotonic() - started < 5
    assert report.timed_out and not report.complete
    assert report.delivered == 0
    assert len(mlflow.search_traces()) == 50  # MLflow への書き出しは、待たされない


@pytest.mark.slow
def test_results_of_an_abandoned_setting_are_not_counted_later(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    otlp.delay_seconds = 0.6
    setup_otlp_export(otlp.http_endpoint, "bot", "http/protobuf", timeout_seconds=0.3)
    old = delivery._tally
    spans(3)
    disable_otlp_export(timeout_seconds=0.1)
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    wait_until(lambda: old.lost == 3, 20)
    report = flush_all()
    assert (report.accepted, report.delivered, report.lost) == (0, 0, 0)


def test_a_span_that_ends_while_the_setting_changes_is_counted_once(
    tracking_uri: str, otlp: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ほかのスレッドのスパンは、数え直すところの前後で終わる。"""

    def at(moment: str) -> None:
        original = getattr(session, moment)

        def around() -> Any:
            spans(1)
            result = original()
            spans(1)
            return result

        monkeypatch.setattr(session, moment, around)

    setup_otlp_export(otlp.http_endpoint, "old", "http/protobuf", mode="otlp_only")
    spans(1)
    at("_rebuild_provider")
    at("restart_counts")
    setup_otlp_export(otlp.http_endpoint, "new", "http/protobuf", mode="otlp_only")
    spans(3)
    report = flush_all()
    assert report.complete and (report.delivered, report.lost) == (4, 0), report


FORKED = """
import os, sys, mlflow
from chapter8_samples.opentelemetry import flush_all, setup_otlp_export

setup_otlp_export(sys.argv[1], "bot", "http/protobuf")
for _ in range(5):
    mlflow.start_span_no_context("parent").end()
child = os.fork()
mlflow.start_span_no_context("after").end()
report = flush_all(20)
print(report.accepted, report.delivered, report.lost, flush=True)
if not child:
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="only on POSIX: needs fork")
def test_a_forked_child_counts_its_own_spans(
    tracking_uri: str, otlp: OtlpReceiver, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", FORKED, otlp.http_endpoint]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.split("\n")[:2]) == ["1 1 0", "6 6 0"], run.stdout
    assert len(otlp.spans) == 7


def test_a_job_that_fails_has_not_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    assert run_in_time([lambda: None, lambda: 1 / 0, lambda: time.sleep(5)], 0.2) == [
        True,
        False,
        False,
    ]
