"""8.4.1 アラートの指標: 名前と計算式。

エラー率、遅延、コスト、品質の指標は、すでにトレースと評価の中にある。ここにあるのは式だけで、トレースを
どこから読むかは問わない(読むのは ``source.py``)。間引いたトレースは重みで元の件数に直す。

Databricks でもそのまま使う。
"""

from __future__ import annotations

import difflib
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from ..durations import parse_duration

PASS_VALUES = frozenset({"yes", "true", "pass", "passed", "correct", "1", "1.0"})
FAIL_VALUES = frozenset({"no", "false", "fail", "failed", "incorrect", "0", "0.0"})
JUDGED_RATES = ("pass_rate", "fail_rate", "thumbs_down_rate", "scorer_error_rate")
NAMED_METRICS = (*JUDGED_RATES, "assessment_count")
"""``pass_rate:groundedness`` のように、評価の名前を続ける指標。"""
SLOW_RATE = "slow_rate"
"""``slow_rate:3s`` のように、応答時間の上限を続ける指標。それより遅いリクエストの割合。"""
PLAIN_METRICS = (
    "trace_count",
    "error_rate",
    "latency_p50_ms",
    "latency_p95_ms",
    "latency_p99_ms",
    "time_to_first_chunk_p95_ms",
    "cost_usd",
    "cost_usd_per_hour",
    "cost_usd_per_request",
    "input_tokens",
    "output_tokens",
    "total_tokens",
    "total_tokens_per_request",
)
RATE_METRICS = ("error_rate", SLOW_RATE, *JUDGED_RATES)
"""割合の指標。分子と分母があるので、信頼区間(``confidence``)を使える。"""


class MetricSourceError(RuntimeError):
    """指標を求められない(エクスペリメントがない、サーバーに届かない、知らない指標)。"""


@dataclass(frozen=True)
class MetricSample:
    """一つの集計期間の指標の値。"""

    value: float | None
    """指標の単位の値。標本がなく決まらないときは ``None``。"""
    n: int
    """値を求めた標本(トレースまたは評価)の数。"""
    successes: float | None = None
    """割合の分子。割合でない指標では ``None``。"""


