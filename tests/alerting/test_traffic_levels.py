"""標準のルールを、どの通信量でも試す。"""

from __future__ import annotations

from dataclasses import replace

import pytest
from alerting.traffic_levels import (
    ERROR_RATES,
    ERROR_RULES,
    INCIDENTS,
    LEVELS,
    RULES,
    Incident,
    delay,
    false_alarms,
    moments,
    pages,
    quiet_days,
)

from chapter8_samples.alerting import AlertRule, MetricSample


@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in (1, 2))])
def test_quiet_days_at_every_traffic_give_no_more_than_two_false_pages(seed: int) -> None:
    """エラーのルール。通信量 6 通り、エラー率 3 通りの平穏な 20 日ずつ、合わせて 360 日。"""
    errors = [rule for rule in RULES if rule.name in ERROR_RULES]
    days = (quiet_days(seed, level, rate) for level in LEVELS for rate in ERROR_RATES)
    assert sum(pages(false_alarms(day, errors)) for day in days) <= 2


def test_an_error_rate_is_found_where_the_traffic_shows_it() -> None:
    for level, error_rate, minutes in (
        (0.05, 1.0, 10),
        (0.3, 0.5, 6),
        (1.5, 0.15, 6),
        (20, 0.08, 7),
    ):
        incident = Incident.errors(error_rate)
        delays = [delay(incident, seed, level, 0) for seed in range(10)]
        assert all(found is not None and found <= minutes for found in delays), (level, delays)


def test_a_change_from_the_day_before_must_be_more_than_chance() -> None:
    (rising,) = [rule for rule in RULES if rule.name == "thumbs_down_rising"]
    falling = replace(rising, metric="pass_rate:tone", op="<", threshold=0.9, clear_threshold=None)

    def judged(rule: AlertRule, now: tuple[int, int], before: tuple[int, int]) -> bool | None:
        pair = [MetricSample(hits / n, n, hits) for hits, n in (now, before)]
        return rule.judge(pair, False)

    assert judged(rising, (3, 10), (1, 10)) is False
    assert judged(rising, (13, 100), (10, 100)) is False
    assert judged(rising, (50, 100), (12, 100)) is True
    assert judged(falling, (6, 10), (10, 10)) is False
    assert judged(falling, (600, 1000), (950, 1000)) is True
    assert rising.judge([MetricSample(0.5, 4, 2), MetricSample(None, 0)], False) is None


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_360_quiet_days_under_all_default_rules() -> None:
    """呼び出しは多くて 2 回、警告もほとんどない。"""
    days = (quiet_days(7, level, rate) for level in LEVELS for rate in ERROR_RATES)
    found = [false_alarms(day) for day in days]
    assert sum(pages(one) for one in found) <= 2
    assert sum(sum(one.values()) for one in found) <= 4


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("level", [1.5, 6, 20])
def test_forty_incidents_of_ten_kinds_are_found_by_a_rule_of_their_kind(level: float) -> None:
    assert len(INCIDENTS) == 10
    found = {
        (incident.title, start): delay(incident, seed, level, start)
        for incident in INCIDENTS
        for seed, start in moments([7])
    }
    assert len(found) == 40
    assert [key for key, minutes in found.items() if minutes is None] == []
