"""8.4.4 アラートの指標を Prometheus に公開する。

書き出したルール(``to_prometheus_rules``)が見る値だけを、同じ名前で出す。名前は Prometheus の
決まり(秒、ratio、累計は ``_total``)に合わせてある。

Databricks でも動く(Prometheus から届くところに置く)。``prometheus-client`` が要る。
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from threading import Lock
from typing import Any

from ..durations import format_duration
from .measures import SLOW_RATE, MetricSample, MetricSource
from .source import samples_of

logger = logging.getLogger(__name__)

Gate = Callable[[Sequence[MetricSample]], bool]
PREFIX = "llm_app_"
FAILURES = f"{PREFIX}read_failures_total"
"""読めなかった値の累計。書き出したルールは、これが増えることと、ないことを監視する。"""
IRREGULAR = {"trace_count": "traces", "assessment_count": "assessments"}


@dataclass(frozen=True, kw_only=True)
class Series:
    """ルールが見る一つの値。``by`` があれば、ラベルの値の数だけの系列になる。"""

    metric: str
    window: timedelta
    ago: timedelta | None = None
    """これだけ前の期間との比にする。"""
    by: str | None = None
    counts: bool = False
    """値の代わりに、標本の数を出す(前の期間との比では、前の期間の標本の数)。"""
    gate: Gate | None = None
    """値の代わりに、偶然の揺れでないか(1 か 0)を出す。"""
    rule: str = ""
    """``gate`` を使うルール。"""

    @property
    def name(self) -> str:
        """Prometheus の名前。

        >>> Series(metric="latency_p95_ms", window=timedelta(minutes=5)).name
        'llm_app_latency_p95_seconds'
        """
        kind = self.metric.partition(":")[0]
        base = IRREGULAR.get(kind) or re.sub("_rate$", "_ratio", re.sub("_ms$", "_seconds", kind))
        name = PREFIX + base
        if self.ago is not None:
            name += "_vs_earlier"
        if self.by:
            name += f"_by_{self.by_label}"
        if self.gate:
            name += "_significant"
        elif self.counts:
            name += "_samples"
        return name

    @property
    def by_label(self) -> str:
        """``by`` の値を入れるラベルの名前(``tag:tenant`` は ``tag_tenant``)。"""
        return re.sub(r"\W", "_", self.by or "", flags=re.ASCII)

    @property
    def scale(self) -> float:
        """指標の単位から Prometheus の単位(秒など)への倍率。"""
        return 0.001 if self.metric.endswith("_ms") and self.ago is None else 1

    @property
    def labels(self) -> dict[str, str]:
        """``by`` のほかのラベル。"""
        kind, _, name = self.metric.partition(":")
        found = {"window": format_duration(self.window)}
        if self.ago is not None:
            found["compare"] = format_duration(self.ago)
        if self.rule:
            found["rule"] = self.rule
        if name:
            found["limit" if kind == SLOW_RATE else "assessment"] = name
        return found

    def selector(self) -> str:
        """PromQL のセレクター。

        >>> day = timedelta(days=1)
        >>> Series(metric="pass_rate:tone", window=day).selector()
        'llm_app_pass_ratio{window="1d",assessment="tone"}'
        """
        pairs = [
            f"{key}={json.dumps(text, ensure_ascii=False)}" for key, text in self.labels.items()
        ]
        return f"{self.name}{{{','.join(pairs)}}}"

    def read(self, source: MetricSource, at: datetime) -> dict[str, float | None]:
        """``by`` の値(分けなければ空) -> いまの値。"""
        found = samples_of(source, self.metric, self.window, at, by=self.by, ago=self.ago)
        return {label: self._value(samples) for label, samples in found.items()}

    def _value(self, samples: Sequence[MetricSample]) -> float | None:
        if self.counts:
            return samples[-1].n
        value = samples[0].value
        if value is None:
            return None
        if self.ago is not None:
            earlier = samples[1].value
            if not earlier:
                return None
            value /= earlier
        return float(self.gate(samples)) if self.gate else value * self.scale


class MetricsCollector:
    """``prometheus_client`` のコレクター。読みに来られるたびに、いまの値を求める。

    求められない値は出さずに ``llm_app_read_failures_total`` を増やす。標本のない値も出さない。
    """

    def __init__(
        self,
        series: Iterable[Series],
        source: MetricSource,
        *,
        offset: timedelta = timedelta(0),
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
    ) -> None:
        # 長い期間から読むと、短い期間は読んだものの一部で済む
        self._series = sorted(dict.fromkeys(series), key=lambda one: -one.window)
        self._source, self._offset, self._clock = source, offset, clock
        self._lock = Lock()  # 出どころは、一度に一つの問い合わせだけを受ける
        self._failures = 0

    def describe(self) -> list[Any]:
        """登録のときには、何も読まない。"""
        return []

    def collect(self) -> Iterator[Any]:
        """いまの値。"""
        from prometheus_client.core import CounterMetricFamily

        gauges: dict[str, Any] = {}
        if self._lock.acquire(timeout=9):  # Prometheus は 10 秒で諦めて、また来る
            try:
                gauges = self._gauges(self._clock() - self._offset)
            finally:
                self._lock.release()
        else:
            self._failures += 1
        yield from gauges.values()
        yield CounterMetricFamily(
            FAILURES.removesuffix("_total"), "Values that could not be read.", self._failures
        )

    def _gauges(self, at: datetime) -> dict[str, Any]:
        gauges: dict[str, Any] = {}
        for series in self._series:
            try:
                readings = series.read(self._source, at)
            except Exception as error:  # 一つの指標の失敗で、ほかを止めない
                self._failures += 1
                logger.warning("%s could not be read: %s", series.selector(), error)
                continue
            for label, value in readings.items():
                if value is not None:
                    _add(gauges, series, label, value)
        return gauges


def _add(gauges: dict[str, Any], series: Series, label: str, value: float) -> None:
    from prometheus_client.core import GaugeMetricFamily

    labels = series.labels | ({series.by_label: label} if series.by else {})
    if series.name not in gauges:
        text = f"{series.metric.partition(':')[0]} of the LLM application, from its traces."
        gauges[series.name] = GaugeMetricFamily(series.name, text, labels=list(labels))
    gauges[series.name].add_metric(list(labels.values()), value)


def serve_metrics(
    collector: MetricsCollector, *, port: int = 9464, address: str = "127.0.0.1"
) -> Any:
    """``/metrics`` を別のスレッドで公開する。戻り値の ``shutdown()`` で止める。"""
    from prometheus_client import CollectorRegistry, start_http_server

    registry = CollectorRegistry()
    registry.register(collector)
    server, _ = start_http_server(port, addr=address, registry=registry)
    return server