class MetricSource(Protocol):
    """指標の出どころ。``AlertEngine`` はこの形なら何でも使える。"""

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。求められなければ ``MetricSourceError``。"""
        ...

    def split(
        self, metric: str, window: timedelta, at: datetime, by: str
    ) -> Mapping[str, MetricSample]:
        """``by``(model、prompt_version、tag:名前)の値 -> ``(at - window, at]`` の値。"""
        ...

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int = 3) -> list[str]:
        """その指標を悪くしているトレースの ID。"""
        ...


@dataclass(frozen=True, kw_only=True)
class TraceRow:
    """指標に要る分だけを抜き出したトレース。"""

    trace_id: str
    at_ms: int
    state: str = "OK"
    latency_ms: float | None = None
    first_chunk_ms: float | None = None
    """ストリーミングの、最初の断片までの時間。"""
    tokens: Mapping[str, float] = field(default_factory=dict[str, float])
    cost_usd: float | None = None
    weight: float = 1.0
    """間引いて残したトレース 1 件が代表する件数(``sampling.weight``)。"""
    assessments: tuple[tuple[str, str], ...] = ()
    """(名前, 値)。失敗したスコアラーの値は ``error``。"""
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    """タグとメタデータ。"""


def percentile(values: Iterable[tuple[float, float]], q: float) -> float | None:
    """(値, 重み) の分位点。線形補間で、重み 3 の値は 3 個と数える(``numpy.percentile`` と同じ)。

    >>> percentile([(10.0, 1), (20.0, 1), (30.0, 1), (40.0, 1)], 50)
    25.0
    """
    rows = sorted(values)
    if not rows:
        return None
    counts = list(accumulate(weight for _, weight in rows))
    position = (counts[-1] - 1) * q / 100
    rank = math.floor(position)
    low, high = (
        rows[min(bisect_right(counts, place), len(rows) - 1)][0] for place in (rank, rank + 1)
    )
    return low + (high - low) * (position - rank)


class Tally(NamedTuple):
    """件数。``weight`` は間引きを補正した推定値、``seen`` は実際に見た数。"""

    weight: float
    seen: int


class Numbers(Protocol):
    """一つの集計期間の集計値。

    行から数えたもの(``RowNumbers``)も、サーバーに集計させたもの(``ServerNumbers``)も、同じ式で
    指標になる。
    """

    def states(self) -> Mapping[str, Tally]: ...
    def latency_ms(self, q: float) -> float | None: ...
    def slower_than(self, milliseconds: float) -> Tally: ...
    def first_chunks(self) -> Sequence[tuple[float, float]]: ...
    def total(self, amount: str) -> float: ...
    def verdicts(self, name: str) -> Mapping[str, Tally]: ...


def measure(metric: str, window_seconds: float, numbers: Numbers) -> MetricSample:
    """指標の名前から値を求める。知らない名前なら ``MetricSourceError``。"""
    if problem := metric_problem(metric):
        raise MetricSourceError(problem)
    kind, _, name = metric.partition(":")
    if name and kind != SLOW_RATE:
        return _judged(kind, name, numbers.verdicts(name))
    if kind == "time_to_first_chunk_p95_ms":
        chunks = numbers.first_chunks()
        return MetricSample(percentile(chunks, 95), len(chunks))
    states = numbers.states()
    finished = [states.get("OK"), states.get("ERROR")]
    if kind == "error_rate":
        return _ratio([states.get("ERROR")], finished)
    if kind == SLOW_RATE:
        limit = parse_duration(name) / timedelta(milliseconds=1)
        return _ratio([numbers.slower_than(limit)], finished)
    total = _add(states.values())
    if kind.startswith("latency_p"):
        q = float(kind.removeprefix("latency_p").removesuffix("_ms"))
        return MetricSample(numbers.latency_ms(q), total.seen)
    return MetricSample(_amount(kind, window_seconds, total, numbers), total.seen)


def metric_problem(metric: str, *, rate_for: str = "") -> str:
    """指標の名前の誤り。正しければ空。``rate_for`` を渡すと、割合の指標かも見る。"""
    kind, colon, name = metric.partition(":")
    if kind == SLOW_RATE:
        try:
            limit = parse_duration(name)
        except ValueError:
            limit = timedelta(0)
        if not limit:
            return f"{name!r} is not a limit; write slow_rate:3s or slow_rate:1500ms"
    elif kind in NAMED_METRICS:
        if not name or name != name.strip():
            return f"unknown metric {metric!r}; write {kind}:<assessment name>"
    elif colon or kind not in PLAIN_METRICS:
        near = difflib.get_close_matches(kind, (*PLAIN_METRICS, *NAMED_METRICS, SLOW_RATE), 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PLAIN_METRICS)}"
        return f"unknown metric {metric!r}; {hint}"
    if rate_for and kind not in RATE_METRICS:
        return f"{metric!r} is not a rate; {rate_for} needs one of {', '.join(RATE_METRICS)}"
    return ""


def _add(tallies: Iterable[Tally | None]) -> Tally:
    found = [t for t in tallies if t]
    return Tally(sum((t.weight for t in found), 0.0), sum(t.seen for t in found))


def _ratio(part: Iterable[Tally | None], whole: Iterable[Tally | None]) -> MetricSample:
    top, bottom = _add(part), _add(whole)
    if not bottom.weight:
        return MetricSample(None, 0)
    rate = top.weight / bottom.weight
    # 分子は実際に見た標本の尺度に直す: 信頼区間は、補正した件数ではなく見た件数で決まる
    return MetricSample(rate, bottom.seen, rate * bottom.seen)


def _amount(kind: str, window_seconds: float, total: Tally, numbers: Numbers) -> float | None:
    base, _, per = kind.partition("_per_")
    if base == "trace_count":
        return total.weight
    value = numbers.total(base)
    if per == "request":
        return value / total.weight if total.weight else None
    return value * 3600 / window_seconds if per == "hour" else value


def _judged(kind: str, name: str, verdicts: Mapping[str, Tally]) -> MetricSample:
    everything = list(verdicts.values())
    if kind == "assessment_count":
        total = _add(everything)
        return MetricSample(total.weight, total.seen)
    if kind == "scorer_error_rate":
        return _ratio([verdicts.get("error")], everything)
    good = [tally for value, tally in verdicts.items() if value in PASS_VALUES]
    bad = [tally for value, tally in verdicts.items() if value in FAIL_VALUES]
    if not good + bad and verdicts.keys() - {"error"}:
        raise MetricSourceError(
            f"{kind}:{name} needs yes/no values, found {sorted(verdicts)[:5]}; "
            "let the scorer return a bool or yes/no"
        )
    return _ratio(good if kind == "pass_rate" else bad, good + bad)


def verdict(value: Any) -> str:
    """評価の値を、比べられる小文字の文字列にする。

    >>> verdict(True), verdict("Yes"), verdict(None)
    ('true', 'yes', 'error')
    """
    return "error" if value is None else str(value).strip().lower()


class RowNumbers:
    """トレースの行から数える。"""

    def __init__(self, rows: Sequence[TraceRow]) -> None:
        self.rows = rows

    def _count(self, keys: Iterable[tuple[str, float]]) -> dict[str, Tally]:
        found: dict[str, list[float]] = {}
        for key, weight in keys:
            found.setdefault(key, []).append(weight)
        return {key: Tally(sum(weights), len(weights)) for key, weights in found.items()}

    def states(self) -> dict[str, Tally]:
        """状態ごとの件数。"""
        return self._count((row.state, row.weight) for row in self.rows)

    def latency_ms(self, q: float) -> float | None:
        """遅延の分位点(ms)。"""
        return percentile(
            [(r.latency_ms, r.weight) for r in self.rows if r.latency_ms is not None], q
        )

    def slower_than(self, milliseconds: float) -> Tally:
        """応答時間がこれを超えたトレース。"""
        weights = [r.weight for r in self.rows if (r.latency_ms or 0) > milliseconds]
        return Tally(sum(weights), len(weights))

    def first_chunks(self) -> list[tuple[float, float]]:
        """最初の断片までの(ミリ秒, 重み)。"""
        return [(r.first_chunk_ms, r.weight) for r in self.rows if r.first_chunk_ms is not None]

    def total(self, amount: str) -> float:
        """コスト(``cost_usd``)か、トークンの合計。"""
        if amount == "cost_usd":
            return sum(((row.cost_usd or 0.0) * row.weight for row in self.rows), 0.0)
        return sum((row.tokens.get(amount, 0) * row.weight for row in self.rows), 0.0)

    def verdicts(self, name: str) -> dict[str, Tally]:
        """評価の値ごとの件数。"""
        pairs = ((v, r.weight) for r in self.rows for n, v in r.assessments if n == name)
        return self._count(pairs)

    def worst(self, metric: str) -> list[TraceRow]:
        """その指標を悪くしている行を、悪い順に。"""
        kind, _, name = metric.partition(":")
        if kind == "error_rate":
            return [row for row in self.rows if row.state == "ERROR"]
        if name and kind != SLOW_RATE:
            bad = {"error"} if kind == "scorer_error_rate" else FAIL_VALUES
            return [r for r in self.rows if any(n == name and v in bad for n, v in r.assessments)]
        if kind.startswith("cost_usd"):
            return sorted(self.rows, key=lambda row: -(row.cost_usd or 0.0))
        if kind.startswith("time_to_first_chunk_"):
            return sorted(self.rows, key=lambda row: -(row.first_chunk_ms or 0.0))
        return sorted(self.rows, key=lambda row: -(row.latency_ms or 0.0))
