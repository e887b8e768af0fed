"""ルールの項目の検査と、しきい値の判定。"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from chapter8_samples.alerting import (
    Alert,
    AlertConfig,
    AlertEngine,
    Inhibit,
    MuteWindow,
    RecordedTraces,
)
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


def test_a_duration_is_read_and_written() -> None:
    seconds = {"5s": 5, "1m": 60, "1h30m": 5400, "500ms": 0.5, "2d": 172800, "0s": 0, "1.5s": 1.5}
    for text, expected in seconds.items():
        assert parse_duration(text) == timedelta(seconds=expected)
        assert parse_duration(format_duration(text)) == parse_duration(text)
    assert format_duration("1w") == "7d"


@pytest.mark.parametrize("text", ["", "5", "5 min", "m", "-5s", "1h 30m", "5x"])
def test_what_is_no_duration_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


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
COST = AlertRule(name="r", metric="cost_usd", threshold=1, min_samples=30)
LOW = AlertRule(name="r", op="<", threshold=0.9, confidence=0.95)
HALF = AlertRule(name="r", threshold=0.5)


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
        (COST, Value(9, 29), False, None),
        (COST, Value(9, 30), False, True),
        (LOW, Value(0.85, 20, 17), False, False),
        (LOW, Value(0.5, 20, 10), False, True),
        (HALF, Value(0.5), False, False),  # 等しいのは越えたうちに入らない
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


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (AlertRule, {"threshold": "high"}),
        (AlertRule, {"threshold": float("nan")}),
        (AlertRule, {"min_samples": 30.5}),
        (AlertRule, {"confidence": [0.95]}),
        (BurnRateRule, {"factor": None}),
    ],
)
def test_what_is_no_number_is_refused_when_the_rule_is_made(make: Any, fields: Any) -> None:
    with pytest.raises(AlertConfigError, match=r"should be a (valid|finite) (number|integer)") as e:
        make(name="a", severity="urgent", **fields)
    assert len(e.value.problems) == 2


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


RATE_METRICS = ("error_rate", "slow_rate:3s", "fail_rate:x", "thumbs_down_rate:x", "pass_rate:x")
AMOUNTS = ("latency_p95_ms", "cost_usd", "cost_usd_per_request", "total_tokens", "trace_count")


def refused(**fields: Any) -> str:
    """断られた理由。通れば空。"""
    make = BurnRateRule if fields.keys() & {"objective", "factor", "long", "short"} else AlertRule
    try:
        make(name="r", **fields)
    except AlertConfigError as error:
        return " / ".join(error.problems)
    return ""


def test_a_rate_written_in_percent_is_refused_with_the_value_meant() -> None:
    for metric in RATE_METRICS:
        for op in (">", "<"):
            for percent in (1.5, 5, 90, 100):
                found = refused(metric=metric, op=op, threshold=percent)
                assert f"write {percent / 100:g} for {percent:g}%" in found
            assert "between 0 and 1" in refused(metric=metric, op=op, threshold=5000)
    assert "write 0.05" in refused(threshold="5%")
    assert "write 0.03" in refused(threshold=0.05, clear_threshold=3)
    assert "write 0.95" in refused(threshold=0.05, confidence=95)
    assert "write 0.999" in refused(objective=99.9, factor=10)


def test_what_can_never_be_true_or_is_always_true_is_refused() -> None:
    for metric in (*RATE_METRICS, *AMOUNTS):
        for value in (0, -1):
            assert "can never be true" in refused(metric=metric, op="<", threshold=value)
        assert "always true" in refused(metric=metric, threshold=-0.5)
    for metric in RATE_METRICS:
        assert "can never be true" in refused(metric=metric, threshold=1)
        assert refused(metric=metric, op="<", threshold=1) == ""
        assert refused(metric=metric, threshold=0) == ""
    for value in (0, 0.5):
        assert "always true" in refused(metric="latency_p95_ms", threshold=value)
    assert "write 1 for none at all" in refused(metric="trace_count", op="<", threshold=0)
    assert refused(metric="trace_count", op="<", threshold=1) == ""


def test_a_count_below_its_own_min_samples_is_a_contradiction() -> None:
    for metric in ("trace_count", "assessment_count:x"):
        for threshold in (1, 30):
            found = refused(metric=metric, op="<", threshold=threshold, min_samples=30)
            assert "can never be true" in found and "remove min_samples" in found
        assert "always true" in refused(metric=metric, threshold=5, min_samples=30)
        assert refused(metric=metric, op="<", threshold=31, min_samples=30) == ""
        assert refused(metric=metric, threshold=30, min_samples=30) == ""
    assert refused(metric="error_rate", threshold=0.05, min_samples=30) == ""


def test_a_label_without_traces_cannot_be_counted_as_zero() -> None:
    silent = {"metric": "trace_count", "op": "<", "threshold": 1, "by": "model"}
    assert "write compare or no_data: alert" in refused(**silent)
    assert refused(**silent, no_data="alert") == refused(**{**silent, "threshold": 2}) == ""
    assert refused(**{**silent, "threshold": 0.1}, compare="1d") == ""
    assert refused(metric="trace_count", threshold=0, by="tag:blocked") == ""


def test_a_comparison_that_holds_without_any_change_is_refused() -> None:
    week = {"metric": "trace_count", "compare": "1w"}
    assert refused(**week, op="<", threshold=0.05, min_samples=100) == ""
    assert refused(**week, threshold=3) == refused(**week, threshold=1) == ""
    assert "write 0.05 for 5%" in refused(**week, op="<", threshold=5)
    assert "is always true: a ratio of 1 is no change from 1w ago" in refused(**week, threshold=0.5)
    assert "can never be true" in refused(**week, op="<", threshold=0)
    assert "would overlap" in refused(**week, window="2w", threshold=3)
    assert "longer than 0s" in refused(metric="trace_count", compare="0s", threshold=3)


def test_a_clear_threshold_stands_between_normal_and_the_threshold() -> None:
    assert "is beyond threshold 0.05" in refused(threshold=0.05, clear_threshold=0.5)
    assert "is beyond threshold 0.9" in refused(
        metric="pass_rate:x", op="<", threshold=0.9, clear_threshold=0.8
    )
    assert "would never clear" in refused(threshold=0.05, clear_threshold=-0.1)
    slow = {"metric": "latency_p95_ms", "threshold": 1000}
    assert "would never clear" in refused(**slow, clear_threshold=0)
    assert refused(threshold=0.05, clear_threshold=0.05) == ""
    assert refused(**slow, clear_threshold=800) == ""


def test_a_burn_rate_counts_failures_at_a_pace_that_can_be_reached() -> None:
    assert "write fail_rate:x" in refused(metric="pass_rate:x", objective=0.9, factor=2)
    for factor in (0, -1):
        assert "should be greater than 0" in refused(objective=0.99, factor=factor)
    assert "a rate can never exceed it" in refused(objective=0.9, factor=10)
    assert "is not shorter than long: 5m" in refused(long="5m", short="5m")


def test_labels_and_splits_that_mean_nothing_are_refused() -> None:
    for by in ("modell", "tag:", "user"):
        assert "match pattern '^(model|prompt_version|tag:.+)$'" in refused(by=by)
    assert refused(by="tag:tenant") == refused(by="prompt_version") == ""
    assert "write severity: there" in refused(labels={"severity": "critical"})


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("eror_rate", "did you mean 'error_rate'"),
        ("pass_rate", "write pass_rate:<assessment name>"),
        ("passrate:relevance", "did you mean 'pass_rate'"),
        ("slow_rate:fast", "write slow_rate:3s"),
        ("slow_rate:0s", "write slow_rate:3s"),
        ("pass_rate: relevance", "write pass_rate:<assessment name>"),
    ],
)
def test_a_metric_that_does_not_exist_is_refused_in_python_too(metric: str, hint: str) -> None:
    assert hint in refused(metric=metric, threshold=0.5)


def test_a_gate_and_a_burn_rate_need_a_rate() -> None:
    slow = {"metric": "latency_p95_ms", "threshold": 1000, "confidence": 0.95}
    assert "confidence: 'latency_p95_ms' is not a rate" in refused(**slow)
    assert "metric: 'cost_usd' is not a rate" in refused(metric="cost_usd", factor=6)


RULES: list[Any] = [
    AlertRule(name="errors", severity="critical", labels={"team": "search"}),
    AlertRule(name="cost", metric="cost_usd", threshold=1, by="tag:tenant"),
]


def points_nowhere(**fields: Any) -> str:
    """設定が断られた理由。通れば空。"""
    try:
        AlertConfig(rules=RULES, labels={"service": "bot"}, **fields)
    except AlertConfigError as error:
        return " / ".join(error.problems)
    return ""


def test_a_selector_that_no_alert_can_fit_is_refused_wherever_it_stands() -> None:
    """通るのは、起こりうるアラートに合うもの。``by`` のラベルの値は、何でもよい。"""
    wrong = {
        "no alert has the label 'sevrity'; did you mean 'severity'?": {"sevrity": "critical"},
        "no alert has severity 'crit'; did you mean 'critical'?": {"severity": "crit"},
        "no alert has severity 'CRITICAL'; did you mean 'critical'?": {"severity": "CRITICAL"},
        "no alert has severity 'high'; known: info, warning, error, critical": {"severity": "high"},
        "no alert has team 'ops'; known: search": {"team": "ops"},
        "no alert has name 'eror'; did you mean 'errors'?": {"name": "eror"},
        "no alert has service 'bott'; did you mean 'bot'?": {"service": "bott"},
        "no alert has metric 'cost_usdd'; did you mean 'cost_usd'?": {"metric": "cost_usdd"},
    }
    right = ({"severity": "error"}, {"name": "alert_evaluation_failed"}, {"tenant": "acme"},
             {"service": "bot", "team": "search"}, {"metric": "error_rate"})  # fmt: skip
    receivers = {"ops": {"type": "console"}}

    def places(selector: dict[str, str]) -> dict[str, dict[str, Any]]:
        routes = ({"match": selector, "to": ["ops"]}, {"to": ["ops"]})
        return {
            "routes[0].match": {"receivers": receivers, "routes": routes},
            "mute[0].match": {"mute": (MuteWindow(match=selector),)},
            "inhibit[0].when": {"inhibit": (Inhibit(when=selector, mute={}),)},
            "inhibit[0].mute": {"inhibit": (Inhibit(when={}, mute=selector),)},
        }

    for problem, selector in wrong.items():
        for place, fields in places(selector).items():
            assert points_nowhere(**fields).startswith(f"{place}: {problem}")
    for selector in right:
        assert [points_nowhere(**fields) for fields in places(selector).values()] == [""] * 4


def test_equal_and_receivers_name_what_exists() -> None:
    equal = (Inhibit(when={}, mute={}, equal=("servce", "team", "tenant")),)
    found = points_nowhere(inhibit=equal)
    expected = "no alert has the label 'servce'; did you mean 'service'?"
    assert found == f"inhibit[0].equal: {expected}"
    receivers = {"ops": {"type": "console"}}
    routes = ({"to": ["ops", "opps"]},)
    found = points_nowhere(receivers=receivers, routes=routes)
    assert found == "routes[0].to: unknown receiver 'opps'; did you mean 'ops'?"
    assert points_nowhere(routes=({"to": ["console"]},)) == ""  # 通知先を書かなければ console だけ


def test_a_key_of_a_rule_is_no_label_of_all_alerts_either() -> None:
    with pytest.raises(AlertConfigError, match="labels: 'severity' is a key of a rule"):
        AlertConfig(rules=RULES, labels={"severity": "high"})


def test_a_label_missing_on_both_sides_is_not_equal() -> None:
    quiet = Inhibit(when={"name": "a"}, mute={"name": "b"}, equal=("service",))
    page, warning = Alert(name="a"), Alert(name="b")
    assert not quiet.applies(warning, page)
    both = [replace(alert, labels={"service": "bot"}) for alert in (page, warning)]
    assert quiet.applies(both[1], both[0])
    assert not quiet.applies(both[1], page)


def test_a_route_that_the_order_makes_useless_is_refused() -> None:
    receivers = {"ops": {"type": "console"}}
    routes = ({"to": ["ops"]}, {"match": {"name": "errors"}, "to": ["ops"]}, {"to": ["ops"]})
    found = points_nowhere(receivers=receivers, routes=routes)
    assert found.startswith("routes[0]: matches everything")
