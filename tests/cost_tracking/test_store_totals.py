"""保存先の集計 API: ページをめくった合計と同じ数になるか、使わないか。"""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import mlflow
import pytest
from mlflow.entities.trace_metrics import AggregationType, MetricAggregation, MetricViewType
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient

from chapter8_samples.cost_tracking import (
    TokenUsageSummary,
    aggregate_token_usage_from_traces,
    setup_cost_tracking,
)
from chapter8_samples.cost_tracking.usage import reader
from chapter8_samples.cost_tracking.usage.reader import find_experiment_id

START = datetime(2024, 12, 20, tzinfo=timezone.utc)


@pytest.fixture
def experiment() -> str:
    name = f"store-totals-{uuid4().hex}"
    mlflow.set_experiment(name)
    return name


def record(
    usage: dict[str, int] | None, at: datetime = START, metadata: dict[str, str] | None = None
) -> None:
    begin = int(at.timestamp() * 1e9)
    root = mlflow.start_span_no_context("chat", start_time_ns=begin, metadata=metadata)
    if usage:  # 親子が同じ使用量を持つ。足すのは 1 回だけ
        parent = mlflow.start_span_no_context("outer", "CHAT_MODEL", root, start_time_ns=begin)
        child = mlflow.start_span_no_context("inner", "CHAT_MODEL", parent, start_time_ns=begin)
        for span in (child, parent):
            span.set_attribute("mlflow.chat.tokenUsage", usage)
            span.set_attribute("mlflow.llm.model", "gpt-4o")
            span.end(end_time_ns=begin + 10**6)
    root.end(end_time_ns=begin + 10**6)


def tokens(prompt: int, completion: int, total: int | None = None) -> dict[str, int]:
    total = prompt + completion if total is None else total
    return {"input_tokens": prompt, "output_tokens": completion, "total_tokens": total}


def both(experiment: str, **period: Any) -> tuple[TokenUsageSummary, TokenUsageSummary]:
    """集計 API に任せた結果と、必ずページをめくった結果。"""
    mlflow.flush_trace_async_logging()
    quick = aggregate_token_usage_from_traces(experiment, include_cost=False, **period)
    paged = aggregate_token_usage_from_traces(
        experiment, include_cost=False, max_traces=10**9, page_size=10, **period
    )
    assert paged.source == "paged"
    return quick, paged


@pytest.mark.slow
def test_a_real_server_sums_to_the_same_totals(mlflow_server_url: str, experiment: str) -> None:
    for i in range(23):
        record(tokens(1000 + i, 3 * i + 1), START + timedelta(hours=i))
    record(None)
    quick, paged = both(experiment)
    assert quick.source == "server_metrics"
    assert replace(quick, source="paged") == paged
    assert (quick.trace_count, quick.traces_without_usage) == (24, 1)
    assert quick.total_tokens == sum(1000 + i + 3 * i + 1 for i in range(23))
    noon = START + timedelta(hours=12)
    for period in ({"end": noon}, {"start": noon}, {"start": noon, "end": noon}):
        quick, paged = both(experiment, **period)
        assert replace(quick, source="paged") == paged
    assert both(experiment, end=noon)[0].trace_count == 13  # 12 時ちょうどは含まない


def test_an_embedded_database_can_sum_too(tracking_uri: str, experiment: str) -> None:
    quick, paged = both(experiment)
    assert (quick.source, quick.trace_count) == ("server_metrics", 0)
    record(tokens(10, 5))
    quick, paged = both(experiment)
    assert (quick.source, quick.total_tokens) == ("server_metrics", 15)
    assert replace(quick, source="paged") == paged
    assert math.isnan(quick.cost_usd)  # 聞いていない金額を 0 と見せない
    assert quick.traces_without_cost is None


@pytest.mark.parametrize(
    ("usage", "metadata"),
    [
        (tokens(10, 5), {"sampling.weight": "10"}),
        (tokens(100, 10, total=160), None),  # 思考トークンは合計にだけ入る
        (tokens(0, 0), None),  # 報告が 0 なのか、報告がないのか
    ],
    ids=["sampled", "thinking", "zero"],
)
@pytest.mark.slow
def test_totals_that_could_differ_are_counted_by_paging(
    tracking_uri: str, experiment: str, usage: dict[str, int], metadata: dict[str, str] | None
) -> None:
    record(usage, metadata=metadata)
    quick, paged = both(experiment)
    assert quick.source == "paged"
    assert quick == paged


@pytest.mark.slow
def test_the_store_would_count_a_cost_twice(tracking_uri: str, experiment: str) -> None:
    """集計 API の金額を使わない理由。これが失敗したら、金額も保存先に任せられる。"""
    costs = setup_cost_tracking()
    record(tokens(1000, 500))
    mlflow.flush_trace_async_logging()
    costs.uninstall()
    store: Any = TracingClient().store
    points = store.query_trace_metrics(
        experiment_ids=[find_experiment_id(experiment)],
        view_type=MetricViewType.SPANS,
        metric_name="total_cost",
        aggregations=[MetricAggregation(aggregation_type=AggregationType.SUM)],
    )
    assert points[0].values["SUM"] == pytest.approx(2 * 0.0075)
    assert aggregate_token_usage_from_traces(experiment).cost_usd == Decimal("0.0075")


@pytest.mark.slow
def test_costs_and_filters_are_counted_by_paging(tracking_uri: str, experiment: str) -> None:
    record(tokens(10, 5))
    mlflow.flush_trace_async_logging()
    assert aggregate_token_usage_from_traces(experiment).source == "paged"
    where = "attributes.status = 'OK'"
    found = aggregate_token_usage_from_traces(experiment, filter_string=where, include_cost=False)
    assert (found.source, found.trace_count) == ("paged", 1)


@pytest.mark.slow
def test_a_store_without_metrics_is_paged(
    tracking_uri: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tokens(10, 5))
    for error in (MlflowException("ENDPOINT_NOT_FOUND"), NotImplementedError()):
        monkeypatch.setattr(reader, "_ask_store", Mock(side_effect=error))
        quick, _ = both(experiment)
        assert (quick.source, quick.total_tokens) == ("paged", 15)
