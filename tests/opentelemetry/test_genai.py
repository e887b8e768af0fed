"""8.5.2 GenAI セマンティック規約とメトリクス。"""

from __future__ import annotations

import inspect
import os
import re
import threading
import time
from typing import Any

import mlflow
import mlflow.tracing
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import SpanEvent
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
from chapter8_samples.opentelemetry.genai import RENAMED, SEMCONV_VERSION
from chapter8_samples.opentelemetry.genai.metrics import SECOND_BUCKETS, TOKEN_BUCKETS

# semantic-conventions-genai 0.1.0 で変わった名前(docs/gen-ai/non-normative/migration.md)。Python の
# 定数は 1.41 で凍結されているので、これらだけは、そこにない
NEW = {
    "gen_ai.usage.cache_write.input_tokens",
    "gen_ai.prompt.version",
    "gen_ai.retrieval.top_k",
    "gen_ai.token.modality",
}
FROZEN = {
    v
    for module in (gen_ai_attributes, error_attributes)
    for v in vars(module).values()
    if isinstance(v, str)
}
INFERENCE = "gen_ai.client.inference"


def test_every_name_is_in_the_published_convention() -> None:
    assert SEMCONV_VERSION == "0.1.0"
    assert set(GENAI_SEMANTIC_CONVENTIONS) - FROZEN == NEW
    new = {name for name in RENAMED.values() if not name.startswith("openai.")}
    assert new <= set(GENAI_SEMANTIC_CONVENTIONS)
    assert not set(RENAMED) & set(GENAI_SEMANTIC_CONVENTIONS)
    assert set(RENAMED) <= FROZEN


def test_the_table_has_every_rename_of_the_published_constants() -> None:
    text = inspect.getsource(gen_ai_attributes)
    renames = re.findall(
        r'Final = "(gen_ai\.[^"]+)"\n"""\n?Deprecated: Replaced by `([^`]+)`', text
    )
    assert len(renames) > 3
    assert set(renames) <= set(RENAMED.items())


@pytest.mark.parametrize(
    ("attributes", "advice"),
    [
        (
            {"gen_ai.usage.cache_creation.input_tokens": 5},
            "rename gen_ai.usage.cache_creation.input_tokens to "
            "gen_ai.usage.cache_write.input_tokens",
        ),
        (
            {"gen_ai.client.operation.duration": 0.5},
            f"rename gen_ai.client.operation.duration to {INFERENCE}.duration",
        ),
        (
            {"gen_ai.operation.name": "retrieval", "gen_ai.request.top_k": 5},
            "rename gen_ai.request.top_k to gen_ai.retrieval.top_k",
        ),
        (
            {"gen_ai.client.operation.time_to_first_chunk": 0.5},
            "rename gen_ai.client.operation.time_to_first_chunk to "
            f"{INFERENCE}.time_to_first_chunk",
        ),
        ({"gen_ai.token.type": "input"}, "remove gen_ai.token.type: the metric's name tells"),
        ({"gen_ai.prompt.version": 3}, "gen_ai.prompt.version is int, not str"),
    ],
)
def test_old_names_are_named_with_the_new_one(attributes: dict[str, Any], advice: str) -> None:
    assert any(gap.startswith(advice) for gap in find_semconv_gaps(attributes))


def test_the_token_histogram_became_several_metrics_and_embeddings_keep_their_duration() -> None:
    (gap,) = [g for g in find_semconv_gaps({"gen_ai.client.token.usage": 1}) if "rename" in g]
    for name in ("usage.input_tokens", "usage.cache_write.input_tokens", "operation.output_tokens"):
        assert f"{INFERENCE}.{name}" in gap
    embedding = {"gen_ai.operation.name": "embeddings", "gen_ai.client.operation.duration": 1}
    assert not [gap for gap in find_semconv_gaps(embedding) if "rename" in gap]
    chat = {"gen_ai.operation.name": "chat", "gen_ai.request.top_k": 5}
    assert not [gap for gap in find_semconv_gaps(chat) if "rename" in gap]


NAMES = st.sampled_from([*GENAI_SEMANTIC_CONVENTIONS, *RENAMED])


@given(st.dictionaries(NAMES, st.integers()))
def test_following_the_advice_leaves_no_old_name(attributes: dict[str, int]) -> None:
    for gap in find_semconv_gaps(attributes):
        if old_and_new := re.fullmatch("rename (.*) to (.*)", gap):
            attributes[old_and_new[2]] = attributes.pop(old_and_new[1])
    assert not [gap for gap in find_semconv_gaps(attributes) if gap.startswith("rename")]


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
    setup_otlp_export(otlp.grpc_endpoint, "bot", mode="otlp_only")
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
    assert head == f"規約 0.1.0: {len(lines)} 属性"
    assert [line.split()[0] for line in lines] == list(GENAI_SEMANTIC_CONVENTIONS)


def test_buckets_are_those_of_the_convention() -> None:
    tokens = "1 4 16 64 256 1024 4096 16384 65536 262144 1048576 4194304 16777216 67108864"
    seconds = "0.01 0.02 0.04 0.08 0.16 0.32 0.64 1.28 2.56 5.12 10.24 20.48 40.96 81.92"
    assert [int(bound) for bound in tokens.split()] == TOKEN_BUCKETS
    assert [float(bound) for bound in seconds.split()] == SECOND_BUCKETS


LABELS = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "gpt-4o",
}
OLD = {"gen_ai.client.operation.duration", "gen_ai.client.token.usage"}


def call(kind: str = "CHAT_MODEL", **usage: int) -> None:
    with mlflow.start_span("llm", span_type=kind) as llm:
        llm.set_attribute("mlflow.llm.model", "gpt-4o")
        llm.set_attribute("mlflow.llm.provider", "openai")
        llm.set_attribute("mlflow.chat.tokenUsage", usage)


