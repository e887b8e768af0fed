"""トレースへのコストの記録: 本物の openai SDK、入れ子、ストリーム、スレッド、失敗。"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from unittest.mock import Mock

import mlflow
import pytest
from cost_tracking.llm_spans import DECEMBER, MODEL, USAGE, call, end, total_cost

from chapter8_samples.cost_tracking import (
    CostCalculator,
    CostTracker,
    CostTracking,
    ExperimentNotFoundError,
    PriceTable,
    TokenUsage,
    TraceNotFoundError,
    aggregate_token_usage_from_traces,
    get_token_usage_from_trace,
    price_trace,
    setup_cost_tracking,
    setup_token_tracking,
    usage_by_model,
)
from chapter8_samples.cost_tracking.usage.leaves import llm_calls
from chapter8_samples.cost_tracking.usage.reader import find_experiment_id, iter_traces
from chapter8_samples.cost_tracking.usage.summary import sampling_weight


def test_a_priced_span_is_stored_with_its_source(costs: CostTracking) -> None:
    trace = end(call("gpt-4o-mini-2024-07-18", 1200, 300, cache_read_input_tokens=1024))
    span = trace.data.spans[0]
    assert span.get_attribute("mlflow.llm.cost") == {
        "input_cost": 0.0001032, "output_cost": 0.00018, "total_cost": 0.0002832,
    }  # fmt: skip
    assert span.get_attribute("cost.status") == "priced"
    assert span.get_attribute("cost.price_source") == "2024-12/gpt-4o-mini"
    assert total_cost(trace) == pytest.approx(0.0002832)
    assert trace.info.tags["cost.status"] == "priced"
    assert (costs.priced, costs.unpriced, costs.failed) == (1, 0, 0)


def test_the_price_of_the_day_of_the_call_is_used(costs: CostTracking) -> None:
    old = mlflow.start_span_no_context(
        "call",
        "CHAT_MODEL",
        start_time_ns=int(datetime(2024, 12, 2, tzinfo=timezone.utc).timestamp() * 1e9),
    )
    old.set_attribute(MODEL, "claude-3-5-haiku-20241022")
    old.set_attribute(USAGE, {"input_tokens": 10**6, "output_tokens": 0, "total_tokens": 10**6})
    assert total_cost(end(old)) == 1.0


@pytest.mark.slow
def test_unknown_models_are_visible_and_warned_once(
    costs: CostTracking, tracker: CostTracker, caplog: pytest.LogCaptureFixture
) -> None:
    trace = [end(call("my-private-model", 1000, 500)) for _ in range(3)][-1]
    assert trace.data.spans[0].get_attribute("cost.status") == "unpriced"
    assert trace.data.spans[0].get_attribute("mlflow.llm.cost") is None
    assert total_cost(trace) is None
    assert trace.info.tags["cost.status"] == "unpriced"
    (warning,) = [r.getMessage() for r in caplog.records if "unpriced" in r.getMessage()]
    assert "no price for model 'my-private-model'" in warning
    assert warning.endswith(trace.info.tags["cost.reason"].partition(": ")[2])
    assert costs.unpriced_models == {"my-private-model": 3}
    assert tracker.snapshot().total.unpriced_requests == 3
    assert tracker.snapshot().total.cost_usd == 0


def test_double_instrumentation_is_counted_once(costs: CostTracking, tracker: CostTracker) -> None:
    """LangChain の ChatOpenAI > (使用量のないスパン) > OpenAI の Completions。"""
    root = mlflow.start_span_no_context("agent", start_time_ns=DECEMBER)
    outer = call("gpt-4o", 1200, 300, root)
    between = mlflow.start_span_no_context("retry", parent_span=outer, start_time_ns=DECEMBER)
    inner = call("gpt-4o-2024-08-06", 1200, 300, between, cache_read_input_tokens=1024)
    trace = end(inner, between, outer, root)

    assert costs.priced == 1
    assert tracker.snapshot().total.cost_usd == Decimal("0.00472")
    assert total_cost(trace) == pytest.approx(0.00472)
    spans = {span.span_id: span for span in trace.data.spans}
    assert spans[outer.span_id].get_attribute("cost.status") == "rollup"
    outer_cost = spans[outer.span_id].get_attribute("mlflow.llm.cost") or {}
    assert outer_cost["total_cost"] == 0.00472
    assert [c.model for c in llm_calls(trace.data.spans)] == ["gpt-4o-2024-08-06"]
    assert price_trace(trace).total_usd == Decimal("0.00472")


def test_a_parent_that_sums_different_models(costs: CostTracking) -> None:
    root = call(None, 2000, 200, kind="AGENT")
    trace = end(call("gpt-4o", 1000, 100, root), call("gpt-4o-mini", 1000, 100, root), root)
    want = Decimal("0.0035") + Decimal("0.00021")
    assert total_cost(trace) == pytest.approx(float(want))
    assert price_trace(trace).total_usd == want
    assert get_token_usage_from_trace(trace) == TokenUsage(
        input_tokens=2000, output_tokens=200, total_tokens=2200
    )


def test_a_mixed_trace_says_it_is_partial(costs: CostTracking) -> None:
    root = mlflow.start_span_no_context("chain", start_time_ns=DECEMBER)
    trace = end(call("gpt-4o", 1000, 500, root), call("my-model", 1, 1, root), root)
    assert trace.info.tags["cost.status"] == "partial"
    cost = price_trace(trace)
    assert (cost.total_usd, cost.complete) == (Decimal("0.0075"), False)
    assert cost.unpriced_models == ("my-model",)
    prices = {"models": {"my-model": {"input": 1, "output": 1}}}
    table = PriceTable.default().with_overrides(prices)
    assert price_trace(trace.info.trace_id) == cost
    again = price_trace(trace, CostCalculator(table))
    assert (again.total_usd, again.complete) == (Decimal("0.007502"), True)


def test_missing_usage_is_not_zero(costs: CostTracking) -> None:
    trace = end(call("gpt-4o", None))
    assert get_token_usage_from_trace(trace) is None
    assert trace.info.tags["cost.status"] == "missing_usage"
    assert (costs.missing_usage, costs.priced) == (1, 0)
    cost = price_trace(trace)
    assert (cost.calls_without_usage, cost.complete) == (1, False)
    assert usage_by_model(trace)[0].calls_without_usage == 1


@pytest.mark.slow
def test_a_failed_call_is_not_reported_as_missing(costs: CostTracking) -> None:
    with pytest.raises(RuntimeError), mlflow.start_span("call", span_type="CHAT_MODEL"):
        raise RuntimeError("rate limited")
    assert costs.missing_usage == 0


def test_the_broken_usage_of_one_span_stops_nothing(
    costs: CostTracking, caplog: pytest.LogCaptureFixture
) -> None:
    root = mlflow.start_span_no_context("chain", start_time_ns=DECEMBER)
    bad = call("gpt-4o", 10, 0, root, cache_read_input_tokens=99)
    good = call("gpt-4o", 1000, 500, root)
    trace = end(bad, good, root)
    assert len(trace.data.spans) == 3
    assert (costs.unpriced, costs.priced, costs.failed) == (1, 1, 0)
    assert "exceeds input_tokens (10)" in caplog.text
    assert trace.info.tags["cost.status"] == "partial"
    status = {s.span_id: s.get_attribute("cost.status") for s in trace.data.spans}
    assert status[bad.span_id] == "unpriced"
    cost = price_trace(trace)  # 壊れた 1 回のために、残りの金額を失わない
    assert (cost.total_usd, cost.complete) == (Decimal("0.0075"), False)
    assert "exceeds input_tokens (10)" in cost.reasons[0]


def test_a_broken_calculator_stops_nothing(
    tracking_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = setup_cost_tracking(Mock(price=Mock(side_effect=RuntimeError("bad table"))))
    root = mlflow.start_span_no_context("chain", start_time_ns=DECEMBER)
    trace = end(call("gpt-4o", 10, 0, root), root)
    tracking.uninstall()
    assert [span.get_attribute("cost.status") for span in trace.data.spans] == ["unpriced"] * 2
    assert tracking.failed == 2
    assert "cost tracking failed" in caplog.text


@pytest.mark.slow
def test_a_failing_tracker_does_not_unprice_the_call(costs: CostTracking, tracker: Any) -> None:
    tracker.add = None
    trace = end(call("gpt-4o", 1000, 500))
    assert costs.failed == 1
    assert (trace.info.tags["cost.status"], total_cost(trace)) == ("priced", 0.0075)


@pytest.mark.slow
def test_threads(costs: CostTracking, tracker: CostTracker) -> None:
    def one(i: int) -> None:
        with mlflow.start_span("request"), mlflow.start_span("llm", "CHAT_MODEL") as span:
            usage = {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}
            span.set_attributes({MODEL: "gpt-4o", USAGE: usage})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(200)))
    mlflow.flush_trace_async_logging()
    assert (costs.priced, costs.failed) == (200, 0)
    assert tracker.snapshot().total.cost_usd == Decimal("1.5")


@pytest.mark.slow
def test_no_span_is_missing_from_the_cost_of_its_trace(costs: CostTracking) -> None:
    """スパンとトレースは別々に書き込まれる。順番が入れ替わっても、合計は変わらない。"""
    experiment_id = mlflow.set_experiment("concurrent").experiment_id

    def one(i: int) -> None:
        root = mlflow.start_span_no_context("request", start_time_ns=DECEMBER)
        for model in ("text-embedding-3-small", "gpt-4o", "gpt-4o-mini"):
            call(model, 1000, 0, root).end()
        root.end()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(64)))
    mlflow.flush_trace_async_logging()
    totals = [total_cost(trace) for trace in iter_traces(experiment_id)]
    assert totals == [pytest.approx(0.00267)] * 64


@pytest.mark.slow
def test_the_real_sdk(stub_llm: Any, tracking_uri: str, tracker: CostTracker) -> None:
    """同期、非同期、ストリーム、埋め込み。"""
    import openai

    mlflow.set_experiment("sdk")
    tracking = setup_token_tracking(("openai",), tracker=tracker)
    messages: Any = [{"role": "user", "content": "返品できますか?"}]
    client = openai.OpenAI()

    async def ask() -> None:
        await openai.AsyncOpenAI().chat.completions.create(model="gpt-4o", messages=messages)

    with mlflow.start_span("request") as root:
        client.chat.completions.create(model="gpt-4o-mini", messages=messages)
        asyncio.run(ask())
        client.embeddings.create(model="text-embedding-3-small", input="返品")
        for options in ({"stream_options": {"include_usage": True}}, {}):
            create: Any = client.chat.completions.create
            for _ in create(model="gpt-4o-mini", messages=messages, stream=True, **options):
                pass
    mlflow.flush_trace_async_logging()
    assert tracking.costs is not None
    assert (tracking.costs.priced, tracking.costs.missing_usage) == (4, 1)
    models = {item.model: item for item in usage_by_model(root.trace_id)}
    assert models["gpt-4o-mini-2024-07-18"].calls == 3
    assert models["gpt-4o-mini-2024-07-18"].calls_without_usage == 1
    assert models["text-embedding-3-small"].usage.input_tokens > 0
    trace = mlflow.get_trace(root.trace_id)
    assert trace is not None
    assert price_trace(trace).total_usd == tracker.snapshot().total.cost_usd
    assert total_cost(trace) == pytest.approx(float(tracker.snapshot().total.cost_usd))


def test_unknown_provider(tracking_uri: str) -> None:
    for provider in ("no_such_provider", "entities"):
        with pytest.raises(ValueError, match=provider):
            setup_token_tracking((provider,), include_cost=False)


@pytest.mark.slow
def test_unknown_trace_and_experiment(tracking_uri: str) -> None:
    for read in (get_token_usage_from_trace, usage_by_model, price_trace):
        with pytest.raises(TraceNotFoundError, match="tr-none"):
            read("tr-none")
    with pytest.raises(ExperimentNotFoundError, match="no experiment 'nope' at sqlite"):
        aggregate_token_usage_from_traces("nope")
    assert mlflow.get_experiment_by_name("nope") is None  # 調べただけで作らない


def record(count: int, hours: int = 0, metadata: dict[str, str] | None = None) -> None:
    for i in range(count):
        start = DECEMBER + hours * 3600 * 10**9 + i * 10**6
        root = mlflow.start_span_no_context("chat", start_time_ns=start, metadata=metadata)
        child = mlflow.start_span_no_context("llm", "CHAT_MODEL", root, start_time_ns=start)
        usage = {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}
        child.set_attributes({MODEL: "gpt-4o", USAGE: usage})
        child.end(end_time_ns=start + 10**6)
        root.end(end_time_ns=start + 10**6)
    mlflow.flush_trace_async_logging()


@pytest.mark.slow
def test_aggregation_pages_without_a_cut(costs: CostTracking) -> None:
    mlflow.set_experiment("many")
    record(7)
    end(mlflow.start_span_no_context("no llm", start_time_ns=DECEMBER))
    summary = aggregate_token_usage_from_traces("many", page_size=3)
    assert (summary.trace_count, summary.traces_without_usage) == (8, 1)
    assert summary.total_tokens == 7 * 1500
    assert summary.cost_usd == Decimal("0.0525")
    assert summary.by_model["gpt-4o"].calls == 7
    assert summary.by_model["gpt-4o"].cost_usd == Decimal("0.0525")
    assert not summary.truncated
    cut = aggregate_token_usage_from_traces("many", page_size=3, max_traces=5)
    assert (cut.trace_count, cut.truncated) == (5, True)
    with pytest.raises(ValueError, match="page_size must be >= 1, got 0"):
        aggregate_token_usage_from_traces("many", page_size=0)
    whole = aggregate_token_usage_from_traces("many", max_traces=8)
    assert (whole.trace_count, whole.truncated) == (8, False)


@pytest.mark.slow
def test_aggregation_by_time_weight_and_filter(costs: CostTracking) -> None:
    mlflow.set_experiment("two-days")
    record(2, hours=0)
    record(3, hours=24, metadata={"sampling.weight": "10"})
    day = datetime.fromtimestamp(DECEMBER / 1e9, timezone.utc) + timedelta(days=1)
    first = aggregate_token_usage_from_traces("two-days", end=day)  # この時刻ちょうどは含まない
    second = aggregate_token_usage_from_traces("two-days", start=day)
    assert (first.trace_count, first.weighted_trace_count) == (2, 2)
    assert (second.trace_count, second.weighted_trace_count) == (3, 30)
    assert (second.total_tokens, second.cost_usd) == (3 * 1500, Decimal("0.0225"))
    assert second.weighted_total_tokens == 30 * 1500
    assert second.weighted_cost_usd == pytest.approx(30 * 0.0075)
    where = "metadata.`sampling.weight` = '10'"
    assert aggregate_token_usage_from_traces("two-days", filter_string=where) == second
    with pytest.raises(ValueError, match="no time zone"):
        aggregate_token_usage_from_traces("two-days", start=datetime(2024, 12, 1))


@pytest.mark.slow
def test_a_broken_weight_counts_as_one(costs: CostTracking) -> None:
    mlflow.set_experiment("broken-weight")
    weights = ("ten", "", "nan", "-3", "inf")
    for weight in weights:
        record(1, metadata={"sampling.weight": weight})
    for trace in iter_traces(find_experiment_id("broken-weight")):
        assert sampling_weight(trace.info) == 1, trace.info.trace_metadata
    assert aggregate_token_usage_from_traces("broken-weight").weighted_trace_count == len(weights)


@pytest.mark.slow
def test_a_breakdown_of_another_shape_does_not_stop_the_sum(costs: CostTracking) -> None:
    """途中で切られたタグと、ほかの道具が書いた別の形。"""
    mlflow.set_experiment("other-tag")
    record(1)
    trace = next(iter_traces(find_experiment_id("other-tag")))
    for tag in (
        '{"gpt-4o":[1,', "5", "[1]", '{"m": 5}', '{"m": [1, 2]}',
        '{"m": [1, 1, 1, "x"]}', '{"m": [[], 1, 1, "1"]}',
    ):  # fmt: skip
        mlflow.set_trace_tag(trace.info.trace_id, "cost.by_model", tag)
        summary = aggregate_token_usage_from_traces("other-tag")
        assert (summary.cost_usd, summary.by_model) == (Decimal("0.0075"), {}), tag


@pytest.mark.slow
def test_a_cost_without_a_total_is_no_cost(tracking_uri: str) -> None:
    """ほかの道具が書いた、形の足りない金額。1 件のために全体の合計を止めない。"""
    mlflow.set_experiment("half-cost")
    metadata = {"mlflow.trace.cost": '{"input_cost": 1}'}
    end(mlflow.start_span_no_context("x", start_time_ns=DECEMBER, metadata=metadata))
    summary = aggregate_token_usage_from_traces("half-cost")
    assert (summary.trace_count, summary.cost_usd) == (1, 0)


@pytest.mark.slow
def test_the_breakdown_of_many_models_is_kept(costs: CostTracking) -> None:
    mlflow.set_experiment("ten-models")
    root = mlflow.start_span_no_context("agent", start_time_ns=DECEMBER)
    models = [*list(PriceTable.default().rows)[:9], "a-long-name-" * 8]
    trace = end(*[call(model, 1000, 500, root) for model in models], root)
    summary = aggregate_token_usage_from_traces("ten-models")
    assert set(summary.by_model) == set(models)
    assert sum(item.cost_usd for item in summary.by_model.values()) == price_trace(trace).total_usd


@pytest.mark.slow
def test_the_cost_of_a_trace_has_no_fraction_of_float(costs: CostTracking) -> None:
    """0.0000266 + 0.00005 は、float で足すと 0.00007659999999999999 になる。"""
    mlflow.set_experiment("exact")
    for _ in range(3):
        root = mlflow.start_span_no_context("chat", start_time_ns=DECEMBER)
        calls = call("gpt-4o", 10, 5, root), call("text-embedding-3-small", 80, 0, root)
        trace = end(*calls, root)
    assert total_cost(trace) == 0.0000766
    assert aggregate_token_usage_from_traces("exact").cost_usd == Decimal("0.0002298")


@pytest.mark.slow
def test_a_cost_written_by_hand_is_kept_in_the_total(costs: CostTracking) -> None:
    root = mlflow.start_span_no_context("chat", start_time_ns=DECEMBER)
    tool = mlflow.start_span_no_context("search", "TOOL", parent_span=root)
    usd = {"input_cost": 0.01, "output_cost": 0.0, "total_cost": 0.01}
    tool.set_attribute("mlflow.llm.cost", usd)
    assert total_cost(end(call("gpt-4o", 1000, 500, root), tool, root)) == pytest.approx(0.0175)
    root = mlflow.start_span_no_context("chat", start_time_ns=DECEMBER)
    unknown = call("in-house", 1000, 500, root)  # 料金表になく、金額を自分で書いた呼び出し
    unknown.set_attribute("mlflow.llm.cost", usd)
    assert total_cost(end(call("gpt-4o", 1000, 500, root), unknown, root)) == pytest.approx(0.0175)


@pytest.mark.slow
def test_usage_of_another_shape_is_not_reported_usage(tracking_uri: str) -> None:
    usages: tuple[Any, ...] = ({}, "1500", [1500])
    for usage in usages:
        span = call("gpt-4o", None)
        span.set_attribute(USAGE, usage)
        trace = end(span)
        assert get_token_usage_from_trace(trace) is None
        assert usage_by_model(trace)[0].calls_without_usage == 1
        assert not price_trace(trace).complete


@pytest.mark.slow
def test_no_query_per_trace(costs: CostTracking, monkeypatch: pytest.MonkeyPatch) -> None:
    """N+1 の見張り: 7 件を 3 件ずつ読むなら、問い合わせは 3 回。"""
    from mlflow.tracing.client import TracingClient

    mlflow.set_experiment("n-plus-one")
    record(7)
    calls: list[str] = []
    search = TracingClient.search_traces

    def counted(self: TracingClient, *args: Any, **kwargs: Any) -> Any:
        calls.append("search")
        return search(self, *args, **kwargs)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("one query per trace")

    monkeypatch.setattr(TracingClient, "search_traces", counted)
    monkeypatch.setattr(TracingClient, "get_trace", forbidden)
    aggregate_token_usage_from_traces("n-plus-one", page_size=3)
    assert len(calls) == 3


@pytest.mark.slow
def test_a_real_server(mlflow_server_url: str, tracker: CostTracker) -> None:
    experiment = mlflow.set_experiment("costs-on-a-server")
    tracking = setup_cost_tracking(tracker=tracker)
    record(3)
    tracking.uninstall()
    summary = aggregate_token_usage_from_traces("costs-on-a-server")
    assert (summary.trace_count, summary.cost_usd) == (3, Decimal("0.0225"))
    assert summary.by_model["gpt-4o"].input_tokens == 3000
    traces = list(iter_traces(experiment.experiment_id, include_spans=True))
    assert [price_trace(trace).total_usd for trace in traces] == [Decimal("0.0075")] * 3
    tag = json.loads(traces[0].info.tags["cost.by_model"])
    assert tag == {"gpt-4o": [1, 1000, 500, "0.0075"]}
