"""SLO: 目標から、SRE ワークブックの 3 つのルールと、エラー予算の残り。"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chapter8_samples._lab.report.budget import budget_table
from chapter8_samples._lab.report.health import Point
from chapter8_samples.alerting import AlertConfig, AlertConfigError, Slo, replay
from chapter8_samples.alerting.metrics import TraceRow
from chapter8_samples.alerting.tools import RecordedTraces

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)


def requests(count: int, hours: float, *bad: int, **changes: Any) -> list[TraceRow]:
    """``hours`` の間に等間隔の ``count`` 件。``bad`` 番目だけを変える。"""
    first = round(START.timestamp() * 1000)
    made: list[TraceRow] = []
    for i in range(count):
        own: dict[str, Any] = {"state": "OK", "latency_ms": 900.0}
        own |= {"assessments": (("groundedness", "yes"),)} | (changes if i in bad else {})
        at_ms = first + round((i + 1) * hours * 3_600_000 / count)
        made.append(TraceRow(trace_id=f"t{i}", at_ms=at_ms, **own))
    return made


def test_an_objective_becomes_the_three_rules_of_the_sre_workbook() -> None:
    page, second, ticket = Slo("error_rate", 0.99).rules()
    rules = [(r.metric, r.factor, r.long, r.short, r.severity) for r in (page, second, ticket)]
    assert rules == [
        ("error_rate", 14.4, "1h", "5m", "critical"),
        ("error_rate", 6, "6h", "30m", "critical"),
        ("error_rate", 1, "3d", "6h", "warning"),
    ]
    assert [r.threshold for r in (page, second, ticket)] == [0.144, 0.06, 0.01]
    assert [r.min_samples for r in (page, second, ticket)] == [70, 167, 1000]
    assert [r.factor for r in Slo("pass_rate:groundedness", 0.9).rules()] == [6, 1]


@pytest.mark.parametrize(
    ("metric", "failures", "change"),
    [
        ("error_rate", "error_rate", {"state": "ERROR"}),
        ("slow_rate:3s", "slow_rate:3s", {"latency_ms": 3001.0}),
        ("pass_rate:groundedness", "fail_rate:groundedness",
         {"assessments": (("groundedness", "no"),)}),
        ("thumbs_down_rate:groundedness", "thumbs_down_rate:groundedness",
         {"assessments": (("groundedness", "no"),)}),
    ],
)  # fmt: skip
def test_the_budget_left_is_counted_by_hand(
    metric: str, failures: str, change: dict[str, Any]
) -> None:
    slo = Slo(metric, 0.98, "1d")
    source = RecordedTraces(requests(1000, 24, *range(5), **change))
    assert slo.failures == failures
    assert slo.budget_left(source, START + 24 * HOUR) == pytest.approx(1 - 5 / 20)
    overspent = RecordedTraces(requests(1000, 24, *range(30), **change))
    assert slo.budget_left(overspent, START + 24 * HOUR) == pytest.approx(-0.5)
    assert slo.budget_left(source, START + 99 * HOUR) is None


@pytest.mark.parametrize(
    ("metric", "change"),
    [
        ("error_rate", {"state": "ERROR"}),
        ("slow_rate:3s", {"latency_ms": 9000.0}),
        ("pass_rate:groundedness", {"assessments": (("groundedness", "no"),)}),
    ],
)
def test_a_fast_burn_pages_once_and_a_night_of_few_requests_does_not(
    metric: str, change: dict[str, Any]
) -> None:
    config = AlertConfig(rules=Slo(metric, 0.99).rules()[:1])
    storm = replay(config, requests(600, 4, *range(300, 400), **change), step=HOUR / 20)
    assert [len(rule.firings) for rule in storm.rules] == [1]
    clump = replay(config, requests(60, 4, *range(30, 35), **change), step=HOUR / 20)
    assert [len(rule.firings) for rule in clump.rules] == [0]


@pytest.mark.parametrize(
    ("metric", "objective", "problem"),
    [
        ("latency_p95_ms", 0.99, "'latency_p95_ms' is not a rate; .* error_rate, slow_rate"),
        ("eror_rate", 0.99, "did you mean 'error_rate'"),
        ("error_rate", 99, "objective: 99: Input should be less than 1; write 0.99 for 99%"),
        ("error_rate", 0, "objective: 0: Input should be greater than 0"),
    ],
)
def test_an_slo_that_means_nothing_is_refused(metric: str, objective: float, problem: str) -> None:
    with pytest.raises(AlertConfigError, match=problem):
        Slo(metric, objective)
    with pytest.raises(ValueError, match="'30 days' is not a duration"):
        Slo("error_rate", 0.99, "30 days")


def test_the_health_report_shows_the_budget_left() -> None:
    bad = requests(100, 1, *range(5), state="ERROR", assessments=(("tone", "no"),))
    people: dict[str, Any] = {"models": {}, "prompts": (), "human": ()}
    history = [Point(row=row, at=0.0, user="", **people) for row in bad]
    limits = {"error_rate": 0.1, "latency_p95_ms": 3000.0, "cost_usd": 1.0}
    table = budget_table(limits | {"pass_rate:tone": 0.8, "pass_rate:unused": 0.8}, history)
    assert table.rows == [
        ("エラーのない応答", "90%", "95.00%", "50%"),
        ("3,000 ms 以内の応答", "95%", "100.00%", "100%"),
        ("tone", "80%", "0.00%", "400% の超過"),
    ]
    assert budget_table({}, history).rows == []


@given(st.floats(0.01, 0.99999), st.floats(0, 1))
def test_the_budget_is_spent_exactly_when_the_objective_is_missed(
    objective: float, failure_rate: float
) -> None:
    left = Slo("error_rate", objective).left(failure_rate)
    assert left <= 1
    if abs(failure_rate - (1 - objective)) > 1e-9:
        assert (left < 0) == (1 - failure_rate < objective)
