"""basic_setup: 起動時と再接続のときの、プロキシ・証明書・一時的な応答。"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import pytest

from chapter8_samples.production_tracing import (
    TracingSetupError,
    reset_production_tracing,
    setup_production_tracing,
    tracing_status,
)

FOR_ONE_HOP = ("Host", "Connection", "Content-Length", "Accept-Encoding")
LOGIN_PAGE = b"<html>please sign in</html>"


@mlflow.trace
def answer(number: int) -> int:
    return number


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """待ちきれずに切った相手や、証明書を断った相手のことは、印字しない。"""


class Front:
    """MLflow サーバーの手前に立つもの。``status`` が ``None`` の間だけ、本物に渡す。"""

    def __init__(self, target: str | None, tls: tuple[Path, Path] | None = None) -> None:
        self.status: int | None = None
        self.body = b"{}"
        self.headers: dict[str, str] = {}
        self.answered = 0
        self._target = urlsplit(target or "")
        front = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                front.answered += 1
                self._reply(*front._answer(self.command, self.path, content, self.headers))

            do_GET = do_POST = do_PATCH = do_PUT = handle_any

            def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*tls)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"

    def _answer(
        self, method: str, path: str, content: bytes, headers: Any
    ) -> tuple[int, dict[str, str], bytes]:
        if self.status is not None:
            return self.status, self.headers, self.body
        upstream = http.client.HTTPConnection(self._target.hostname or "", self._target.port)
        kept = {name: value for name, value in headers.items() if name not in FOR_ONE_HOP}
        upstream.request(method, path, content, kept)
        reply = upstream.getresponse()
        kind = {"Content-Type": reply.headers.get("Content-Type", "application/json")}
        return reply.status, kind, reply.read()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def front() -> Iterator[Callable[..., Front]]:
    fronts: list[Front] = []

    def start(*values: Any, **named: Any) -> Front:
        fronts.append(Front(*values, **named))
        return fronts[-1]

    yield start
    reset_production_tracing()
    for item in fronts:
        item.stop()


def wait_until_ready(seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not (status := tracing_status()) or not status.ready:
        assert time.monotonic() < deadline, status
        time.sleep(0.05)


def experiment(stage: str) -> bytes:
    """エクスペリメントを尋ねられたサーバーの答え。"""
    found = {"experiment_id": "7", "name": "a", "artifact_location": "x", "lifecycle_stage": stage}
    return json.dumps({"experiment": found}).encode()


# (状態, 本文, ヘッダー): 再起動中のプロキシ、秘密の更新中、混雑、ログイン画面
TRANSIENT = [
    (404, b"<html>not found</html>", {}),
    (404, b'{"detail": "Not Found"}', {}),
    (400, b"<html>bad request</html>", {}),
    (401, b'{"error_code": "UNAUTHENTICATED", "message": "bad token"}', {}),
    (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', {}),
    (
        429,
        b'{"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "slow down"}',
        {"Retry-After": "60"},
    ),
    (200, b"{}", {}),
    (200, LOGIN_PAGE, {"Content-Type": "text/html"}),
    (503, b"", {}),
    (500, b"[]", {}),
]


def test_transient_answers_never_stop_the_app(front: Callable[..., Front]) -> None:
    busy = front(None)
    for status, body, headers in TRANSIENT:
        busy.status, busy.body, busy.headers = status, body, headers
        found = setup_production_tracing("a", tracking_uri=busy.url)
        assert not found.ready, status
        assert "experiment 'a' cannot be used" in found.warnings[-1], found.warnings
        assert answer(1) == 1
        reset_production_tracing()
        with pytest.raises(TracingSetupError, match="strict=False"):
            setup_production_tracing("a", tracking_uri=busy.url, strict=True)


@pytest.mark.slow
def test_tracing_starts_after_every_transient_answer(
    front: Callable[..., Front], mlflow_server_url: str, stored: Any
) -> None:
    busy = front(mlflow_server_url)
    busy.status = 404
    setup_production_tracing("transient", tracking_uri=busy.url, retry_seconds=0.05)
    for status, body, headers in TRANSIENT:
        busy.status, busy.body, busy.headers = status, body, headers
        seen = busy.answered
        deadline = time.monotonic() + 60
        while busy.answered < seen + 3:  # 再接続でも、同じ応答を受け取る
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not (now := tracing_status()) or not now.ready
    busy.status = None
    wait_until_ready()
    answer(1)
    assert len(stored("transient")) == 1


def test_an_experiment_deleted_while_we_wait_may_be_restored(front: Callable[..., Front]) -> None:
    busy = front(None)
    busy.status = 503
    setup_production_tracing("a", tracking_uri=busy.url, retry_seconds=0.05)
    busy.status, busy.body = 200, experiment("deleted")
    deadline = time.monotonic() + 20
    while not (status := tracing_status()) or "deleted" not in status.warnings[-1]:
        assert time.monotonic() < deadline, status
        time.sleep(0.02)
    busy.body = experiment("active")
    wait_until_ready(20)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("asked", [1, 2], ids=["probe", "set_experiment"])
def test_a_fork_while_connecting_leaves_the_child_working(
    front: Callable[..., Front], asked: int
) -> None:
    busy = front(None)
    busy.status = 503
    setup_production_tracing("a", tracking_uri=busy.url, retry_seconds=0.05)
    answer_now = busy._answer  # pyright: ignore[reportPrivateUsage]
    waiting, seen = threading.Event(), list[str]()

    def answer_late(method: str, path: str, *rest: Any) -> Any:
        seen.append(path)
        if len(seen) == asked:
            waiting.set()
            time.sleep(1)
        return answer_now(method, path, *rest)

    busy.status, busy.body = 200, experiment("active")
    busy._answer = answer_late  # pyright: ignore[reportPrivateUsage]
    assert waiting.wait(20)
    child = os.fork()
    if child == 0:
        try:
            wait_until_ready(5)
            assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    wait_until_ready(20)


@pytest.mark.slow
def test_only_what_can_never_work_raises(
    front: Callable[..., Front], mlflow_server_url: str
) -> None:
    for uri in ("http://[::1", "http://", "ftp://host", "postgresql://app:pa55@db/x"):
        with pytest.raises(TracingSetupError) as caught:
            setup_production_tracing("a", tracking_uri=uri)
        assert "pa55" not in str(caught.value)
    name = "x" * 600  # MLflow のサーバーが 400 で断る名前
    with pytest.raises(TracingSetupError, match="cannot be used"):
        setup_production_tracing(name, tracking_uri=mlflow_server_url)
    assert tracing_status() is None


def test_an_api_that_hangs_does_not_hold_the_start(front: Callable[..., Front]) -> None:
    """入り口は応答しても、奥のデータベースが止まっているサーバー。"""
    asleep = front(None)
    asleep.status = 200
    release = threading.Event()
    answer_now = asleep._answer  # pyright: ignore[reportPrivateUsage]

    def answer_late(method: str, path: str, *rest: Any) -> Any:
        if path != "/health":
            release.wait(30)
        return answer_now(method, path, *rest)

    asleep._answer = answer_late  # pyright: ignore[reportPrivateUsage]
    started = time.monotonic()
    status = setup_production_tracing("a", tracking_uri=asleep.url, probe_timeout_seconds=0.5)
    assert not status.ready and time.monotonic() - started < 10
    release.set()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["authority", "insecure", "profile otlp"])
def test_private_certificate_works_with_mlflows_own_settings(
    way: str,
    front: Callable[..., Front],
    mlflow_server_url: str,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from chapter8_samples.production_tracing import find_traces, flush_traces

    if way == "insecure":
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate[0]))
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # OTLP の送信では、こちらが勝つ
        monkeypatch.delenv(name, raising=False)
    secure = front(mlflow_server_url, certificate)
    profile: Any = "otlp" if way == "profile otlp" else "burst"
    status = setup_production_tracing(
        f"tls {way}", tracking_uri=secure.url, strict=True, export_profile=profile
    )
    assert status.ready
    answer(1)
    assert flush_traces(30).ok
    assert len(find_traces(experiment_ids=[status.experiment_id])) == 1


def test_message_names_the_real_cause(
    front: Callable[..., Front],
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    free_port: int,
) -> None:
    def problem(uri: str) -> str:
        status = setup_production_tracing("a", tracking_uri=uri, probe_timeout_seconds=1)
        reset_production_tracing()
        return status.warnings[-1]

    secure = front(None, certificate)
    assert "certificate verify failed" in problem(secure.url)
    assert "refused" in problem(f"http://127.0.0.1:{free_port}")
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "/nowhere/ca.pem")
    assert "/nowhere/ca.pem" in problem(secure.url)
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:pa55@127.0.0.1:{free_port}")
    text = problem("https://mlflow.example")
    assert "proxy" in text.lower() and "pa55" not in text


def test_a_worker_that_loses_the_race_to_create_the_experiment_records_there_too(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, stored: Any
) -> None:
    """2 つのワーカーが同時に始まると、片方の「ない」という答えは、作るときにはもう古い。"""
    from mlflow.tracking._tracking_service.client import TrackingServiceClient as Client

    other = mlflow.MlflowClient().create_experiment("raced")
    find, asked = Client.get_experiment_by_name, list[str]()

    def find_too_early_at_first(client: Any, name: str) -> Any:
        asked.append(name)
        return find(client, name) if len(asked) > 1 else None

    # 競争は、わざとは起こせない
    monkeypatch.setattr(Client, "get_experiment_by_name", find_too_early_at_first)
    status = setup_production_tracing("raced")
    answer(1)
    assert status.experiment_id == other
    assert len(stored("raced")) == 1


def test_requests_go_through_the_proxy_of_the_environment(
    front: Callable[..., Front], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = front(None)
    proxy.status, proxy.body = 503, b"the proxy is busy"  # 3.18 は、JSON なら状態を見せない
    monkeypatch.setenv("HTTP_PROXY", proxy.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    status = setup_production_tracing("a", tracking_uri="http://mlflow.example")
    assert proxy.answered and "503" in status.warnings[-1]


def test_otlp_profile_refuses_to_skip_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    with pytest.raises(TracingSetupError, match="MLFLOW_TRACKING_SERVER_CERT_PATH"):
        setup_production_tracing("a", tracking_uri="https://localhost:1", export_profile="otlp")
