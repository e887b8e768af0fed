"""8.5.2 HTTP のスパン、MLflow のルート、LLM のスパンが 1 つのトレースになる。

共通のプロバイダーはプロセスに 1 つなので、本物の FastAPI と uvicorn を別のプロセスで動かす。
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import mlflow
import pytest
import requests

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import (
    setup_otlp_export,
    use_unified_tracer_provider,
    web,
)
from chapter8_samples.production_tracing.basic_setup import (
    reset_production_tracing,
    setup_production_tracing,
)

CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{CALLER}-00f067aa0ba902b7-01"
SERVER = """
import json, sys, mlflow, uvicorn
from fastapi import FastAPI
from opentelemetry import trace
from chapter8_samples.opentelemetry import (
    flush_all, otlp_status, setup_otlp_export, use_unified_tracer_provider, web
)

endpoint, tracking_uri = sys.argv[1:3]
options = json.loads(sys.argv[3])
native = options.pop("native")
if not native:  # 自分ではスパンを作らない版の FastAPI
    web.find_spec = lambda name: None
mlflow.set_tracking_uri(tracking_uri)
mlflow.set_experiment("unified")
use_unified_tracer_provider()
setup_otlp_export(endpoint, "bot", **options)
use_unified_tracer_provider()  # 2 回目は何も変えない
app = FastAPI(telemetry={"operation_spans": False, "tracing": native})
web.trace_http_requests(app)

@mlflow.trace(name="answer", span_type="AGENT")
def answer(number):
    mlflow.update_current_trace(tags={"release": "v1"}, request_preview=f"question {number}")
    with trace.get_tracer("other.library").start_as_current_span("search"):
        with mlflow.start_span("llm", span_type="CHAT_MODEL") as llm:
            llm.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 7, "output_tokens": 2})
            headers = {}
            from opentelemetry import propagate
            propagate.inject(headers)
            return {"downstream": headers["traceparent"]}

@app.get("/ask")
def ask(number: int):
    return answer(number)

@app.get("/end")
def end():
    report = flush_all()
    return [report.complete, list(otlp_status().warnings)]

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)

Server(uvicorn.Config(app, port=0, log_level="warning")).run()
"""


@contextmanager
def serving(
    endpoint: str, tracking_uri: str, options: dict[str, Any], program: str = SERVER
) -> Iterator[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, endpoint, tracking_uri, json.dumps(options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "native"), [("dual", True), ("dual", False), ("otlp_only", True)])
def test_one_trace_from_the_http_request_to_the_llm(
    tracking_uri: str, otlp: OtlpReceiver, mode: str, native: bool
) -> None:
    """トレースの外から直に呼ばれた 3 件と、よそのトレースの中から呼ばれた 3 件。"""
    options = {"mode": mode, "genai_semconv": False, "native": native}
    callers = [{}] * 3 + [{"traceparent": TRACEPARENT}] * 3
    with serving(otlp.grpc_endpoint, tracking_uri, options) as url:
        answers = [
            requests.get(f"{url}/ask", {"number": n}, headers=headers, timeout=30)
            for n, headers in enumerate(callers)
        ]
        assert requests.get(f"{url}/end", timeout=30).json() == [True, []]
    spans = [span for span in otlp.spans if span.name != "GET /end"]
    roots = [span for span in spans if not span.parent_span_id]
    assert [root.name for root in roots] == ["GET /ask"] * 6
    for root, answer, headers in zip(roots, answers, callers, strict=True):
        mine = [span for span in spans if span.trace_id == root.trace_id]
        assert _chain(mine) == ["GET /ask", "answer", "search", "llm"]
        llm = next(span for span in mine if span.name == "llm")
        assert answer.json()["downstream"].startswith(f"00-{root.trace_id}-{llm.span_id}-")
        assert root.links == ([(CALLER, "00f067aa0ba902b7")] if headers else [])
        assert root.attributes["mlflow.traceTag.release"] == "v1"
    assert len(spans) == 24
    assert CALLER not in {span.trace_id for span in spans}
    _check_stored([root.trace_id for root in roots] if mode == "dual" else [])


def _chain(spans: list[Any]) -> list[str]:
    """親から子へたどったスパン名。"""
    children = {span.parent_span_id: span for span in spans}
    names, current = [], children.get("")
    while current is not None:
        names.append(current.name)
        current = children.get(current.span_id)
    return names


def _check_stored(expected: list[str]) -> None:
    found = mlflow.get_experiment_by_name("unified")
    assert found is not None
    stored: Any = mlflow.search_traces(locations=[found.experiment_id], return_type="list")
    asked = [trace for trace in stored if trace.data.spans[0].name == "GET /ask"]
    assert {trace.info.trace_id for trace in asked} == {f"tr-{id_}" for id_ in expected}
    for trace in asked:
        assert [span.name for span in trace.data.spans] == ["GET /ask", "answer", "search", "llm"]
        assert trace.info.state == "OK"
        assert trace.info.token_usage["input_tokens"] == 7
        assert trace.info.request_preview.startswith("question ")
        assert trace.info.tags["release"] == "v1"


MASKED = """
import json, logging, sys, mlflow, uvicorn
from fastapi import FastAPI, Request
from opentelemetry import trace
from chapter8_samples.opentelemetry import (
    flush_all, setup_otlp_export, trace_http_requests, use_unified_tracer_provider
)
from chapter8_samples.production_tracing import setup_production_tracing
from chapter8_samples.production_tracing.masking import mask_pii

