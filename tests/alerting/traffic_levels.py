"""どの通信量でも試せる、1 分ごとの件数による通信とアラートの再生。

リクエストは日周のあるポアソン分布、エラーは固まり(幾何分布、平均 2 件、多くて 5 件)で起きる。
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import numpy as np
from numpy.typing import NDArray

from chapter8_samples.alerting.engine import RuleState
from chapter8_samples.alerting.rules import AlertConfig, AlertRule
from chapter8_samples.alerting.rules.model import parse_duration

Counts = NDArray[np.int64]
LEVELS = (0.01, 0.05, 0.3, 1.5, 6, 20)
ERROR_RATES = (0.002, 0.01, 0.02)
CLUMPS = np.arange(1, 6)
CLUMP_ODDS = 0.5**CLUMPS / (0.5**CLUMPS).sum()
MEAN_CLUMP = float((CLUMPS * CLUMP_ODDS).sum())
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
ERRORS: AlertRule = next(  # pyright: ignore[reportAssignmentType]
    rule for rule in AlertConfig.default().rules if rule.name == "high_error_rate"
)


@dataclass(frozen=True)
class Sample:
    value: float | None
    n: int
    successes: float


def traffic(
    rng: np.random.Generator, per_second: float, error_rates: NDArray[np.float64]
) -> tuple[Counts, Counts]:
    """1 分ごとの(リクエスト, エラー)。``error_rates`` は分ごとの真のエラー率。"""
    minutes = np.arange(len(error_rates))
    daily = 1 + 0.6 * np.sin(2 * np.pi * minutes / 1440)
    requests = rng.poisson(per_second * 60 * daily)
    clumps = rng.poisson(requests * error_rates / MEAN_CLUMP)
    sizes = rng.choice(CLUMPS, size=int(clumps.sum()), p=CLUMP_ODDS)
    errors = np.zeros(len(minutes), dtype=np.int64)
    np.add.at(errors, np.repeat(minutes, clumps), sizes)
    return requests, np.minimum(errors, requests)


def windows(rule: AlertRule, counts: Counts) -> Counts:
    """各分までの窓の合計。"""
    minutes = round(parse_duration(rule.window) / timedelta(minutes=1))
    return np.convolve(counts, np.ones(minutes, dtype=np.int64))[: len(counts)]


def firings(rule: AlertRule, requests: Counts, errors: Counts) -> Iterator[int]:
    """発報した分。評価は 1 分ごと。"""
    seen, bad = windows(rule, requests), windows(rule, errors)
    hold, keep = parse_duration(rule.for_), parse_duration(rule.keep_firing_for)
    state = RuleState()
    calm = bad <= seen * rule.threshold  # 待ってもいない静かな分は、状態が変わらない
    for minute in range(len(seen)):
        if calm[minute] and state.phase == "inactive":
            continue
        n, wrong = int(seen[minute]), int(bad[minute])
        sample = Sample(wrong / n if n else None, n, wrong)
        before = state.phase
        breached = rule.judge([sample], before == "firing")
        state.advance(breached, START + timedelta(minutes=minute), hold, keep)
        if before != "firing" and state.phase == "firing":
            yield minute


def false_pages(rule: AlertRule, seed: int, per_second: float, error_rate: float) -> int:
    """平穏な 20 日の発報の数。"""
    rng = np.random.default_rng([seed, round(per_second * 100), round(error_rate * 10_000)])
    quiet = np.full(20 * 1440, error_rate)
    return sum(1 for _ in firings(rule, *traffic(rng, per_second, quiet)))


def delay(rule: AlertRule, seed: int, per_second: float, error_rate: float) -> int | None:
    """エラー率が 1% から上がって、発報するまでの分数。1 時間なければ ``None``。"""
    rates = np.array([0.01] * 10 + [error_rate] * 60)
    rng = np.random.default_rng([seed, round(per_second * 100), round(error_rate * 10_000)])
    found = (at for at in firings(rule, *traffic(rng, per_second, rates)) if at >= 10)
    first = next(found, None)
    return None if first is None else first - 9
