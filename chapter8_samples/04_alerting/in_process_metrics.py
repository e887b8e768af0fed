"""8.4.1 アラートの指標を、アプリのプロセスの中で数える(サーバーのないアプリ向け)。

トレースを OTLP に出すだけのアプリには、指標を聞く相手がいない。スパンが終わるたびに 10 秒の区画へ
数えておけば、同じルールをそのまま使える。間引く前のすべてのリクエストを数えられるのも利点になる。

実行::

    $ python chapter8_samples/04_alerting/in_process_metrics.py
    指標                  プロセスの中    MLflow
    trace_count               40.000    40.000
    error_rate                 0.100     0.100
    cost_usd                   0.120     0.120
    total_tokens            4800.000  4800.000
    発報: high_error_rate = 0.1 (例 3 件)
    遅延 10 万件: p50 と p95 と p99 の誤差は 1% 以内、記憶は 1 区画に 197 個の整数
    2 つのワーカーを合わせると: trace_count = 80

Databricks でもそのまま使う。数えるのは自分のプロセスの分だけなので、ワーカーが N 個あれば
N 個の部分的な値になる(``snapshot`` を集めて ``merged`` で合わせる)。プロセスが終われば消える。
"""

from __future__ import annotations

import copy
import heapq
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING or __package__:
    from .trace_metrics import (
        FAIL_VALUES,
        MetricSample,
        MetricSourceError,
        Tally,
        TraceRow,
        measure,
        verdict,
    )
else:  # trace_metrics.py と 2 枚だけ写したとき、またはパスで実行したとき
    from trace_metrics import (
        FAIL_VALUES,
        MetricSample,
        MetricSourceError,
        Tally,
        TraceRow,
        measure,
        verdict,
    )

K = TypeVar("K", bound=Hashable)

SLOT_SECONDS = 10
"""一つの区画の長さ。窓の端は、この単位に丸める。"""
GROWTH = 1.02
"""遅延の階級の幅。隣の階級との比なので、分位点の誤差は大きくても 1% になる。"""
MIN_MS = 0.001
EXAMPLES = 3
"""区画ごとに覚えておく、悪いトレースの数。"""
MAX_OPEN_SPANS = 10_000
"""子のコストを預かったまま、終わりを待つ親スパンの上限。"""


def bucket_of(latency_ms: float) -> int:
    """遅延の階級の番号。"""
    return math.ceil(math.log(max(latency_ms, MIN_MS)) / math.log(GROWTH))


def bucket_value(bucket: int) -> float:
    """階級の代表値(ms)。階級の両端から同じ比だけ離れた値。"""
    return GROWTH**bucket * 2 / (1 + GROWTH)


def _count(table: dict[K, Tally], key: K, more: Tally) -> None:
    old = table.get(key, Tally(0.0, 0))
    table[key] = Tally(old.weight + more.weight, old.seen + more.seen)


