"""8.5.2 8.3 の評価が、規約のイベント gen_ai.evaluation.result として届く。"""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import mlflow
import mlflow.genai
import pytest
from mlflow.entities import AssessmentError, Expectation, Feedback
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import (
    find_semconv_gaps,
    flush_all,
    setup_evaluation_events,
    setup_otlp_export,
)
from chapter8_samples.opentelemetry.genai import evaluation_attributes


@pytest.fixture
def logs() -> Iterator[tuple[str, list[Any]]]:
    """OTLP/HTTP のログを受け取り、(リソース、レコード)を並べる。"""
    received: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            for resource in ExportLogsServiceRequest.FromString(body).resource_logs:
                for scope in resource.scope_logs:
                    received.extend((resource.resource, record) for record in scope.log_records)
            self.send_response(200 if self.path == "/v1/logs" else 404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, {"value": 0.5}),
        (3, {"value": 3.0}),
        ("yes", {"label": "yes"}),
        (True, {"value": 1.0, "label": "true"}),
        (False, {"value": 0.0, "label": "false"}),
        (["a", "あ"], {"label": '["a", "あ"]'}),
    ],
)
def test_a_verdict_becomes_a_score_or_a_label(value: Any, expected: dict[str, Any]) -> None:
    found = evaluation_attributes(Feedback(name="safety", value=value, rationale="因は A"))
    score = {f"gen_ai.evaluation.score.{name}": one for name, one in expected.items()}
    names = {"gen_ai.evaluation.name": "safety", "gen_ai.evaluation.explanation": "因は A"}
    assert found == names | score


def test_a_judge_that_failed_and_what_is_no_verdict() -> None:
    failed = Feedback(name="safety", error=AssessmentError("RATE_LIMIT", "429"))
    assert evaluation_attributes(failed) == {
        "gen_ai.evaluation.name": "safety",
        "error.type": "RATE_LIMIT",
    }
    assert evaluation_attributes(Expectation(name="answer", value="42")) is None
    assert evaluation_attributes(Feedback(name="safety", value="no", valid=False)) is None


@pytest.mark.slow
def test_the_verdicts_of_a_trace_arrive_beside_the_span_they_judge(
    tracking_uri: str, logs: tuple[str, list[Any]]
) -> None:
    mlflow.set_experiment("judged")
    with (
        mlflow.start_span("answer") as root,
        mlflow.start_span("llm", span_type="CHAT_MODEL") as llm,
    ):
        llm.set_attribute("gen_ai.response.id", "chatcmpl-1")
    mlflow.flush_trace_async_logging()
    mlflow.log_feedback(trace_id=root.trace_id, name="safety", value="yes", rationale="無害")
    mlflow.log_feedback(trace_id=root.trace_id, name="tone", value=0.9, span_id=llm.span_id)
    mlflow.log_expectation(trace_id=root.trace_id, name="answer", value="42")
    endpoint, received = logs
    events = setup_evaluation_events(endpoint, "judge", "http/protobuf")
    assert events.emit(mlflow.get_trace(root.trace_id)) == 2
    assert events.flush()
    events.shutdown()
    by_name = {_attributes(record)["gen_ai.evaluation.name"]: record for _, record in received}
    assert {record.event_name for _, record in received} == {"gen_ai.evaluation.result"}
    assert {f"tr-{record.trace_id.hex()}" for record in by_name.values()} == {root.trace_id}
    assert by_name["safety"].span_id.hex() == root.span_id
    assert by_name["tone"].span_id.hex() == llm.span_id
    assert _attributes(by_name["tone"])["gen_ai.response.id"] == "chatcmpl-1"
    assert _attributes(by_name["safety"])["gen_ai.evaluation.explanation"] == "無害"
    assert _attributes(received[0][0])["service.name"] == "judge"


def _attributes(holder: Any) -> dict[str, Any]:
    return {
        pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in holder.attributes
    }


@pytest.mark.slow
def test_flush_tells_that_nobody_received_them(tracking_uri: str) -> None:
    mlflow.set_experiment("judged")
    with mlflow.start_span("answer") as root:
        pass
    mlflow.flush_trace_async_logging()
    mlflow.log_feedback(trace_id=root.trace_id, name="safety", value="yes")
    events = setup_evaluation_events("http://127.0.0.1:9", "judge", "http/protobuf")
    events.emit(mlflow.get_trace(root.trace_id))
    assert not events.flush(timeout_seconds=0.5)


@pytest.mark.slow
def test_a_prompt_that_the_trace_loaded_is_named_on_its_llm_span(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    mlflow.set_experiment("prompted")
    mlflow.genai.register_prompt("greeting", template="hello {{name}}")
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    with mlflow.start_span("answer", span_type="AGENT"):
        mlflow.genai.load_prompt("prompts:/greeting/1")
        with mlflow.start_span("llm", span_type="CHAT_MODEL") as llm:
            llm.set_attribute("mlflow.chat.tokenUsage", {"cache_creation_input_tokens": 9})
    flush_all()
    sent = {span.name.split()[0]: span.attributes for span in otlp.spans}
    prompt = {name: sent["chat"][f"gen_ai.prompt.{name}"] for name in ("name", "version")}
    assert prompt == {"name": "greeting", "version": "1"}
    assert "gen_ai.prompt.name" not in sent["invoke_agent"]
    assert sent["chat"]["gen_ai.usage.cache_write.input_tokens"] == 9
    assert not [gap for gap in find_semconv_gaps(sent["chat"]) if "rename" in gap]
