"""propagation: スレッド、HTTP、Web フレームワークの先への引き継ぎ。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.entities.trace_location import MlflowExperimentLocation
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry import context as otel_context
from opentelemetry import trace as otel_trace

from chapter8_samples.production_tracing import (
    RequestContext,
    RequestContextMiddleware,
    add_trace_metadata,
    incoming_trace,
    init_flask,
    outgoing_headers,
    request_scope,
    run_with_context,
    traced_stream,
)
from chapter8_samples.production_tracing.propagation import (
    CALLER_SPAN_ID,
    CALLER_TRACE_ID,
    scope_flask_requests,
)

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = {
    "not sampled": f"00-{TRACE}-{SPAN}-00",
    "sampled": f"00-{TRACE}-{SPAN}-01",
    "random id": f"00-{TRACE}-{SPAN}-03",
    "a later version": f"cc-{TRACE}-{SPAN}-01-more",
}
INVALID = {
    "upper case": f"00-{TRACE.upper()}-{SPAN}-01",
    "version ff": f"ff-{TRACE}-{SPAN}-01",
    "no trace": f"00-{'0' * 32}-{SPAN}-01",
    "no span": f"00-{TRACE}-{'0' * 16}-01",
    "two headers": f"00-{TRACE}-{SPAN}-01,00-{TRACE}-{SPAN}-01",
    "a word": "garbage",
    "nothing": "",
    "long": "0" * 5000,
}
TRACEPARENTS = [*VALID.values(), *INVALID.values(), None]


@pytest.fixture
def collected(collected: Any) -> Any:
    """データベースを開かずに始める(どのエクスペリメントでも同じことを見るため)。"""
    mlflow.tracing.set_destination(MlflowExperimentLocation("1"))
    return collected


@mlflow.trace
def step() -> None: ...


def asgi_get(app: Any, headers: list[tuple[bytes, bytes]]) -> None:
    async def receive() -> Any: ...
    async def send(_message: Any) -> None: ...

    asyncio.run(app({"type": "http", "headers": headers}, receive, send))


def asgi_app(**options: Any) -> Callable[[dict[str, str]], None]:
    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        step()

    app = RequestContextMiddleware(endpoint, **options)
    return lambda headers: asgi_get(
        app, [(key.encode(), value.encode("latin-1")) for key, value in headers.items()]
    )


def flask_app(**options: Any) -> Callable[[dict[str, str]], None]:
    from flask import Flask

    app = Flask("app")
    init_flask(app, **options)
    app.get("/")(lambda: step() or "ok")

    def get(headers: dict[str, str]) -> None:
        with app.test_client().get("/", headers=headers) as response:
            assert response.status_code == 200

    return get


SLOW = pytest.mark.slow
APPS = pytest.mark.parametrize("make_app", [asgi_app, flask_app])


# ---- 呼び出し元の traceparent ----


@APPS
@pytest.mark.parametrize("join_caller", [False, True])
def test_every_request_has_its_own_trace(collected: Any, make_app: Any, join_caller: bool) -> None:
    """呼び出し元を信用していても、壊れた ``traceparent`` と、記録しない印には加わらない。"""
    get = make_app(join_caller=join_caller)
    joinable = [VALID["sampled"], VALID["random id"], VALID["a later version"]]
    sent = [value for value in TRACEPARENTS if not (join_caller and value in joinable)]
    for value in sent:
        headers = {"X-User-Id": "u", "tracestate": "vendor=1", "baggage": "user=x"}
        get(headers if value is None else headers | {"traceparent": value})
    traces = collected()
    assert [str(trace.info.state) for trace in traces] == ["OK"] * len(sent)
    assert len({trace.info.trace_id for trace in traces} - {f"tr-{TRACE}"}) == len(sent)
    assert {trace.info.trace_metadata["mlflow.trace.user"] for trace in traces} == {"u"}
    for value, trace in zip(sent, traces, strict=True):
        metadata = trace.info.trace_metadata
        kept = (metadata.get(CALLER_TRACE_ID), metadata.get(CALLER_SPAN_ID))
        assert kept == ((TRACE, SPAN) if value in VALID.values() else (None, None)), value


def test_two_traceparent_headers_are_none(collected: Any) -> None:

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        step()

    pair = (b"traceparent", VALID["sampled"].encode())
    asgi_get(RequestContextMiddleware(endpoint, join_caller=True), [pair, pair])
    (trace,) = collected()
    assert CALLER_TRACE_ID not in trace.info.trace_metadata


@settings(max_examples=50)
@given(st.text(max_size=80), st.booleans())
def test_no_header_can_break_a_request(value: str, join_caller: bool) -> None:
    with incoming_trace({"TraceParent": value, "tracestate": value}) as joined:
        assert joined is False
    with incoming_trace({"traceparent": value}, join_caller=join_caller) as joined:
        assert joined is False


@APPS
def test_a_caller_in_the_same_process_is_joined_only_on_request(
    collected: Any, make_app: Any
) -> None:
    for join_caller in (False, True):
        with mlflow.start_span("caller"):
            make_app(join_caller=join_caller)(outgoing_headers())
    names = [sorted(span.name for span in trace.data.spans) for trace in collected()]
    assert names == [["step"], ["caller"], ["caller", "step"]]


def test_joining_the_callers_trace(tracking_uri: str, stored: Any) -> None:
    mlflow.set_experiment("http")
    with mlflow.start_span("caller"):
        headers = outgoing_headers()
    assert set(headers) == {"traceparent"}
    stored()
    with incoming_trace({"Traceparent": headers["traceparent"]}, join_caller=True) as joined:
        step()
    with incoming_trace({"accept": "*/*"}, join_caller=True) as alone:
        step()
    assert (joined, alone) == (True, False)
    assert sorted(len(trace.data.spans) for trace in stored("http")) == [1, 2]
    assert not InMemoryTraceManager.get_instance()._traces


def test_requests_that_join_one_trace_at_the_same_time_are_all_kept(
    tracking_uri: str, stored: Any
) -> None:
    """先に終わったリクエストが、まだ続いているもののスパンを捨てない。"""
    mlflow.set_experiment("parallel")
    with mlflow.start_span("caller"):
        headers = outgoing_headers()
    stored()
    both, first_is_done = threading.Barrier(2), threading.Event()

    def serve(number: int) -> None:
        with incoming_trace(headers, join_caller=True), mlflow.start_span(f"request {number}"):
            both.wait(10)
            step()
            if number == 1:
                assert first_is_done.wait(10)
                step()
        if number == 0:
            first_is_done.set()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(serve, range(2)))
    (trace,) = stored("parallel")
    names = sorted(span.name for span in trace.data.spans)
    assert names == ["caller", "request 0", "request 1", "step", "step", "step"]
    assert str(trace.info.state) == "OK"
    assert not InMemoryTraceManager.get_instance()._traces


@pytest.fixture
def unified(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """MLflow が OpenTelemetry と同じプロバイダーを使う設定(プロセスに 1 つなので、後で戻す)。"""
    from opentelemetry.sdk.trace import TracerProvider

    mlflow.tracing.reset()
    monkeypatch.setenv("MLFLOW_USE_DEFAULT_TRACER_PROVIDER", "false")
    monkeypatch.setattr(otel_trace, "_TRACER_PROVIDER", TracerProvider())
    yield mlflow.tracing.get_bridged_tracer_provider()
    mlflow.tracing.reset()


@pytest.mark.parametrize(
    ("flag", "records"),
    [("01", False), ("00", True), pytest.param("00", False, marks=SLOW), ("01", True)],
)
def test_a_foreign_context_that_others_made_current(
    collected: Any, unified: Any, flag: str, records: bool
) -> None:
    """ほかの計装が ``traceparent`` を先に読み、サーバーのスパンを始めていることがある。"""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    headers = {"traceparent": f"00-{TRACE}-{SPAN}-{flag}", "x-user-id": "u"}
    foreign = TraceContextTextMapPropagator().extract(headers)
    if records:
        server = otel_trace.get_tracer("asgi").start_span("GET /", context=foreign)
        foreign = otel_trace.set_span_in_context(server)
    token = otel_context.attach(foreign)
    asgi_app()(headers)
    assert otel_trace.get_current_span(foreign) is otel_trace.get_current_span()
    otel_context.detach(token)
    (trace,) = collected()
    assert [span.name for span in trace.data.spans] == ["step"]
    assert (str(trace.info.state), trace.info.trace_metadata["mlflow.trace.user"]) == ("OK", "u")


def test_a_trace_that_the_servers_span_began_gets_the_context(collected: Any, unified: Any) -> None:
    with otel_trace.get_tracer("asgi").start_as_current_span("GET /"):
        asgi_app()({"x-user-id": "u", "x-request-id": "r1"})
    (trace,) = collected()
    assert sorted(span.name for span in trace.data.spans) == ["GET /", "step"]
    assert (trace.info.client_request_id, trace.info.trace_metadata["mlflow.trace.user"]) == (
        "r1",
        "u",
    )


# ---- Web フレームワーク ----


def test_other_scopes_pass_through() -> None:
    seen: list[str] = []

    async def endpoint(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def main() -> None:
        app = RequestContextMiddleware(endpoint)
        for kind in ("lifespan", "websocket"):
            await app({"type": kind}, None, None)

    asyncio.run(main())
    assert seen == ["lifespan", "websocket"]


@APPS
def test_a_reader_that_fails_does_not_fail_the_request(
    collected: Any, make_app: Any, caplog: pytest.LogCaptureFixture
) -> None:

    def read(headers: Any) -> RequestContext:
        return RequestContext(user_id="secret" * 100)

    make_app(read=read)({"x-request-id": "r"})
    (trace,) = collected()
    assert "mlflow.trace.user" not in trace.info.trace_metadata
    assert trace.info.tags["request_id"].startswith("req-")
    assert "read" in caplog.text and "(ValueError)" in caplog.text
    assert "secret" not in caplog.text


@APPS
def test_odd_header_values(collected: Any, make_app: Any) -> None:
    make_app()({"X-User-Id": "caf\xe9", "X-Session-Id": " " + "s" * 300, "X-Request-Id": "  "})
    (trace,) = collected()
    metadata = trace.info.trace_metadata
    assert metadata["mlflow.trace.user"] == "caf\xe9"
    assert metadata["mlflow.trace.session"] == "s" * 250
    assert trace.info.tags["request_id"].startswith("req-")


def words() -> Iterator[str]:
    for word in ("a", "b"):
        step()
        yield word


def bodies() -> dict[str, Callable[[], Any]]:
    from flask import stream_with_context

    return {
        "traced": lambda: traced_stream("stream", words()),
        "context of traced": lambda: stream_with_context(traced_stream("stream", words())),
        "traced with context": lambda: traced_stream("stream", stream_with_context(words())),
    }


@pytest.mark.parametrize("body", ["traced", "context of traced", "traced with context"])
@pytest.mark.parametrize(
    ("scoped", "read"),
    [
        ("init_flask", "all"),
        pytest.param("init_flask", "first", marks=SLOW),
        pytest.param("init_flask", "none", marks=SLOW),
        pytest.param("request_scope", "all", marks=SLOW),
        pytest.param("request_scope", "first", marks=SLOW),
        pytest.param("request_scope", "none", marks=SLOW),
    ],
)
def test_flask_streams_keep_user_and_session_however_they_end(
    collected: Any, body: str, scoped: str, read: str
) -> None:
    from flask import Flask, Response

    app = Flask("app")
    make = bodies()[body]
    if scoped == "init_flask":
        init_flask(app)

    @app.get("/")
    def index() -> Response:
        if scoped == "init_flask":
            return Response(make())
        with request_scope(RequestContext(user_id="u", session_id="s")):
            return Response(make())

    headers = {"X-User-Id": "u", "X-Session-Id": "s"}
    with app.test_client().get("/", headers=headers, buffered=False) as response:
        chunks = response.iter_encoded()
        if read == "all":
            assert b"".join(chunks) == b"ab"
        elif read == "first":
            assert next(chunks) == b"a"
    traces = collected()
    assert all(trace.info.trace_metadata["mlflow.trace.user"] == "u" for trace in traces)
    assert all(trace.info.trace_metadata["mlflow.trace.session"] == "s" for trace in traces)
    assert len(traces) == 1 or (read == "none" and traces == [])
    assert not InMemoryTraceManager.get_instance()._traces
    step()
    assert "mlflow.trace.user" not in collected()[-1].info.trace_metadata


def test_flask_streams_of_others_are_in_the_scope(collected: Any) -> None:
    """``traced_stream`` を使わない本体の中の、自動トレースや ``@mlflow.trace``。"""
    from flask import Flask, Response, request, stream_with_context

    app = Flask("app")
    init_flask(app)

    def path() -> Iterator[str]:
        step()
        yield request.path

    app.get("/plain", endpoint="plain")(lambda: Response(words()))
    app.get("/context", endpoint="context")(lambda: Response(stream_with_context(path())))
    client = app.test_client()
    assert client.get("/plain", headers={"X-User-Id": "u"}).data == b"ab"
    assert client.get("/context", headers={"X-User-Id": "u"}).data == b"/context"
    users = [trace.info.trace_metadata["mlflow.trace.user"] for trace in collected()]
    assert users == ["u"] * 3


def test_flask_errors_and_its_test_client_work_as_before(collected: Any) -> None:
    from flask import Flask, abort, request

    app = Flask("app")
    init_flask(app)

    @app.get("/fail")
    def fail() -> str:
        raise OSError("view failed")

    app.get("/stop")(lambda: abort(403))
    with app.test_client() as client:
        assert client.get("/stop?x=1", headers={"X-User-Id": "u"}, buffered=True).status_code == 403
        assert request.args["x"] == "1"
        assert client.get("/nowhere", buffered=True).status_code == 404
        assert client.get("/fail", buffered=True).status_code == 500
    app.testing = True
    with pytest.raises(OSError, match="view failed"):
        app.test_client().get("/fail", headers={"X-User-Id": "u"})
    with app.test_request_context("/stop"):
        app.preprocess_request()
    step()
    (trace,) = collected()
    assert "mlflow.trace.user" not in trace.info.trace_metadata


@contextlib.contextmanager
def serving_flask(port: int, body: Callable[[], Iterator[str]]) -> Iterator[None]:
    from flask import Flask, Response
    from werkzeug.serving import make_server

    app = Flask("app")
    init_flask(app)
    app.get("/")(lambda: Response(traced_stream("chat", body())))
    server = make_server("127.0.0.1", port, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@contextlib.contextmanager
def serving_fastapi(port: int, body: Callable[[], Iterator[str]]) -> Iterator[None]:
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse

    app = FastAPI()
    app.add_middleware(RequestContextMiddleware)  # type: ignore[arg-type]
    app.get("/", response_model=None)(lambda: StreamingResponse(traced_stream("chat", body())))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield
    server.should_exit = True
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("serving", [serving_flask, serving_fastapi])
def test_streams_of_real_servers(collected: Any, free_port: int, serving: Any) -> None:
    """最後まで読むクライアントと、途中で切断するクライアント。"""
    import requests

    closed = threading.Event()

    def endless() -> Iterator[str]:
        try:
            while True:
                step()
                yield "word " * 1000
        finally:
            closed.set()

    def two() -> Iterator[str]:
        yield from words()

    url = f"http://127.0.0.1:{free_port}/"
    headers = {"X-User-Id": "u", "X-Session-Id": "s"}
    for body in (two, endless):
        with serving(free_port, body), requests.get(url, headers=headers, stream=True) as answer:
            if body is two:
                assert answer.text == "ab"
            else:
                assert next(answer.iter_content(100)).startswith(b"word")
                answer.close()
                while not closed.wait(0.1):
                    gc.collect()
    full, cut = collected()
    for trace in (full, cut):
        metadata = trace.info.trace_metadata
        assert (metadata["mlflow.trace.user"], metadata["mlflow.trace.session"]) == ("u", "s")
        (chat,) = [span for span in trace.data.spans if span.name == "chat"]
        assert {span.parent_id for span in trace.data.spans} == {None, chat.span_id}
    assert cut.data.spans[0].get_attribute("stream.aborted") is True
    assert not InMemoryTraceManager.get_instance()._traces


def test_a_flask_response_that_nobody_closes_leaves_no_scope_behind(
    collected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """テストクライアントの応答は、ふつう閉じられない。"""
    from flask import Flask

    complaints: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    gc.collect()
    complaints.clear()  # ほかのテストが閉じなかった応答
    left: list[str] = []

    @contextlib.contextmanager
    def scope(headers: Any) -> Iterator[None]:
        with request_scope(RequestContext(user_id="u")):
            yield
        left.append(headers["X-User-Id"])

    app = Flask("app")
    scope_flask_requests(app, scope)
    app.get("/", endpoint="ok")(lambda: "ok")
    app.get("/fail", endpoint="fail")(lambda: str(1 / 0))
    app.testing = True  # 例外は、そのまま外に出る
    app.test_client().get("/", headers={"X-User-Id": "not closed"})
    with pytest.raises(ZeroDivisionError):
        app.test_client().get("/fail", headers={"X-User-Id": "failed"})
    gc.collect()
    assert (left, complaints) == (["not closed", "failed"], [])


# ---- スレッドと非同期 ----


@pytest.mark.slow
def test_propagation(tracking_uri: str, stored: Any) -> None:
    mlflow.set_experiment("propagation")
    with ThreadPoolExecutor(1) as pool, mlflow.start_span("with") as root:
        add_trace_metadata(RequestContext(user_id="u"))
        run_with_context(pool, step).result()
        assert root is not None
    with ThreadPoolExecutor(1) as pool, mlflow.start_span("without"):
        pool.submit(step).result()

    async def main() -> None:
        with mlflow.start_span("asyncio"):
            await asyncio.to_thread(step)

    asyncio.run(main())
    counts = {t.data.spans[0].name: len(t.data.spans) for t in stored("propagation")}
    assert counts == {"with": 2, "without": 1, "step": 1, "asyncio": 2}


def test_outside_of_a_trace_there_is_nothing_to_send() -> None:
    assert outgoing_headers() == {}
