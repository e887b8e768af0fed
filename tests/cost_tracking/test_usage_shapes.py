"""提供元とフレームワークごとの使用量の形。根拠があれば直し、なければ足りないことを言う。"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import mlflow
import numpy as np
import pytest
from cost_tracking.llm_spans import DECEMBER, MODEL, USAGE, call, end
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import Trace

from chapter8_samples.cost_tracking import (
    CostCalculator,
    CostTracker,
    CostTracking,
    PriceTable,
    TokenUsage,
    aggregate_token_usage_from_traces,
    price_trace,
    setup_token_tracking,
    usage_by_model,
)
from chapter8_samples.cost_tracking._internals import stored_attributes
from chapter8_samples.cost_tracking.token_tracking import OTEL_NATIVE
from chapter8_samples.cost_tracking.usage.leaves import llm_calls
from chapter8_samples.cost_tracking.usage.pricing import price_spans, trace_cost

SONNET = "claude-3-5-sonnet-20241022"
FLASH = {"models": {"gemini-2.5-flash": {"input": "0.50", "output": "3.00"}}}
GEMINI = CostCalculator(PriceTable.default().with_overrides(FLASH))


def gemini(**details: int) -> Any:
    """google-genai と MLflow 3.17 が残すスパン: ツールと思考の分は、合計と出力の中にだけある。"""
    span = call("gemini-2.5-flash", None, kind="LLM")
    span.set_attribute(USAGE, {"input_tokens": 151, "output_tokens": 1089, "total_tokens": 20689})
    span.set_outputs({"usage_metadata": {"prompt_token_count": 151, **details}})
    return span


def test_gemini_tool_results_are_input_and_thoughts_are_output(costs: CostTracking) -> None:
    trace = end(gemini(tool_use_prompt_token_count=18329, thoughts_token_count=1120))
    cost = price_trace(trace, GEMINI)
    assert (cost.total_usd, cost.complete) == (Decimal("0.015867"), True)
    (item,) = usage_by_model(trace)
    assert (item.usage.input_tokens, item.usage.output_tokens) == (18480, 2209)


@pytest.mark.parametrize(
    "details", [{}, {"thoughts_token_count": 1120}, {"thoughts_token_count": 99999}]
)
def test_what_is_neither_input_nor_output_is_partial(
    tracking_uri: str, tracker: CostTracker, details: dict[str, int]
) -> None:
    from chapter8_samples.cost_tracking import setup_cost_tracking

    tracking = setup_cost_tracking(GEMINI, tracker=tracker)
    trace = end(gemini(**details))
    tracking.uninstall()
    known = Decimal("0.0033425")  # 151 x 0.50 + 1089 x 3.00、100 万トークンあたり
    cost = price_trace(trace, GEMINI)
    assert (cost.total_usd, cost.complete) == (known, False)
    assert "19449 of 20689 tokens are neither input nor output" in cost.reasons[0]
    assert trace.info.tags["cost.status"] == "partial"
    assert "19449 of 20689" in trace.info.tags["cost.reason"]
    assert trace.data.spans[0].get_attribute("cost.status") == "partial"
    total = tracker.snapshot().total
    assert (total.cost_usd, total.unpriced_requests) == (known, 1)


@pytest.mark.parametrize(
    ("details", "reason"),
    [
        ({"completion_tokens_details": {"audio_tokens": 400}}, "400 audio output tokens"),
        ({"prompt_tokens_details": {"audio_tokens": 900}}, "900 audio input tokens"),
        ({"server_tool_use": {"web_search_requests": 3}}, "3 web searches"),
        ({"server_tool_use": None, "prompt_tokens_details": {"audio_tokens": 0}}, ""),
    ],
)
def test_what_a_price_table_cannot_say_is_partial(
    costs: CostTracking, details: dict[str, Any], reason: str
) -> None:
    span = call("gpt-4o", 1000, 500)
    span.set_outputs({"usage": details})
    trace = end(span)
    cost = price_trace(trace)
    assert (cost.total_usd, cost.complete) == (Decimal("0.0075"), not reason)
    assert reason in trace.info.tags.get("cost.reason", "")
    assert trace.info.tags["cost.status"] == ("partial" if reason else "priced")


TIERS = CostCalculator(
    PriceTable.default().with_overrides(
        {"models": {"gpt-4o": {"input": "2.50", "output": "10", "service_tiers": {
            "priority": {"input": "4.25", "output": "17"}}}}}
    )
)  # fmt: skip


@pytest.mark.parametrize(
    "where",
    [
        {"outputs": {"service_tier": "priority"}, "inputs": {"service_tier": "auto"}},
        {"inputs": {"service_tier": "priority"}},
        {"attributes": {"service_tier": "priority"}},  # MLflow の OpenAI 計装が残す要求
    ],
    ids=["response", "request", "attribute"],
)
def test_the_service_tier_is_read_from_the_span(tracking_uri: str, where: dict[str, Any]) -> None:
    span = call("gpt-4o", 10**6, 100_000)
    span.set_inputs(where.get("inputs"))
    span.set_outputs(where.get("outputs"))
    span.set_attributes(where.get("attributes", {}))
    assert price_trace(end(span), TIERS).total_usd == Decimal("5.95")


@pytest.mark.parametrize(
    ("model", "outputs", "usd"),
    [
        (SONNET, {"usage": {"service_tier": "batch"}}, Decimal("2.25")),
        (SONNET, {"usage": {"service_tier": "standard"}}, Decimal("4.5")),
        (SONNET, {"usage": {"service_tier": "priority"}}, None),
        ("gpt-4o", {"service_tier": "flex"}, None),
    ],
)
def test_a_tier_without_a_price_is_unpriced_with_the_reason(
    costs: CostTracking, model: str, outputs: dict[str, Any], usd: Decimal | None
) -> None:
    span = call(model, 10**6, 100_000)
    span.set_outputs(outputs)
    trace = end(span)
    cost = price_trace(trace)
    assert cost.complete == (usd is not None)
    assert cost.total_usd == (usd or 0)
    if usd is None:
        tier = outputs.get("service_tier") or outputs["usage"]["service_tier"]
        assert trace.info.tags["cost.status"] == "unpriced"
        assert tier in trace.info.tags["cost.reason"]
        assert trace.info.tags["cost.by_model"].endswith(",null]}")


def test_a_cache_left_out_of_the_input_is_put_back(costs: CostTracking) -> None:
    """Anthropic の数え方のまま記録する計装。隣の呼び出しのコストも失わない。"""
    root = mlflow.start_span_no_context("chain", start_time_ns=DECEMBER)
    odd = call(SONNET, 5, 100, root, cache_read_input_tokens=128_955)
    trace = end(odd, call(SONNET, 1000, 100, root), root)
    want = (5 * 3 + 128_955 * Decimal("0.30") + 100 * 15) / 10**6 + Decimal("0.0045")
    assert price_trace(trace).total_usd == want
    assert (trace.info.tags["cost.status"], costs.failed) == ("priced", 0)


def test_a_total_that_includes_the_cache_tells_the_shape(tracking_uri: str) -> None:
    span = call("gpt-4o", None)
    span.set_attribute(
        USAGE,
        {"input_tokens": 200, "output_tokens": 10, "total_tokens": 1210,
         "cache_read_input_tokens": 1000},
    )  # fmt: skip
    (item,) = usage_by_model(end(span))
    assert (item.usage.input_tokens, item.usage.cache_read_tokens) == (1200, 1000)


def strands(cache_on: str) -> Trace:
    """Strands のスパン: OpenTelemetry が作り、MLflow は子のスパンのキャッシュを読み残す。"""
    cached = {"cache_read_input_tokens": 90_000}
    root = call(None, 100_000, 100, kind="AGENT", **(cached if cache_on == "parent" else {}))
    child = call(SONNET, 100_000, 100, root)
    if cache_on == "attribute":
        child.set_attributes(
            {"gen_ai.usage.total_tokens": 100_100, "gen_ai.usage.cache_read_input_tokens": 90_000}
        )
    return end(child, root)


@pytest.mark.parametrize("cache_on", ["parent", "attribute"])
def test_the_cache_figures_of_an_otel_native_parent_count(tracking_uri: str, cache_on: str) -> None:
    cost = price_trace(strands(cache_on))
    want = (10_000 * 3 + 90_000 * Decimal("0.30") + 100 * 15) / 10**6
    assert (cost.total_usd, cost.complete) == (want, True)


def test_the_cache_of_a_parent_is_shared_by_its_children(tracking_uri: str) -> None:
    root = call(None, 2000, 200, kind="AGENT", cache_read_input_tokens=1500)
    children = [call(SONNET, 1000, 100, root) for _ in range(2)]
    cost = price_trace(end(*children, root))
    assert cost.total_usd == (500 * 3 + 1500 * Decimal("0.30") + 200 * 15) / 10**6
    assert cost.complete


def test_a_running_total_of_an_agent_is_not_a_missing_call(tracking_uri: str) -> None:
    """Strands のエージェントのスパンには、前のトレースまでの分が足されている。"""
    root = call(None, 2000, 200, kind="AGENT")
    root.set_attribute("gen_ai.usage.total_tokens", 2200)
    assert price_trace(end(call(SONNET, 1000, 100, root), root)).complete


def test_spans_that_the_processor_never_sees(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(mlflow, "strands", Mock(), raising=False)
    monkeypatch.setattr(mlflow, "openai", Mock(), raising=False)
    tracking = setup_token_tracking(("openai", "strands"))
    assert tracking.unseen == ("strands",)
    assert "spans of ('strands',) get no cost when they end; use price_trace()" in caplog.text
    assert tracking.costs is not None
    tracking.costs.uninstall()
    mlflow.set_experiment("unseen")  # ここからのスパンは、コストの記録を通らない
    trace = end(call("gpt-4o", 1000, 500))
    assert price_trace(trace).total_usd == Decimal("0.0075")
    assert aggregate_token_usage_from_traces("unseen").traces_partly_priced == 1


def test_the_attributes_of_this_mlflow_are_json_texts(tracking_uri: str) -> None:
    """``_internals`` の約束。MLflow 3.17.2 で、終わる前のスパンも、保存したスパンも同じ形。"""
    open_span = call("gpt-4o", 10, 5)
    for span in (open_span, end(open_span).data.spans[0]):
        stored = stored_attributes(span)
        assert stored[MODEL] == '"gpt-4o"'
        assert json.loads(stored[USAGE]) == span.get_attribute(USAGE)
        stored.clear()  # 写しである
        assert span.get_attribute(MODEL) == "gpt-4o"


@pytest.mark.parametrize(
    "usage",
    [
        {"input_tokens": True, "output_tokens": 5},
        {"input_tokens": "ten", "output_tokens": 5},
        {"input_tokens": 10, "output_tokens": "5.5"},
        {"input_tokens": 10, "output_tokens": 5.5},
        {"input_tokens": 10, "output_tokens": 5, "cache_read_input_tokens": [3]},
    ],
)
def test_counts_that_are_no_integers_are_not_read_as_numbers(
    costs: CostTracking, usage: dict[str, Any]
) -> None:
    span = call("gpt-4o", None)
    span.set_attribute(USAGE, usage)
    trace = end(span)
    assert trace.info.tags["cost.status"] == "missing_usage"
    assert "must be an integer, got" in trace.info.tags["cost.reason"]
    assert price_trace(trace).total_usd == 0
    assert costs.priced == 0


@pytest.mark.parametrize("number", [float, np.int64])
def test_whole_numbers_count_in_the_form_that_mlflow_stores(
    costs: CostTracking, number: Callable[[int], Any]
) -> None:
    """小数は小数のまま、numpy の整数は文字列で残る。"""
    span = call("gpt-4o", None)
    span.set_attribute(USAGE, {"input_tokens": number(1000), "output_tokens": number(500)})
    assert price_trace(end(span)).total_usd == Decimal("0.0075")
    assert costs.priced == 1


def test_the_otel_native_integrations_of_this_mlflow_are_known() -> None:
    """MLflow 3.17.2 で、スパンを OpenTelemetry のプロセッサーから作る計装。"""
    flavors = Path(mlflow.__file__).parent.glob("*/autolog.py")
    native = {
        flavor.parent.name
        for flavor in flavors
        if "(SimpleSpanProcessor)" in flavor.read_text(encoding="utf-8")
    }
    assert native == set(OTEL_NATIVE)


def test_a_call_that_the_processor_never_saw_is_in_the_sums_of_its_trace(
    costs: CostTracking,
) -> None:
    root = mlflow.start_span_no_context("handler", start_time_ns=DECEMBER)
    calls = [call("gpt-4o", 1000, 500, root), call("gpt-4o-mini", 1000, 0, root)]
    vars(calls[1])["_span"].end()  # OpenTelemetry が直接終わらせる
    trace = end(calls[0], root)
    assert set(price_trace(trace).by_model) == {"gpt-4o", "gpt-4o-mini"}
    assert (trace.info.cost or {})["total_cost"] == 0.00765
    assert costs.priced == 1


def test_tokens_of_a_rollup_without_a_call_are_named(
    costs: CostTracking, tracker: CostTracker
) -> None:
    root = call(None, 3000, 300, kind="AGENT")
    trace = end(call("gpt-4o", 1000, 100, root), root)
    cost = price_trace(trace)
    assert (cost.total_usd, cost.complete) == (Decimal("0.0035"), False)
    (reason,) = cost.reasons
    assert "'input_tokens': 2000, 'output_tokens': 200" in reason
    assert "of span 'call' are in no call below it" in reason
    assert trace.info.tags["cost.status"] == "partial"
    assert reason == trace.info.tags["cost.reason"]
    models = {item.model: item.usage.total_tokens for item in usage_by_model(trace)}
    assert models == {"(unattributed)": 2200, "gpt-4o": 1100}
    assert tracker.snapshot().total.requests == 1


def test_a_rollup_that_reports_only_a_total_is_compared_too(tracking_uri: str) -> None:
    root = call(None, None, kind="AGENT")
    root.set_attribute(USAGE, {"total_tokens": 3300})
    cost = price_trace(end(call("gpt-4o", 1000, 100, root), root))
    assert (cost.total_usd, cost.complete) == (Decimal("0.0035"), False)
    assert "{'total_tokens': 2200} of span 'call' are in no call below it" in cost.reasons[0]


@pytest.mark.parametrize("mark", ["attribute", "message", "chain"])
def test_an_answer_from_the_cache_of_a_framework_is_free(costs: CostTracking, mark: str) -> None:
    """LangChain の InMemoryCache。MLflow 3.17.2 と langchain-core 1.8.3 が残すスパンの形。"""
    free = {"usage_metadata": {"input_tokens": 1000, "total_cost": 0}}
    root = mlflow.start_span_no_context("chain", "CHAIN", start_time_ns=DECEMBER)
    root.set_outputs(free if mark == "chain" else "はい")
    hit = call("gpt-4o", 1000, 500, root)
    hit.set_attribute("mlflow.message.format", "langchain")
    if mark == "attribute":
        hit.set_attribute("cost.status", "cache_hit")
    if mark == "message":
        hit.set_outputs({"generations": [[{"message": free}]]})
    trace = end(hit, root)
    cost = price_trace(trace)
    assert (cost.total_usd, cost.complete) == (0, True)
    assert trace.info.tags["cost.by_model"] == '{"gpt-4o":[1,1000,500,"0"]}'
    assert (trace.info.cost or {})["total_cost"] == 0
    if mark != "chain":  # チェーンが終わるまでは、キャッシュから答えたと分からない
        status = {s.span_id: s.get_attribute("cost.status") for s in trace.data.spans}
        assert (status[hit.span_id], costs.counts["cache_hit"]) == ("cache_hit", 1)


def test_only_the_answer_of_a_chain_came_from_its_cache(tracking_uri: str) -> None:
    """言い換えてから答えるチェーン。印は最後の答えのもので、言い換えは本当に呼んでいる。"""
    root = mlflow.start_span_no_context("chain", "CHAIN", start_time_ns=DECEMBER)
    root.set_outputs({"usage_metadata": {"total_cost": 0}})
    calls = [call("gpt-4o", 1000, 500, root), call("gpt-4o-mini", 1000, 500, root)]
    for span in calls:
        span.set_attribute("mlflow.message.format", "langchain")
    cost = price_trace(end(*calls, root))
    assert (cost.by_model, cost.complete) == ({"gpt-4o": Decimal("0.0075"), "gpt-4o-mini": 0}, True)


def test_a_cached_answer_without_usage_is_free_too(costs: CostTracking) -> None:
    span = call("gpt-4o", None)
    span.set_attribute("cost.status", "cache_hit")
    trace = end(span)
    assert (price_trace(trace).complete, costs.counts["cache_hit"]) == (True, 1)
    assert trace.info.tags["cost.status"] == "priced"


class FakeSpan:
    """性質のテストで何千も作るので、本物のスパンの代わりに、読まれる項目だけを持つ。"""

    name, start_time_ns = "x", DECEMBER

    def __init__(self, number: int, model: str, usage: dict[str, Any]) -> None:
        self.span_id, self.parent_id = str(number), str((number - 1) // 2) if number else None
        self.status = Mock(status_code=Mock(value="OK"))

        stored = {"mlflow.spanType": "CHAT_MODEL", MODEL: model, USAGE: usage}
        self._span = SimpleNamespace(attributes={k: json.dumps(v) for k, v in stored.items()})

    def get_attribute(self, key: str) -> Any:
        return None


COUNTS = st.one_of(st.none(), st.integers(-5, 10**6), st.floats(), st.text(max_size=3))
KEYS = ("input_tokens", "output_tokens", "total_tokens", "cache_read_input_tokens",
        "cache_creation_input_tokens", "cache_creation_input_tokens_above_1hr")  # fmt: skip
CALLS = st.tuples(
    st.sampled_from(["gpt-4o", SONNET]), st.dictionaries(st.sampled_from(KEYS), COUNTS)
)


@given(st.lists(CALLS, max_size=6))
def test_no_usage_stops_the_pricing_of_a_trace(items: list[tuple[str, dict[str, Any]]]) -> None:
    spans: Any = [FakeSpan(number, *item) for number, item in enumerate(items)]
    cost = trace_cost(price_spans(spans, CostCalculator()))
    assert cost.total_usd.is_finite()
    assert cost.total_usd >= 0


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**5)), min_size=1, max_size=6))
def test_every_reported_token_is_counted_once(items: list[tuple[int, int]]) -> None:
    """どんな入れ子でも、いちばん多く報告したところまでが、ちょうど 1 回ずつ数えられる。"""
    usages = [{"input_tokens": i, "output_tokens": o, "total_tokens": i + o} for i, o in items]
    spans: Any = [FakeSpan(number, "gpt-4o", usage) for number, usage in enumerate(usages)]

    def most(number: int) -> tuple[int, int]:
        children = [most(child) for child in (2 * number + 1, 2 * number + 2) if child < len(items)]
        below = [sum(child[side] for child in children) for side in (0, 1)]
        return max(items[number][0], below[0]), max(items[number][1], below[1])

    found = sum((call.usage for call in llm_calls(spans) if call.usage), TokenUsage())
    assert (found.input_tokens, found.output_tokens) == most(0)


def test_a_span_without_a_call_leaves_the_totals_alone(costs: CostTracking) -> None:
    """検索のスパン。ルートより後に終わっても、先に終わっても、合計は呼び出しの分だけ。"""
    root = mlflow.start_span_no_context("handler", start_time_ns=DECEMBER)
    early = mlflow.start_span_no_context("search", "RETRIEVER", parent_span=root)
    late = mlflow.start_span_no_context("search", "RETRIEVER", parent_span=root)
    trace = end(early, call("gpt-4o", 1000, 500, root), root, late)
    assert trace.info.tags["cost.by_model"] == '{"gpt-4o":[1,1000,500,"0.0075"]}'
    assert (trace.info.cost or {})["total_cost"] == 0.0075
    assert (costs.counts, costs.failed) == ({"priced": 1}, 0)


@pytest.mark.parametrize("counts", [("18329", 1120), ([5], None)])
def test_counts_of_another_type_in_the_answer_stop_nothing(
    costs: CostTracking, counts: tuple[Any, Any]
) -> None:
    details = {"tool_use_prompt_token_count": counts[0], "thoughts_token_count": counts[1]}
    trace = end(gemini(**details))
    assert "19449 of 20689" in price_trace(trace, GEMINI).reasons[0]
    assert costs.failed == 0
