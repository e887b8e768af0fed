"""ルールの項目の検査と、しきい値の判定。"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest

from chapter8_samples.alerting.rules.model import (
    AlertConfigError,
    AlertRule,
    BurnRateRule,
    format_duration,
    parse_duration,
    wilson_bounds,
)


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


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # 片側 95 % (z = 1.644854)。(p - k/n)^2 = z^2 p (1 - p) / n の 2 根
    [(0, 10, 0.0, 0.212942), (3, 10, 0.126877, 0.558300), (8, 70, 0.065609, 0.191669)],
)
def test_wilson_bounds_match_the_formula(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_bounds(successes, n, 0.95) == pytest.approx((low, high), abs=2e-6)


def test_no_samples_say_nothing_about_a_rate() -> None:
    assert wilson_bounds(0, 0, 0.95) == (0.0, 1.0)


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
        "window",
        "for_",
        "severity",
        "confidence",
        "clear_threshold",
    ]


RATE = AlertRule(name="r", window="5m", threshold=0.05, clear_threshold=0.03, confidence=0.95)


@pytest.mark.parametrize(
    ("rule", "sample", "firing", "verdict"),
    [
        (RATE, Value(6 / 70, 70, 6), False, False),  # 8.6% でも、下限は 5% に届かない
        (RATE, Value(8 / 70, 70, 8), False, True),
        (RATE, Value(0.04, 70, 2.8), True, True),  # 発報中は、値そのものを clear と比べる
        (RATE, Value(0.02, 70, 1.4), True, False),
        (RATE, Value(None, 0), False, None),
        (AlertRule(name="r", no_data="ok"), Value(None, 0), True, False),
        (AlertRule(name="r", no_data="alert"), Value(None, 0), False, True),
        (AlertRule(name="r", threshold=1, min_samples=30), Value(9, 29), False, None),
        (AlertRule(name="r", threshold=1, min_samples=30), Value(9, 30), False, True),
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
            AlertRule(name="r", threshold=1),
            Value(1.0),
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