@dataclass
class Slot:
    """10 秒分の件数。足し合わせると、長い窓やほかのプロセスの分も含む値になる。"""

    counts: dict[tuple[str, str], Tally] = field(default_factory=dict[tuple[str, str], Tally])
    """(評価の名前, 値) ごとの件数。名前が空の行は、トレースの状態。"""
    sums: dict[str, float] = field(default_factory=dict[str, float])
    buckets: dict[int, Tally] = field(default_factory=dict[int, Tally])
    examples: dict[str, list[tuple[float, str]]] = field(
        default_factory=dict[str, list[tuple[float, str]]]
    )

    def add(self, row: TraceRow) -> None:
        """1 件を数える。"""
        one = Tally(row.weight, 1)
        _count(self.counts, ("", row.state), one)
        self._sum("cost_usd", (row.cost_usd or 0.0) * row.weight)
        for kind, tokens in row.tokens.items():
            self._sum(kind, tokens * row.weight)
        if row.latency_ms is not None and math.isfinite(row.latency_ms):
            _count(self.buckets, bucket_of(row.latency_ms), one)
            self._sum("latency_ms", row.latency_ms * row.weight)
        self._note("latency", row.latency_ms or 0.0, row.trace_id)
        self._note("cost_usd", row.cost_usd or 0.0, row.trace_id)
        if row.state == "ERROR":
            self._note("error_rate", row.at_ms, row.trace_id)
        for name, value in row.assessments:
            self.judge(name, value, row)

    def judge(self, name: str, value: str, row: TraceRow) -> None:
        """評価 1 件を数える。"""
        _count(self.counts, (name, value), Tally(row.weight, 1))
        if value in FAIL_VALUES or value == "error":
            kind = "error" if value == "error" else "fail"
            self._note(f"{kind}:{name}", row.at_ms, row.trace_id)

    def merge(self, other: Slot) -> None:
        """ほかの区画を足す。"""
        for key, tally in other.counts.items():
            _count(self.counts, key, tally)
        for bucket, tally in other.buckets.items():
            _count(self.buckets, bucket, tally)
        for kind, amount in other.sums.items():
            self._sum(kind, amount)
        for kind, found in other.examples.items():
            for badness, trace_id in found:
                self._note(kind, badness, trace_id)

    def _sum(self, kind: str, amount: float) -> None:
        self.sums[kind] = self.sums.get(kind, 0.0) + amount

    def _note(self, kind: str, badness: float, trace_id: str) -> None:
        worst = self.examples.setdefault(kind, [])
        if trace_id:
            heapq.heappush(worst, (badness, trace_id))
        if len(worst) > EXAMPLES:
            heapq.heappop(worst)

    def states(self) -> dict[str, Tally]:
        """トレースの状態ごとの件数。"""
        return self.verdicts("")

    def verdicts(self, name: str) -> dict[str, Tally]:
        """評価の値ごとの件数。"""
        return {value: tally for (n, value), tally in self.counts.items() if n == name}

    def tokens(self, kind: str) -> float:
        """トークンの合計。"""
        return self.sums.get(kind, 0.0)

    def cost_usd(self) -> float:
        """コストの合計(USD)。"""
        return self.sums.get("cost_usd", 0.0)

    def latency_ms(self, what: str) -> float | None:
        """分位点(誤差 1% 以内)か、正確な平均。"""
        weight = sum(tally.weight for tally in self.buckets.values())
        if not weight:
            return None
        if what == "avg":
            return self.sums["latency_ms"] / weight
        q = float(what.removeprefix("p")) / 100
        if any(tally.weight != tally.seen for tally in self.buckets.values()):
            return self._at_rank(weight * q)
        rank = (weight - 1) * q  # 間引きがなければ、ほかの出どころと同じ線形補間
        low, high = self._at_rank(math.floor(rank) + 1), self._at_rank(math.ceil(rank) + 1)
        return low + (high - low) * (rank - math.floor(rank))

    def _at_rank(self, rank: float) -> float:
        seen = 0.0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket].weight
            if seen >= rank:
                return bucket_value(bucket)
        return bucket_value(max(self.buckets))


