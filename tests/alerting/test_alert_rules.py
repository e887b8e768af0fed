"""ルールの項目の検査と、しきい値の判定。"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from chapter8_samples.alerting import AlertConfig, AlertEngine, RecordedTraces
from chapter8_samples.alerting.metrics.measures import TraceRow
from chapter8_samples.alerting.rules import (
    AlertConfigError,
    AlertRule,
    BurnRateRule,
    format_duration,
    parse_duration,
)
from chapter8_samples.alerting.rules.model import chance_of_at_least


@dataclass
class Value:
    value: float | None
    n: int = 100
    successes: float | None = None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5s", 5),
        ("1m", 60),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("2d", 172800),
        ("0s", 0),
        ("1.5s", 1.5),
    ],
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "5", "5 min", "m", "-5s", "1h 30m", "5x"])
def test_what_is_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["5s", "1h30m", "500ms", "2d", "0s", "1w"])
def test_a_duration_survives_writing_and_reading(text: str) -> None:
    assert parse_duration(format_duration(text)) == parse_duration(text)


def test_the_tail_of_the_binomial_is_exact() -> None:
    for n in (1, 2, 7, 60):
        for rate in (0.001, 0.05, 0.5, 0.97):
            chances = [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]
            for count in range(n + 2):
                expected = math.fsum(chances[count:])
                assert chance_of_at_least(count, n, rate) == pytest.approx(expected, rel=1e-9)
    assert chance_of_at_least(0, 0, 0.05) == 1.0
    assert chance_of_at_least(3_700, 72_000, 0.05) == pytest.approx(0.0445, abs=1e-3)


def test_a_rule_lists_every_mistake_at_once() -> None:
    with pytest.raises(AlertConfigError) as caught:
        AlertRule(
            name="slow",
            window="5 min",
            severity="urgent",
            for_="soon",
            confidence=95,
            op=">",
            threshold=0.05,
            clear_threshold=0.5,
        )
    assert [p.split(": ")[1] for p in caught.value.problems] == [
        "for_",
        "severity",
        "window",
        "clear_threshold",
        "confidence",
    ]


RATE = AlertRule(name="r", window="5m", threshold=0.05, clear_threshold=0.03, confidence=0.95)


@pytest.mark.parametrize(
    ("rule", "sample", "firing", "verdict"),
    [
        (RATE, Value(6 / 70, 70, 6), False, False),  # 8.6% は、5% でも 13% の確率で起きる
        (RATE, Value(8 / 70, 70, 8), False, True),
        (RATE, Value(0.04, 70, 2.8), True, True),  # 発報中は、値そのものを clear と比べる
        (RATE, Value(0.02, 70, 1.4), True, False),
        (RATE, Value(None, 0), False, None),
        (AlertRule(name="r", no_data="ok"), Value(None, 0), True, False),
        (AlertRule(name="r", no_data="alert"), Value(None, 0), False, True),
        (
            AlertRule(name="r", metric="cost_usd", threshold=1, min_samples=30),
            Value(9, 29),
            False,
            None,
        ),
        (
            AlertRule(name="r", metric="cost_usd", threshold=1, min_samples=30),
            Value(9, 30),
            False,
            True,
        ),
        (
            AlertRule(name="r", op="<", threshold=0.9, confidence=0.95),
            Value(0.85, 20, 17),
            False,
            False,
        ),
        (
            AlertRule(name="r", op="<", threshold=0.9, confidence=0.95),
            Value(0.5, 20, 10),
            False,
            True,
        ),
        (
            AlertRule(name="r", threshold=0.5),
            Value(0.5),
            False,
            False,
        ),  # 等しいのは越えたうちに入らない
    ],
)
def test_a_sample_is_judged(
    rule: AlertRule, sample: Value, firing: bool, verdict: bool | None
) -> None:
    assert rule.judge([sample], firing) is verdict


def test_a_burn_rate_needs_both_windows() -> None:
    rule = BurnRateRule(name="budget", objective=0.99, factor=14.4)
    assert rule.threshold == pytest.approx(0.144)
    assert rule.judge([Value(0.2), Value(0.2)], False) is True
    assert rule.judge([Value(0.2), Value(0.1)], True) is False
    assert rule.judge([Value(0.2), Value(None, 0)], True) is None


def test_a_burn_rate_nobody_can_reach_is_refused() -> None:
    with pytest.raises(AlertConfigError, match="a rate can never exceed it"):
        BurnRateRule(name="budget", objective=0.9, factor=14.4)
    with pytest.raises(AlertConfigError, match="is not shorter than"):
        BurnRateRule(name="budget", long="5m", short="1h")


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (AlertRule, {"threshold": "0.5"}),
        (AlertRule, {"threshold": float("nan")}),
        (AlertRule, {"min_samples": "30"}),
        (AlertRule, {"confidence": True}),
        (BurnRateRule, {"factor": None}),
    ],
)
def test_what_is_no_number_is_refused_when_the_rule_is_made(make: Any, fields: Any) -> None:
    with pytest.raises(AlertConfigError, match="is not a number") as caught:
        make(name="a", severity="urgent", **fields)
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("make", "fields", "named"),
    [
        (AlertRule, {"window": "9" * 30 + "d"}, "window: "),
        (AlertRule, {"window": "1" * 400 + "s"}, "window: "),
        (AlertRule, {"for_": timedelta(seconds=-1)}, "for_: "),
        (AlertRule, {"window": timedelta(days=4000)}, "window: "),
        (AlertRule, {"min_samples": 10**400}, "min_samples: "),
        (AlertRule, {"threshold": 10**400}, "threshold: "),
        (BurnRateRule, {"factor": 10**400}, "factor: "),
    ],
)
def test_a_number_of_any_size_is_refused_by_name_and_never_a_crash(
    make: Any, fields: Any, named: str
) -> None:
    with pytest.raises(AlertConfigError) as caught:
        make(name="a", **fields)
    (problem,) = caught.value.problems
    assert problem.startswith(f"rule 'a': {named}") and len(problem) < 200


def test_one_failed_request_at_night_is_no_incident() -> None:
    start = datetime(2026, 1, 1, tzinfo=timezone.utc)
    good = [
        TraceRow(trace_id=f"tr-{i}", at_ms=round(start.timestamp() * 1000) + i * 180_000)
        for i in range(60)
    ]
    bad = TraceRow(trace_id="tr-bad", at_ms=good[-1].at_ms + 180_000, state="ERROR")
    at = datetime.fromtimestamp(bad.at_ms / 1000, timezone.utc)
    config = replace(AlertConfig.default(), offset="0s")
    engine = AlertEngine(config, RecordedTraces([*good, bad]))
    for second in range(0, 600, 30):
        told = engine.evaluate(at + timedelta(seconds=second))
        assert [alert.name for alert in told if alert.action == "rollback"] == []