endpoint, tracking_uri, options = sys.argv[1:4]
mlflow.set_tracking_uri(tracking_uri)
early = trace.get_tracer("early")
use_unified_tracer_provider()
setup_production_tracing("unified", span_processors=[mask_pii()])
setup_otlp_export(endpoint, "bot", **json.loads(options))
library = trace.get_tracer("library")
app = FastAPI(telemetry={"operation_spans": False})
trace_http_requests(app)

@app.get("/ask")
def ask(request: Request):
    http = trace.get_current_span()
    http.set_attribute("url.full", str(request.url))
    http.set_attribute("http.request.header.authorization", [request.headers["authorization"]])
    http.set_attribute("http.response.body.size", 12)
    with library.start_as_current_span("lookup 090-1234-5678"), mlflow.start_span("answer"):
        trace.get_current_span().add_event("found", {"contact": "taro@example.jp"})
    try:
        with early.start_as_current_span("read"):
            raise ValueError("taro@example.jp")
    except ValueError:
        pass

@app.get("/end")
def end():
    return flush_all().complete

class Server(uvicorn.Server):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        print(self.servers[0].sockets[0].getsockname()[1], flush=True)

Server(uvicorn.Config(app, port=0, log_level="warning")).run()
"""


@pytest.mark.slow
def test_http_spans_are_masked_and_linked_when_8_1_is_set_up_later(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    secret = "Bearer abcdefghijklmnop1234567890"
    headers = {"Authorization": secret, "traceparent": TRACEPARENT}
    asked = {"email": "taro@example.jp", "phone": "090-1234-5678", "item": "coffee"}
    options = {"genai_semconv": False}
    with serving(otlp.grpc_endpoint, tracking_uri, options, MASKED) as url:
        assert requests.get(f"{url}/ask", asked, headers=headers, timeout=30).ok
        assert requests.get(f"{url}/end", timeout=30).json()
    spans = {span.name: span for span in otlp.spans}
    root = spans["GET /ask"]
    assert set(spans) == {"GET /ask", "lookup [PHONE]", "answer", "read"}
    assert {span.trace_id for span in otlp.spans} == {root.trace_id}
    assert root.links == [(CALLER, "00f067aa0ba902b7")]
    assert root.resource["service.name"] == "bot"
    assert root.attributes["url.full"].endswith("item=coffee")
    if find_spec("fastapi.telemetry"):  # 自分でスパンを作る版
        assert root.attributes["url.query"].endswith("item=coffee")
    assert root.attributes["http.response.body.size"] == 12
    assert root.attributes["http.request.header.authorization"] == ["[API_KEY]"]
    assert spans["read"].status_message == "ValueError: [EMAIL]"
    trace = mlflow.get_trace(f"tr-{root.trace_id}")
    assert trace is not None and len(trace.data.spans) == 4
    kept = [json.dumps(trace.to_dict()), json.dumps([vars(s) for s in otlp.spans], default=vars)]
    for copy in kept:
        assert "coffee" in copy
        for leaked in ("taro", "1234-5678", "abcdefghijklmnop"):
            assert leaked not in copy, leaked


def test_a_masking_that_fails_removes_the_content(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_content: object) -> object:
        raise ValueError("taro@example.jp")

    attributes = {"url.query": "taro@example.jp", "mlflow.traceRequestId": "tr-1"}
    content = {"attributes": attributes, "events": [{"a": "b"}], "name": "taro", "status": "taro"}
    found = web._hidden(content, broken)
    assert found["attributes"] == {"mlflow.traceRequestId": "tr-1"}
    assert (found["events"], found["status"]) == ([{}], None)
    assert "taro" not in str(found) + caplog.text and "ValueError" in caplog.text


def test_refuses_when_traces_have_started_already(tracking_uri: str, otlp: OtlpReceiver) -> None:
    before = dict(os.environ)
    with mlflow.start_span("too early"):
        pass
    with pytest.raises(RuntimeError, match="before the first trace"):
        use_unified_tracer_provider()
    mlflow.tracing.reset()
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    with pytest.raises(RuntimeError, match="setup_otlp_export"):
        use_unified_tracer_provider()
    mlflow.tracing.reset()
    setup_production_tracing("early")
    with pytest.raises(RuntimeError, match="setup_production_tracing"):
        use_unified_tracer_provider()
    reset_production_tracing()
    assert "MLFLOW_USE_DEFAULT_TRACER_PROVIDER" not in {*before, *os.environ}


REBUILT = """
import mlflow, sys
from opentelemetry import propagate, trace
from opentelemetry.propagators.composite import CompositePropagator
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from chapter8_samples.opentelemetry import use_unified_tracer_provider
mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_experiment("app")
if sys.argv[2] == "own":
    trace.set_tracer_provider(TracerProvider())
