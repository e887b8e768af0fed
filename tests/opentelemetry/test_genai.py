"""8.5.2 GenAI セマンティック規約とメトリクス。"""

from __future__ import annotations

import threading
import time

import mlflow
import mlflow.tracing
import pytest
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.semconv.attributes import error_attributes

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import (
    GENAI_SEMANTIC_CONVENTIONS,
    GenAIMetrics,
    find_semconv_gaps,
    flush_all,
    print_semantic_conventions,
    setup_genai_metrics,
    setup_otlp_export,
)
from chapter8_samples.opentelemetry.genai.metrics import SECOND_BUCKETS, TOKEN_BUCKETS
from chapter8_samples.opentelemetry.genai.semconv import RENAMED

KNOWN = {
    v
    for module in (gen_ai_attributes, error_attributes)
    for v in vars(module).values()
    if isinstance(v, str)
}


def test_every_name_is_in_the_published_convention() -> None:
    assert set(GENAI_SEMANTIC_CONVENTIONS) <= KNOWN
    assert set(RENAMED.values()) <= set(GENAI_SEMANTIC_CONVENTIONS)
    assert not set(RENAMED) & set(GENAI_SEMANTIC_CONVENTIONS)


@pytest.mark.parametrize(
    ("attributes", "gaps"),
    [
        ({}, ["missing gen_ai.operation.name"]),
        (
            {"gen_ai.system": "openai"},
            ["missing gen_ai.operation.name", "rename gen_ai.system to gen_ai.provider.name"],
        ),
        ({"gen_ai.operation.name": "RETRIEVER"}, []),
        ({"gen_ai.operation.name": "execute_tool"}, ["missing gen_ai.tool.name"]),
        (
            {"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": ""},
            ["missing gen_ai.tool.name"],
        ),
        (
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.system": "openai",
                "gen_ai.request.model": "m",
                "gen_ai.usage.input_tokens": "12",
                "gen_ai.usage.output_tokens": 3,
            },
            [
                "rename gen_ai.system to gen_ai.provider.name",
                "gen_ai.usage.input_tokens is str, not int",
            ],
        ),
        (
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "openai",
                "gen_ai.request.model": "m",
                "error.type": "TimeoutError",
            },
            [],
        ),
    ],
)
def test_gaps(attributes: dict[str, object], gaps: list[str]) -> None:
    assert find_semconv_gaps(attributes) == gaps


def test_a_span_as_mlflow_translates_it_has_no_gap(tracking_uri: str, otlp: OtlpReceiver) -> None:
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    with mlflow.start_span("llm", span_type="CHAT_MODEL") as llm:
        llm.set_attribute("mlflow.llm.model", "gpt-4o-mini")
        llm.set_attribute("mlflow.llm.provider", "openai")
        llm.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 120, "output_tokens": 20})
    flush_all()
    (span,) = otlp.spans
    assert span.name == "chat gpt-4o-mini"
    assert find_semconv_gaps(span.attributes) == []


def test_the_list_shows_every_name_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_semantic_conventions()
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "規約 1.41.1: 22 属性"
    assert [line.split()[0] for line in lines] == list(GENAI_SEMANTIC_CONVENTIONS)


def test_buckets_are_those_of_the_convention() -> None:
    tokens = "1 4 16 64 256 1024 4096 16384 65536 262144 1048576 4194304 16777216 67108864"
    seconds = "0.01 0.02 0.04 0.08 0.16 0.32 0.64 1.28 2.56 5.12 10.24 20.48 40.96 81.92"
    assert [int(bound) for bound in tokens.split()] == TOKEN_BUCKETS
    assert [float(bound) for bound in seconds.split()] == SECOND_BUCKETS


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_metrics_count_every_llm_span(tracking_uri: str, otlp: OtlpReceiver, protocol: str) -> None:
    seen: list[str] = []
    mlflow.tracing.configure(span_processors=[lambda span: seen.append(span.name)])
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    metrics = setup_genai_metrics(endpoint, "bot", protocol)
    for number in (1, 2, 3):
        with (
            mlflow.start_span("root", span_type="AGENT"),
            mlflow.start_span("llm", span_type="CHAT_MODEL") as llm,
        ):
            llm.set_attribute("mlflow.llm.model", "gpt-4o")
            llm.set_attribute("mlflow.llm.provider", "openai")
            llm.set_attribute(
                "mlflow.chat.tokenUsage", {"input_tokens": 100 * number, "output_tokens": 20}
            )
    with pytest.raises(TimeoutError), mlflow.start_span("llm", span_type="CHAT_MODEL"):
        raise TimeoutError("slow")
    assert metrics.flush()
    metrics.shutdown()
    with mlflow.start_span("after", span_type="CHAT_MODEL"):
        pass
    points = {m.name: m.points for m in otlp.metrics}
    labels = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o",
    }
    tokens = {p["attributes"]["gen_ai.token.type"]: p for p in points["gen_ai.client.token.usage"]}
    assert (tokens["input"]["count"], tokens["input"]["sum"]) == (3, 600)
    assert (tokens["output"]["count"], tokens["output"]["sum"]) == (3, 60)
    calls = {
        p["attributes"].get("error.type"): p for p in points["gen_ai.client.operation.duration"]
    }
    assert calls[None]["attributes"] == labels and calls[None]["count"] == 3
    assert calls["TimeoutError"]["count"] == 1
    assert {m.unit for m in otlp.metrics} == {"s", "{token}"}
    assert otlp.metrics[0].resource["service.name"] == "bot"
    assert seen.count("llm") == 4 and "after" in seen


def test_flush_tells_that_nobody_received_it(tracking_uri: str, otlp: OtlpReceiver) -> None:
    metrics = setup_genai_metrics(otlp.http_endpoint, "bot", "http/protobuf")
    with mlflow.start_span("llm", span_type="CHAT_MODEL"):
        pass
    otlp.fail_next(1, 401)
    assert not metrics.flush()
    assert metrics.flush()
    metrics.shutdown()


def test_flush_keeps_its_deadline() -> None:
    answered = threading.Event()

    class Hanging:
        def force_flush(self) -> bool:
            return answered.wait(20)

    metrics = GenAIMetrics(Hanging(), None, [])  # type: ignore[arg-type]
    started = time.monotonic()
    assert not metrics.flush(timeout_seconds=0.05)
    assert time.monotonic() - started < 5
    answered.set()


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="needs http"):
        setup_genai_metrics("collector:4317", "bot")
    with pytest.raises(ValueError, match="http/json"):
        setup_genai_metrics("http://collector:4317", "bot", "http/json")


def test_nothing_is_counted_twice(tracking_uri: str, otlp: OtlpReceiver) -> None:
    first = setup_genai_metrics(otlp.http_endpoint, "bot", "http/protobuf")
    with pytest.raises(RuntimeError, match=r"shutdown\(\)"):
        setup_genai_metrics(otlp.http_endpoint, "bot", "http/protobuf")
    first.shutdown()
    again = setup_genai_metrics(otlp.http_endpoint, "bot", "http/protobuf")
    with mlflow.start_span("llm", span_type="CHAT_MODEL"):
        pass
    assert again.flush()
    again.shutdown()
    found = [m.points for m in otlp.metrics if m.name == "gen_ai.client.operation.duration"]
    assert found[-1][0]["count"] == 1
