"""ルートより後に終わるスパン: ハンドラーが返したストリームを、あとで Web サーバーが読む。"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from typing import Any

import mlflow
import pytest
from cost_tracking.llm_spans import DECEMBER, MODEL, USAGE, call, end
from mlflow.entities import Trace

from chapter8_samples.cost_tracking import (
    CostTracker,
    CostTracking,
    price_trace,
    setup_token_tracking,
)

MESSAGES: Any = [{"role": "user", "content": "返品できますか?"}]
WITH_USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
KEYS = ("cost.status", "cost.by_model", "cost.reason")


def facts(trace: Trace) -> dict[str, Any]:
    """トレースの合計とタグ。ストリームがいつ終わったかで変わってはならないもの。"""
    tags = {key: trace.info.tags.get(key) for key in KEYS}
    return {**tags, "usage": trace.info.token_usage, "cost": trace.info.cost}


def last_trace() -> Trace:
    mlflow.flush_trace_async_logging()
    trace = mlflow.get_trace(mlflow.get_last_active_trace_id() or "")
    assert trace is not None
    return trace


@pytest.mark.parametrize("model", ["gpt-4o", "my-model"])
@pytest.mark.parametrize("options", [WITH_USAGE, {}], ids=["usage", "no usage"])
@pytest.mark.slow
def test_a_stream_consumed_after_the_handler(
    stub_llm: Any, tracking_uri: str, tracker: CostTracker, options: dict[str, Any], model: str
) -> None:
    import openai

    mlflow.set_experiment("late")
    costs = setup_token_tracking(("openai",), tracker=tracker).costs
    assert costs is not None
    client, async_client = openai.OpenAI(), openai.AsyncOpenAI()

    @mlflow.trace
    def handler(consume: bool) -> Any:
        client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
        create: Any = client.chat.completions.create
        stream = create(model=model, messages=MESSAGES, stream=True, **options)
        return list(stream) and None if consume else stream

    handler(True)
    inside = facts(last_trace())
    for _ in handler(False):
        pass
    assert facts(last_trace()) == inside

    # 非同期でも同じ
    @mlflow.trace
    async def async_handler() -> Any:
        client.chat.completions.create(model="gpt-4o-mini", messages=MESSAGES)
        create: Any = async_client.chat.completions.create
        return await create(model=model, messages=MESSAGES, stream=True, **options)

    async def serve() -> None:
        async for _ in await async_handler():
            pass

    asyncio.run(serve())
    assert facts(last_trace()) == inside
    known = options and model == "gpt-4o"
    assert inside["cost.status"] == ("priced" if known else "partial")
    assert costs.counts["priced"] == (6 if known else 3)
    costs.uninstall()


def test_what_ends_late_counts_and_what_is_unpriced_shows(costs: CostTracking) -> None:
    """ルートのあとに、料金のある呼び出しと、ない呼び出しが終わる。"""
    root = mlflow.start_span_no_context("handler", start_time_ns=DECEMBER)
    inside = call("gpt-4o", 10**6, 100_000, root)
    priced, unpriced = call("gpt-4o", 2 * 10**6, 300_000, root), call("my-model", 10, 5, root)
    trace = end(inside, root, priced, unpriced)
    assert trace.info.tags["cost.status"] == "partial"
    assert json.loads(trace.info.tags["cost.by_model"]) == {
        "gpt-4o": [2, 3 * 10**6, 400_000, "11.5"],
        "my-model": [1, 10, 5, None],
    }
    assert (trace.info.cost or {})["total_cost"] == 11.5
    assert (trace.info.token_usage or {})["input_tokens"] == 3 * 10**6 + 10
    assert price_trace(trace).total_usd == 11.5


def test_a_stream_that_fails_late_is_like_one_that_fails_inside(costs: CostTracking) -> None:
    found: list[dict[str, Any]] = []
    for late in (False, True):
        root = mlflow.start_span_no_context("handler", start_time_ns=DECEMBER)
        stream = call("gpt-4o", None, parent=root)
        if late:
            root.end(end_time_ns=DECEMBER + 10**9)
        stream.set_status("ERROR")
        found.append(facts(end(stream) if late else end(stream, root)))
    assert found[0] == found[1]


def test_a_cost_written_by_hand_on_a_late_tool_is_added(costs: CostTracking) -> None:
    root = mlflow.start_span_no_context("handler", start_time_ns=DECEMBER)
    priced = call("gpt-4o", 10**6, 0, root)
    tool = mlflow.start_span_no_context("tool", "TOOL", parent_span=root, start_time_ns=DECEMBER)
    for span in (priced, root):
        span.end(end_time_ns=DECEMBER + 10**9)
    usd = {"input_cost": 0.5, "output_cost": 0.0, "total_cost": 0.5}
    tool.set_attribute("mlflow.llm.cost", usd)
    assert (end(tool).info.cost or {})["total_cost"] == 3.0


@pytest.mark.slow
def test_a_real_server_stores_the_settled_sums(mlflow_server_url: str) -> None:
    from chapter8_samples.cost_tracking import setup_cost_tracking

    mlflow.set_experiment("late-on-a-server")
    tracking = setup_cost_tracking()
    root = mlflow.start_span_no_context("handler", start_time_ns=DECEMBER)
    calls = [call("gpt-4o", 1000, 500, root) for _ in range(2)]
    trace = end(calls[0], root, calls[1])
    tracking.uninstall()
    assert trace.info.cost == {"input_cost": 0.005, "output_cost": 0.01, "total_cost": 0.015}
    assert (trace.info.token_usage or {})["total_tokens"] == 3000
    assert trace.info.tags["cost.by_model"] == '{"gpt-4o":[2,2000,1000,"0.0150"]}'


def test_nothing_is_remembered_about_finished_traces(costs: CostTracking) -> None:
    for late in (False, True):
        root = mlflow.start_span_no_context("handler", start_time_ns=DECEMBER)
        outer = call("gpt-4o", 1000, 500, root)
        inner = call("gpt-4o-2024-08-06", 1000, 500, outer)
        end(*((root, inner, outer) if late else (inner, outer, root)))
        del root, outer, inner
    gc.collect()
    assert len(vars(costs)["_seen"]) == 0


def test_a_traced_generator_ends_inside(costs: CostTracking) -> None:
    @mlflow.trace
    def answer() -> Iterator[str]:
        with mlflow.start_span("llm", "CHAT_MODEL") as span:
            usage = {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}
            span.set_attributes({MODEL: "gpt-4o", USAGE: usage})
            yield "はい"

    assert list(answer()) == ["はい"]
    assert last_trace().info.tags["cost.by_model"] == '{"gpt-4o":[1,1000,500,"0.0075"]}'