use_unified_tracer_provider(lambda content: content | {"name": content["name"].upper()})
caller = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
for name in ("first", "second"):
    experiment = mlflow.set_experiment(name)
    context = propagate.extract(caller)  # リクエストが届いた
    memory = InMemorySpanExporter()
    mlflow.tracing.get_bridged_tracer_provider().add_span_processor(SimpleSpanProcessor(memory))
    tracer = trace.get_tracer("http")
    with tracer.start_as_current_span("request", context), mlflow.start_span("answer"):
        pass
    mlflow.flush_trace_async_logging()
    stored = mlflow.search_traces(locations=[experiment.experiment_id], return_type="list")
    print(sorted(span.name for one in stored for span in one.data.spans))
    print([len(span.links) for span in memory.get_finished_spans()])
mlflow.set_experiment("third")
wrapped = CompositePropagator([propagate.get_global_textmap()])  # アプリが包んだ
propagate.set_global_textmap(wrapped)
use_unified_tracer_provider()  # 設定の後でもう一度
with trace.get_tracer("startup").start_as_current_span("warm up") as warm:
    pass
print(warm.name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["own", "mlflow's"])
def test_what_makes_mlflow_rebuild_loses_neither_the_link_nor_the_masking(
    tracking_uri: str, provider: str
) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", REBUILT, tracking_uri, provider]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=90)
    twice = ["['REQUEST', 'answer']", "[0, 1]"] * 2
    assert run.stdout.splitlines() == [*twice, "WARM UP"], run.stderr


APP_PROVIDER = """
import mlflow, sys
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from chapter8_samples.opentelemetry import use_unified_tracer_provider
mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_experiment("app")
memory, own = InMemorySpanExporter(), TracerProvider()
own.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(own)
assert use_unified_tracer_provider() is own
with trace.get_tracer("app").start_as_current_span("request"), mlflow.start_span("answer"):
    pass
mlflow.flush_trace_async_logging()
print([span.name for span in memory.get_finished_spans()])
print([span.name for span in mlflow.search_traces(return_type="list")[0].data.spans])
"""


@pytest.mark.slow
def test_keeps_a_provider_the_app_has_set(tracking_uri: str) -> None:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", APP_PROVIDER, tracking_uri]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert run.stdout.splitlines() == ["['answer', 'request']", "['request', 'answer']"], run.stderr


@pytest.mark.slow
def test_says_that_tracing_is_switched_off(tracking_uri: str) -> None:
    program = """
import os
from chapter8_samples.opentelemetry import use_unified_tracer_provider
import mlflow
mlflow.tracing.disable()
try:
    use_unified_tracer_provider()
except RuntimeError as error:
    print(error, os.environ.get("MLFLOW_USE_DEFAULT_TRACER_PROVIDER"))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert run.stdout.endswith("None\n"), run.stderr