def points_of(otlp: OtlpReceiver) -> dict[str, list[dict[str, Any]]]:
    return {metric.name: metric.points for metric in otlp.metrics}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("names", ["new", "both"])
def test_metrics_count_every_llm_span(
    tracking_uri: str, otlp: OtlpReceiver, protocol: str, names: str
) -> None:
    seen: list[str] = []
    mlflow.tracing.configure(span_processors=[lambda span: seen.append(span.name)])
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    metrics = setup_genai_metrics(endpoint, "bot", protocol, names=names)
    for number in (1, 2, 3):
        with mlflow.start_span("root", span_type="AGENT"):
            call(
                input_tokens=100 * number,
                output_tokens=20,
                cache_read_input_tokens=30,
                cache_creation_input_tokens=5,
                reasoning_output_tokens=4,
            )
    with pytest.raises(TimeoutError), mlflow.start_span("llm", span_type="CHAT_MODEL"):
        raise TimeoutError("slow")
    assert metrics.flush()
    metrics.shutdown()
    with mlflow.start_span("after", span_type="CHAT_MODEL"):
        pass
    points = points_of(otlp)
    expected = {"input_tokens": 600, "output_tokens": 60, "cache_read.input_tokens": 90}
    expected |= {"cache_write.input_tokens": 15, "reasoning.output_tokens": 12}
    for kind, total in expected.items():
        (point,) = points[f"{INFERENCE}.usage.{kind}"]
        assert (point["value"], point["attributes"]) == (
            total,
            LABELS | {"gen_ai.token.modality": "unknown"},
        )
    (point,) = points[f"{INFERENCE}.operation.input_tokens"]
    assert (point["count"], point["sum"], point["attributes"]) == (3, 600, LABELS)
    calls = {p["attributes"].get("error.type"): p for p in points[f"{INFERENCE}.duration"]}
    assert calls[None]["attributes"] == LABELS and calls[None]["count"] == 3
    assert calls["TimeoutError"]["count"] == 1
    assert OLD & set(points) == (OLD if names == "both" else set())
    if names == "both":
        kinds = {
            p["attributes"]["gen_ai.token.type"]: p for p in points["gen_ai.client.token.usage"]
        }
        assert (kinds["input"]["count"], kinds["input"]["sum"]) == (3, 600)
        assert (kinds["output"]["count"], kinds["output"]["sum"]) == (3, 60)
        assert sum(p["count"] for p in points["gen_ai.client.operation.duration"]) == 4
    assert {m.unit for m in otlp.metrics} == {"s", "{token}"}
    assert otlp.metrics[0].resource["service.name"] == "bot"
    assert seen.count("llm") == 4 and "after" in seen


def test_embeddings_keep_the_names_that_nothing_replaces(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    metrics = setup_genai_metrics(otlp.http_endpoint, "bot", "http/protobuf")
    call("EMBEDDING", input_tokens=7)
    assert metrics.flush()
    metrics.shutdown()
    points = points_of(otlp)
    assert set(points) == OLD
    assert points["gen_ai.client.token.usage"][0]["sum"] == 7


def test_time_to_the_first_chunk_and_per_output_chunk(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    """8.1 の traced_stream が残す属性からと、autolog の断片のイベントから。"""
    metrics = setup_genai_metrics(otlp.http_endpoint, "bot", "http/protobuf")
    with mlflow.start_span("stream") as stream:  # 種類のないスパン
        stream.set_attribute("gen_ai.response.time_to_first_chunk", 0.25)
        stream.set_attribute("stream.chunks", 5)
    with mlflow.start_span("llm", span_type="CHAT_MODEL") as llm:
        for index, milliseconds in enumerate((100, 140, 200)):
            moment = llm.start_time_ns + milliseconds * 1_000_000
            llm.add_event(SpanEvent(f"mlflow.chunk.item.{index}", timestamp=moment))
    call(input_tokens=1)
    assert metrics.flush()
    metrics.shutdown()
    points = points_of(otlp)
    (first,) = points[f"{INFERENCE}.time_to_first_chunk"]
    assert (first["count"], first["sum"]) == (2, pytest.approx(0.35))
    (following,) = points[f"{INFERENCE}.time_per_output_chunk"]
    assert (following["count"], following["sum"]) == (6, pytest.approx(0.1))


def test_flush_tells_that_nobody_received_it(tracking_uri: str, otlp: OtlpReceiver) -> None:
    metrics = setup_genai_metrics(otlp.http_endpoint, "bot", "http/protobuf")
    with mlflow.start_span("llm", span_type="CHAT_MODEL"):
        pass
    otlp.fail_next(1, 401)
    assert not metrics.flush()
    assert metrics.flush()
    metrics.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_metrics_are_sent_sends_its_own(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    metrics = setup_genai_metrics(otlp.http_endpoint, "bot", "http/protobuf")
    call(input_tokens=1)
    otlp.delay_seconds = 1
    sending = threading.Thread(target=metrics.flush)
    sending.start()
    time.sleep(0.5)
    child = os.fork()
    if child == 0:
        os._exit(0 if metrics.flush(5) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    sending.join()
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
    with pytest.raises(ValueError, match="no scheme"):
        setup_genai_metrics("collector:4317", "bot")
    with pytest.raises(ValueError, match="http/json"):
        setup_genai_metrics("http://collector:4317", "bot", "http/json")
    with pytest.raises(ValueError, match="names 'old'"):
        setup_genai_metrics("http://collector:4317", "bot", names="old")


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
    found = [m.points for m in otlp.metrics if m.name == f"{INFERENCE}.duration"]
    assert found[-1][0]["count"] == 1