class InProcessMetricSource:
    """このプロセスで起きたことだけを数える ``MetricSource``。どのスレッドから呼んでもよい。

    Args:
        keep: 覚えておく長さ。ルールの最も長い窓以上にする。
        clock: 時刻の分からない記録に使う、UTC の秒。
    """

    def __init__(
        self,
        *,
        keep: timedelta = timedelta(hours=6),
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.keep, self._clock = keep, clock
        # 遡って読む分(offset)と、書きかけの区画の余裕を持たせる
        self._capacity = math.ceil((keep + timedelta(minutes=10)).total_seconds() / SLOT_SECONDS)
        self._slots: dict[int, Slot] = {}
        self._lock = threading.Lock()

    def record(self, row: TraceRow) -> None:
        """終わったリクエスト 1 件を数える。"""
        with self._lock:
            self._slot(row.at_ms).add(row)

    def record_feedback(
        self, name: str, value: Any, *, at: datetime | None = None, trace_id: str = ""
    ) -> None:
        """評価やフィードバック 1 件を数える。

        Args:
            value: bool か yes/no。``None`` は、スコアラーの失敗。
            at: 評価したリクエストの時刻。省略するといま(MLflow から読むと、その時刻になる)。
        """
        at_ms = round((at.timestamp() if at else self._clock()) * 1000)
        with self._lock:
            row = TraceRow(trace_id=trace_id, at_ms=at_ms)
            self._slot(at_ms).judge(name, verdict(value), row)

    def span_processor(self) -> Callable[[Any], None]:
        """``mlflow.tracing.configure(span_processors=[...])`` に渡す関数。

        遅延は、ルートスパンの終わりに呼ばれた時点までを測る。
        """
        open_spans = OpenSpans()

        def count_span(span: Any) -> None:
            if row := open_spans.end(span, self._clock):
                self.record(row)

        return count_span

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。両端は 10 秒に丸める。"""
        numbers = self._window(window, at)
        value, n, successes = measure(metric, window.total_seconds(), numbers)
        return MetricSample(
            metric=metric, value=value, n=n, start=at - window, end=at, successes=successes
        )

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int = 3) -> list[str]:
        """その指標を悪くしているトレースの ID(悪い順、多くても 3 件)。"""
        kind, _, name = metric.partition(":")
        if name:
            kind = f"{'error' if kind == 'scorer_error_rate' else 'fail'}:{name}"
        elif kind != "error_rate":
            kind = "cost_usd" if kind.startswith("cost_usd") else "latency"
        found = sorted(self._window(window, at).examples.get(kind, []), reverse=True)
        return [trace_id for _, trace_id in found[:limit]]

    def snapshot(self) -> dict[int, Slot]:
        """今までの区画の写し。pickle できるので、ほかのプロセスへ渡せる。"""
        with self._lock:
            return copy.deepcopy(self._slots)

    @classmethod
    def merged(
        cls, snapshots: Iterable[Mapping[int, Slot]], **options: Any
    ) -> InProcessMetricSource:
        """各ワーカーの ``snapshot`` を合わせた出どころ。評価のたびに作り直す。"""
        source = cls(**options)
        for snapshot in snapshots:
            for index, slot in snapshot.items():
                source._slots.setdefault(index, Slot()).merge(slot)
        return source

    def _slot(self, at_ms: int) -> Slot:
        index = at_ms // (SLOT_SECONDS * 1000)
        slot = self._slots.setdefault(index, Slot())
        if len(self._slots) > self._capacity:
            del self._slots[min(self._slots)]
        return slot

    def _window(self, window: timedelta, at: datetime) -> Slot:
        if at.tzinfo is None:
            raise MetricSourceError(f"{at!r} has no timezone; use datetime.now(timezone.utc)")
        if not timedelta(seconds=SLOT_SECONDS) <= window <= self.keep:
            raise MetricSourceError(
                f"window {window} is not between {SLOT_SECONDS} s and keep={self.keep}; "
                "raise keep of InProcessMetricSource"
            )
        first, last = (math.floor(t.timestamp() / SLOT_SECONDS) for t in (at - window, at))
        total = Slot()
        with self._lock:
            for index in self._slots.keys() & set(range(first + 1, last + 1)):
                total.merge(self._slots[index])
        return total


class OpenSpans:
    """子スパンのトークンとコストを、ルートまで持ち上げる。数え方は MLflow と同じ。

    自分の値を持つスパンでは、その下の値を足さない(二重に数えない)。
    """

    def __init__(self) -> None:
        self._below: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """子の値を預かっている親スパンの数。"""
        return len(self._below)

    def end(self, span: Any, clock: Callable[[], float]) -> TraceRow | None:
        """終わったスパンを受け取る。ルートなら、トレース全体の行を返す。"""
        with self._lock:
            found = self._below.pop((span.trace_id, span.span_id), {})
            for key in ("mlflow.chat.tokenUsage", "mlflow.llm.cost"):
                if own := span.get_attribute(key):
                    found[key] = dict(own)
            if span.parent_id is not None:
                self._lift((span.trace_id, span.parent_id), found)
                return None
        began = span.start_time_ns
        ended = span.end_time_ns or round(clock() * 1e9)
        failed = str(getattr(span.status.status_code, "value", "")) == "ERROR"
        return TraceRow(
            trace_id=span.trace_id,
            at_ms=began // 1_000_000,
            state="ERROR" if failed else "OK",
            latency_ms=max(0, ended - began) / 1e6,
            tokens=found.get("mlflow.chat.tokenUsage", {}),
            cost_usd=found.get("mlflow.llm.cost", {}).get("total_cost"),
        )

    def _lift(self, parent: tuple[str, str], found: Mapping[str, Mapping[str, float]]) -> None:
        if not found:
            return
        held = self._below.setdefault(parent, {})
        for key, amounts in found.items():
            sums = held.setdefault(key, {})
            for name, amount in amounts.items():
                sums[name] = sums.get(name, 0) + (amount or 0)
        if len(self._below) > MAX_OPEN_SPANS:  # 終わらなかったトレース: 古いものから忘れる
            del self._below[next(iter(self._below))]


def main() -> None:
    """本物のスパンを数え、MLflow に記録された値と比べ、アラートを 1 つ出す。"""
    import random
    from datetime import timezone

    import mlflow
    import mlflow.tracing

    from chapter8_samples import _lab
    from chapter8_samples.alerting.alert_config import AlertConfig
    from chapter8_samples.alerting.alert_engine import AlertEngine
    from chapter8_samples.alerting.alert_rules import AlertRule
    from chapter8_samples.alerting.in_process_metrics import InProcessMetricSource
    from chapter8_samples.alerting.metric_source import metric_source

    source, window = InProcessMetricSource(), timedelta(minutes=5)
    with _lab.sample("ch8-in-process-metrics"):
        # まとめ送りの切れ目をまたいだトレースでは、SQLite に残るコストが欠けることがある(3.17)
        os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
        mlflow.tracing.configure(span_processors=[source.span_processor()])
        for i in range(40):
            with mlflow.start_span("answer") as root:
                with mlflow.start_span("llm", span_type="LLM") as call:
                    usage = {"input_tokens": 100, "output_tokens": 20, "total_tokens": 120}
                    call.set_attribute("mlflow.chat.tokenUsage", usage)
                    call.set_attribute("mlflow.llm.cost", {"total_cost": 0.003})
                    call.set_inputs("返品できますか")
                    call.set_outputs("できます")
                if i % 10 == 9:
                    root.set_status("ERROR")
        at, stored = datetime.now(timezone.utc), metric_source("ch8-in-process-metrics")
        print("指標                  プロセスの中    MLflow")
        for metric in ("trace_count", "error_rate", "cost_usd", "total_tokens"):
            pair = [s.sample(metric, window, at).value for s in (source, stored)]
            print(f"{metric:20} {pair[0]:11.3f} {pair[1]:9.3f}")
    rule = AlertRule(name="high_error_rate", threshold=0.05)
    for alert in AlertEngine(AlertConfig(rules=[rule], offset="0s"), source).evaluate(at):
        print(f"発報: {alert.name} = {alert.value} (例 {len(alert.examples)} 件)")
    rng = random.Random(7)
    values = [rng.lognormvariate(6.6, 0.5) for _ in range(100_000)]
    slot = Slot()
    for value in values:
        slot.add(TraceRow(trace_id="", at_ms=0, latency_ms=value))
    values.sort()
    exact = {q: values[round((len(values) - 1) * q / 100)] for q in (50, 95, 99)}
    close = all(abs((slot.latency_ms(f"p{q}") or 0) / v - 1) <= 0.01 for q, v in exact.items())
    size = f"記憶は 1 区画に {len(slot.buckets)} 個の整数"
    print(f"遅延 10 万件: p50 と p95 と p99 の誤差は 1% {'以内' if close else '超'}、{size}")
    both = InProcessMetricSource.merged([source.snapshot(), source.snapshot()])
    print(f"2 つのワーカーを合わせると: trace_count = {both.sample('trace_count', window, at).n}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # インストールなしでも動くように
    main()
