"""どの通信量でも試せる、1 分ごとの数による通信とアラートの再生。

リクエストは日周のあるポアソン分布、エラーは固まり(幾何分布、平均 2 件、多くて 5 件)で起きる。
投票は 5%、スコアラーの判定は 20% のトレースに付く。前の日や前の週と比べるルールのために、
数える期間の前に 1 週間の平穏な日を置く。
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from chapter8_samples.alerting.engine import RuleState
from chapter8_samples.alerting.metrics import MetricSample
from chapter8_samples.alerting.rules import AlertConfig, AlertRule, parse_duration

Numbers = NDArray[np.float64]
LEVELS = (0.01, 0.05, 0.3, 1.5, 6, 20)
ERROR_RATES = (0.002, 0.01, 0.02)
DAY, WEEK = 1440, 7 * 1440
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
RULES = [rule for rule in AlertConfig.default().rules if isinstance(rule, AlertRule)]
PAGES = ("error", "critical")
"""人を呼び出す重大度。"""
CLUMPS = np.arange(1, 6)
CLUMP_ODDS = 0.5**CLUMPS / (0.5**CLUMPS).sum()
MEAN_CLUMP = float((CLUMPS * CLUMP_ODDS).sum())
VOTED, JUDGED = 0.05, 0.2
LATENCY_MS = np.geomspace(50, 120_000, 90)
"""応答時間の階級の境界。"""
MEDIAN_MS, SIGMA = 900.0, 0.6
COST_USD, COST_SHAPE = 0.004, 0.7
"""1 件のコストはガンマ分布(変動係数 1.2)。"""


World = dict[str, Numbers]
"""1 分ごとの本当の割合と倍率。障害は、これを書き換える。"""
QUIET = {
    "errors": 0.01,
    "down": 0.0,  # 全断だった割合(分の中の時間)
    "load": 1.0,
    "latency": 1.0,
    "cost": 1.0,
    "disliked": 0.12,
    "ungrounded": 0.05,
    "judged": JUDGED,
    "unjudgeable": 0.02,
}


def quiet_world(minutes: int) -> World:
    """何も起こらない ``minutes`` 分。"""
    return {name: np.full(minutes, value) for name, value in QUIET.items()}


class Traffic:
    """``World`` から引いた、1 分ごとの数。"""

    def __init__(self, rng: np.random.Generator, per_second: float, world: World) -> None:
        minute = np.arange(len(world["load"]))
        daily = 1 + 0.6 * np.sin(2 * np.pi * minute / DAY)
        requests = rng.poisson(per_second * 60 * daily * world["load"])
        verdicts = rng.binomial(requests, world["judged"])
        broken = rng.binomial(verdicts, world["unjudgeable"])
        votes = rng.binomial(requests, VOTED)
        errors = _clumped(rng, requests, world["errors"])
        errors += rng.binomial(requests - errors, world["down"])
        shape = COST_SHAPE * np.maximum(requests, 1e-9)
        self._totals: dict[str, Numbers] = {
            "requests": _sums(requests),
            "errors": _sums(errors),
            "votes": _sums(votes),
            "disliked": _sums(rng.binomial(votes, world["disliked"])),
            "verdicts": _sums(verdicts),
            "broken": _sums(broken),
            "ungrounded": _sums(rng.binomial(verdicts - broken, world["ungrounded"])),
            "cost": _sums(rng.gamma(shape, COST_USD / COST_SHAPE) * world["cost"]),
        }
        self._draw_latency = lambda: _latencies(rng.spawn(1)[0], requests, world["latency"])

    @cached_property
    def _latency(self) -> Numbers:
        return _sums(self._draw_latency())

    def total(self, name: str, window: int) -> Numbers:
        """各分までの ``window`` 分の合計。"""
        return _window(self._totals[name], window)

    def percentile(self, q: float, window: int) -> Numbers:
        """各分までの ``window`` 分の、応答時間の分位点。"""
        below = np.cumsum(_window(self._latency, window), axis=1)
        goal = q / 100 * below[:, -1:]
        bin_ = np.minimum((below < goal).sum(axis=1), below.shape[1] - 1)
        rows = np.arange(len(below))
        inside = below[rows, bin_] - np.where(bin_ > 0, below[rows, bin_ - 1], 0)
        start = below[rows, bin_] - inside
        part = (goal[:, 0] - start) / np.maximum(inside, 1)
        return LATENCY_MS[bin_] ** (1 - part) * LATENCY_MS[bin_ + 1] ** part


def _sums(counts: NDArray[Any]) -> Numbers:
    zero = np.zeros((1, *counts.shape[1:]))
    return np.concatenate([zero, np.cumsum(counts, axis=0, dtype=np.float64)])


def _window(sums: Numbers, window: int) -> Numbers:
    start = np.maximum(np.arange(1, len(sums)) - window, 0)
    return sums[1:] - sums[start]


def _clumped(
    rng: np.random.Generator, requests: NDArray[np.int64], rates: Numbers
) -> NDArray[np.int64]:
    clumps = rng.poisson(requests * rates / MEAN_CLUMP)
    sizes = rng.choice(CLUMPS, size=int(clumps.sum()), p=CLUMP_ODDS)
    errors = np.zeros(len(requests), dtype=np.int64)
    np.add.at(errors, np.repeat(np.arange(len(requests)), clumps), sizes)
    return np.minimum(errors, requests)


@cache
def _odds(factor: float) -> Numbers:
    """応答時間が ``factor`` 倍のときの、階級ごとの確率。"""
    from statistics import NormalDist

    normal = NormalDist(float(np.log(MEDIAN_MS * factor)), SIGMA)
    edges = [normal.cdf(float(np.log(edge))) for edge in LATENCY_MS]
    odds = np.diff(np.array([0.0, *edges[1:-1], 1.0]))
    return odds / odds.sum()


def _latencies(
    rng: np.random.Generator, requests: NDArray[np.int64], factors: Numbers
) -> NDArray[np.int64]:
    found = np.zeros((len(requests), len(LATENCY_MS) - 1), dtype=np.int64)
    for factor in np.unique(factors):
        chosen = factors == factor
        found[chosen] = rng.multinomial(requests[chosen], _odds(float(factor)))
    return found


class Column(NamedTuple):
    """1 つの指標の、各分までの窓の値。値がなければ NaN。"""

    value: Numbers
    n: Numbers
    successes: Numbers | None = None

    def before(self, minutes: int) -> Column:
        """``minutes`` だけ前の窓。"""
        parts = [None if part is None else _shifted(part, minutes) for part in self]
        return Column(*parts)  # pyright: ignore[reportArgumentType]

    def at(self, minute: int) -> MetricSample:
        value = float(self.value[minute])
        hits = None if self.successes is None else float(self.successes[minute])
        return MetricSample(None if np.isnan(value) else value, int(self.n[minute]), hits)


def _shifted(values: Numbers, minutes: int) -> Numbers:
    return np.concatenate([np.full(minutes, np.nan), values[: len(values) - minutes]])


def _rate(part: Numbers, whole: Numbers) -> Column:
    return Column(_divided(part, whole), whole, part)


def _divided(part: Numbers, whole: Numbers) -> Numbers:
    return np.where(whole > 0, part / np.maximum(whole, 1e-12), np.nan)


def column(traffic: Traffic, metric: str, window: int) -> Column:
    """指標の名前から、各分までの値。"""
    kind = metric.partition(":")[0]
    total: Callable[[str], Numbers] = lambda name: traffic.total(name, window)  # noqa: E731
    requests, verdicts = total("requests"), total("verdicts")
    judged = verdicts - total("broken")
    columns: dict[str, Callable[[], Column]] = {
        "error_rate": lambda: _rate(total("errors"), requests),
        "trace_count": lambda: Column(requests, requests),
        "latency_p95_ms": lambda: Column(
            np.where(requests > 0, traffic.percentile(95, window), np.nan), requests
        ),
        "cost_usd_per_hour": lambda: Column(total("cost") * 60 / window, requests),
        "cost_usd_per_request": lambda: Column(_divided(total("cost"), requests), requests),
        "pass_rate": lambda: _rate(judged - total("ungrounded"), judged),
        "scorer_error_rate": lambda: _rate(total("broken"), verdicts),
        "assessment_count": lambda: Column(verdicts, verdicts),
        "thumbs_down_rate": lambda: _rate(total("disliked"), total("votes")),
    }
    return columns[kind]()


def firings(rule: AlertRule, traffic: Traffic) -> Iterator[int]:
    """発報した分。評価は 1 分ごと。"""
    now = column(traffic, rule.metric, _minutes(rule.window))
    columns = [now] if rule.compare is None else [now, now.before(_minutes(rule.compare))]
    hold, keep = parse_duration(rule.for_), parse_duration(rule.keep_firing_for)
    state = RuleState(rule.name)
    calm = _calm(rule, columns)  # 待ってもいない静かな分は、状態が変わらない
    for minute in range(len(calm)):
        if calm[minute] and state.phase == "inactive":
            continue
        before = state.phase
        samples = [one.at(minute) for one in columns if not np.isnan(one.n[minute])]
        if len(samples) == len(columns):
            breached = rule.judge(samples, before == "firing")
            state.advance(breached, START + timedelta(minutes=minute), hold, keep)
        if before != "firing" and state.phase == "firing":
            yield minute


def _minutes(length: Any) -> int:
    return round(parse_duration(length) / timedelta(minutes=1))


def _calm(rule: AlertRule, columns: list[Column]) -> NDArray[np.bool_]:
    value = columns[0].value
    if len(columns) == 2:
        value = _divided(value, columns[1].value)
    beyond = value > rule.threshold if rule.op == ">" else value < rule.threshold
    return ~(beyond & (columns[-1].n >= rule.min_samples))


def quiet_days(seed: int, per_second: float, error_rate: float, days: int = 20) -> Traffic:
    """平穏な ``days`` 日と、その前の 1 週間。"""
    world = quiet_world(WEEK + days * DAY)
    world["errors"][:] = error_rate
    rng = np.random.default_rng([seed, round(per_second * 100), round(error_rate * 10_000)])
    return Traffic(rng, per_second, world)


def false_alarms(traffic: Traffic, rules: Sequence[AlertRule] = RULES) -> dict[str, int]:
    """平穏な日の、ルールごとの発報の数。"""
    return {rule.name: sum(at >= WEEK for at in firings(rule, traffic)) for rule in rules}


def pages(found: Mapping[str, int]) -> int:
    """発報のうち、人を呼び出すもの。"""
    return sum(found.get(rule.name, 0) for rule in RULES if rule.severity in PAGES)


ERROR_RULES = ("high_error_rate", "outage", "errors_for_an_hour")


@dataclass(frozen=True)
class Incident:
    """障害の種類。"""

    title: str
    rules: tuple[str, ...]
    """見つけるべきルール。"""
    begin: Callable[[World, slice], None]
    minutes: int = 180

    @classmethod
    def errors(cls, rate: float) -> Incident:
        """1 時間続くエラー。すべてが失敗するなら、固まりはない。"""
        begin = _set("down" if rate == 1 else "errors", rate)
        return cls(f"エラー率 {rate:.0%}", ERROR_RULES, begin, 60)


def _set(name: str, value: float) -> Callable[[World, slice], None]:
    def begin(world: World, when: slice) -> None:
        world[name][when] = value

    return begin


def _ramp(world: World, when: slice) -> None:
    world["errors"][when] = np.linspace(0.01, 0.2, len(world["errors"][when]))


def _outage(world: World, when: slice) -> None:
    """40 秒の全断。始まりの分の 40 秒目から。"""
    world["down"][when.start : when.start + 2] = 1 / 3


INCIDENTS = (
    Incident("エラーが 2 時間かけて増える", ERROR_RULES, _ramp, 120),
    Incident("40 秒の全断", ERROR_RULES, _outage, 10),
    Incident("エラー率 8%", ERROR_RULES, _set("errors", 0.08)),
    Incident("コスト 3 倍", ("cost_per_request_rising",), _set("cost", 3)),
    Incident("応答時間 3 倍", ("slower_than_yesterday", "slow_p95"), _set("latency", 3)),
    Incident("低評価が増える", ("thumbs_down_rising",), _set("disliked", 0.4), 720),
    Incident("根拠のない回答", ("ungrounded_answers",), _set("ungrounded", 0.4)),
    Incident("スコアラーが止まる", ("scorer_silent",), _set("judged", 0.0)),
    Incident("スコアラーが失敗する", ("scorer_failing",), _set("unjudgeable", 0.5)),
    Incident("通信が止まる", ("traffic_drop", "no_traffic"), _set("load", 0.0)),
)


ROUNDS = 4
"""1 つの乱数で、障害を何回起こすか。"""


def moments(seeds: Iterable[int]) -> Iterator[tuple[int, int]]:
    """(乱数, 障害が始まる、1 日の中の分)。"""
    for seed in seeds:
        starts = np.random.default_rng(seed).integers(0, DAY, ROUNDS)
        yield from ((seed, int(start)) for start in starts)


def delay(incident: Incident, seed: int, per_second: float, start: int) -> int | None:
    """``start`` 分に始まった障害を、正しい種類のルールが見つけるまでの分数。"""
    begins = WEEK + start
    world = quiet_world(begins + incident.minutes)
    incident.begin(world, slice(begins, begins + incident.minutes))
    traffic = Traffic(np.random.default_rng([seed, start]), per_second, world)
    found = [
        at - begins + 1
        for rule in RULES
        if rule.name in incident.rules
        for at in firings(rule, traffic)
        if at >= begins
    ]
    return min(found, default=None)
