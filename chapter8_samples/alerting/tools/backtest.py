"""8.4.4 アラートのルールを、過去のトレースで試す。

しきい値は、使う前に試せる。過去のトレース(または合成した障害)に同じ状態機械をかけ、何度鳴ったか、
障害の外で鳴ったか、何分で気づいたかを数える。5% を超えるたびに鳴らす素朴な方法とも比べる。

Databricks でも、``search_traces`` で読めるトレースならそのまま試せる。
"""

from __future__ import annotations

import bisect
import html
import logging
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone

from ..delivery import Alert, AlertStatus
from ..engine import AlertEngine
from ..metrics import MetricSample, RowNumbers, TraceRow, sample_of, split_samples
from ..rules import AlertConfig, Rule
from ..rules.model import ratio

logger = logging.getLogger(__name__)

Span = tuple[datetime, datetime]
"""(始まり, 終わり)。"""
LEFT, RIGHT = 52, 16
"""図の左右の余白。"""


class RecordedTraces:
    """手元のトレースの行を、時刻を自由に選べる指標の出どころにする。"""

    def __init__(self, rows: Sequence[TraceRow]) -> None:
        self._rows = sorted(rows, key=lambda row: row.at_ms)
        self._times = [row.at_ms for row in self._rows]
        self._cache: tuple[tuple[int, int], RowNumbers] = ((0, 0), RowNumbers([]))

    @property
    def span(self) -> Span:
        """最初と最後のトレースの時刻。空なら ``ValueError``。"""
        if not self._times:
            raise ValueError("there are no traces to replay")
        return _at(self._times[0]), _at(self._times[-1])

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。"""
        return sample_of(metric, window, at, self._numbers(window, at))

    def split(self, metric: str, window: timedelta, at: datetime, by: str) -> list[MetricSample]:
        """``by`` の値ごとの、``(at - window, at]`` の値。"""
        return split_samples(metric, window, at, self._numbers(window, at), by)

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int = 3) -> list[str]:
        """その指標を悪くしているトレースの ID。"""
        return [row.trace_id for row in self._numbers(window, at).worst(metric)[:limit]]

    def _numbers(self, window: timedelta, at: datetime) -> RowNumbers:
        end = round(at.timestamp() * 1000)
        low = bisect.bisect_right(self._times, end - round(window.total_seconds() * 1000))
        key = (low, bisect.bisect_right(self._times, end))
        if self._cache[0] != key:
            self._cache = (key, RowNumbers(self._rows[slice(*key)]))
        return self._cache[1]


def _at(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc)


@dataclass(frozen=True, kw_only=True)
class RuleReplay:
    """一つのルールの結果。"""

    name: str
    firings: tuple[datetime, ...] = ()
    resolutions: tuple[datetime, ...] = ()
    false_at: tuple[datetime, ...] = ()
    """``firings`` のうち、どの障害とも重ならないもの。"""
    detection: tuple[timedelta | None, ...] = ()
    """障害ごとの、始まりから気づくまで。気づかなければ ``None``、始まる前から発報中なら 0。"""
    naive_notifications: int = 0
    """同じしきい値で、評価のたびに値だけを比べて知らせた場合の通知の数。"""
    naive_false: int = 0
    values: tuple[tuple[datetime, float | None], ...] = field(default=(), repr=False)
    threshold: float = 0.0
    failures: int = 0
    """値を求められなかった評価の数。理由は ``error``。"""
    error: str = ""

    @property
    def notifications(self) -> int:
        """発報と解消の通知の数。"""
        return len(self.firings) + len(self.resolutions)

    @property
    def false_firings(self) -> int:
        """どの障害とも重ならない発報の数。"""
        return len(self.false_at)


@dataclass(frozen=True, kw_only=True)
class Replay:
    """再生の結果。"""

    rules: tuple[RuleReplay, ...]
    span: Span
    incidents: tuple[Span, ...] = ()

    def table(self) -> str:
        """ルールごとに 1 行の表。"""
        head = "素朴な通知 (外)  発報 解消 (外)  気づくまで  ルール"
        return "\n".join([head, *(_row(rule) for rule in self.rules)])

    def svg(self, *, width: int = 860, row_height: int = 110) -> str:
        """値、しきい値、発報中の帯、障害の帯を描いた SVG。時刻は UTC。"""
        height = row_height * len(self.rules) + 60
        rows = [_svg_row(self, r, i, width, row_height) for i, r in enumerate(self.rules)]
        style = "text{font:12px sans-serif;fill:#222}.s{font-size:11px;fill:#666}"
        legend = "青: 値、破線: しきい値、黄: 障害、赤: 発報中、灰: 障害の外での発報中"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
            f'<style>{style}</style><rect width="{width}" height="{height}" fill="#fff"/>'
            f'<text class="s" x="{LEFT}" y="18">{legend}</text>{"".join(rows)}'
            f"{_svg_hours(self.span, width, height)}</svg>"
        )


def _row(rule: RuleReplay) -> str:
    found = ", ".join(
        "-" if d is None else f"{d.total_seconds() / 60:.1f} 分" for d in rule.detection
    )
    return (
        f"{rule.naive_notifications:10} {rule.naive_false:4} {len(rule.firings):5} "
        f"{len(rule.resolutions):4} {rule.false_firings:4} {found or '-':>10}  {rule.name}"
        f"{f' (評価できず {rule.failures} 回: {rule.error})' if rule.failures else ''}"
    )


def _x(at: datetime, span: Span, width: int) -> float:
    whole = max(span[1] - span[0], timedelta(milliseconds=1))
    return round(LEFT + (width - LEFT - RIGHT) * ((at - span[0]) / whole), 1)


def _svg_hours(span: Span, width: int, height: int) -> str:
    """時刻の目盛り。多くても 9 本。"""
    minutes = (span[1] - span[0]) / timedelta(minutes=1)
    days = 1440 * math.ceil(minutes / 1440 / 8)
    step = next((m for m in (1, 5, 15, 60, 180, 720) if minutes / m <= 8), days)
    first = span[0].replace(hour=0, minute=0, second=0, microsecond=0)
    skipped = int((span[0] - first) / timedelta(minutes=step))
    ticks = [first + timedelta(minutes=step * (skipped + i)) for i in range(11)]
    label = "%m-%d" if step >= 1440 else "%H:%M"
    return "".join(
        f'<path d="M{x} {height - 30}v6" stroke="#999"/>'
        f'<text class="s" text-anchor="middle" x="{x}" y="{height - 10}">{at:{label}}</text>'
        for at in ticks
        if span[0] <= at <= span[1]
        for x in [_x(at, span, width)]
    )


def _svg_row(replay: Replay, rule: RuleReplay, index: int, width: int, height: int) -> str:
    head = 48 + index * height
    top, bottom = head + 8, head + height - 32
    known = [value for _, value in rule.values if value is not None]
    ceiling = max([*known, rule.threshold]) * 1.1 or 1.0

    def y(value: float) -> float:
        return round(bottom - (bottom - top) * value / ceiling, 1)

    def band(span: Span, color: str, y0: float, h: float) -> str:
        x0, x1 = (_x(at, replay.span, width) for at in span)
        w = round(max(1.5, x1 - x0), 1)
        return f'<rect x="{x0}" y="{y0}" width="{w}" height="{h}" fill="{color}"/>'

    def color(fired_at: datetime) -> str:
        return "#888" if fired_at in rule.false_at else "#c0392b"

    ends = [*rule.resolutions, *[replay.span[1]] * (len(rule.firings) - len(rule.resolutions))]
    spans = zip(rule.firings, ends, strict=True)
    pairs = ((_x(at, replay.span, width), v) for at, v in rule.values if v is not None)
    points = " ".join(f"{x},{y(value)}" for x, value in pairs)
    limit, right = y(rule.threshold), width - RIGHT
    counts = f"(発報 {len(rule.firings)} 回、うち障害の外 {rule.false_firings} 回)"
    return "".join(
        [
            *(band(i, "#fdebb8", top, bottom - top) for i in replay.incidents),
            f'<path d="M{LEFT} {bottom}H{right}" stroke="#999"/>',
            f'<path d="M{LEFT} {limit}H{right}" stroke="#c0392b" stroke-dasharray="4"/>',
            f'<polyline points="{points}" fill="none" stroke="#2f6fb0"/>',
            *(band(span, color(span[0]), bottom + 3, 6) for span in spans),
            f'<text x="{LEFT}" y="{head}">{html.escape(rule.name)} {counts}</text>',
            f'<text class="s" text-anchor="end" x="{LEFT - 6}" y="{limit + 4}">'
            f"{rule.threshold:g}</text>",
        ]
    )


def replay(
    config: AlertConfig,
    rows: Sequence[TraceRow],
    *,
    step: timedelta = timedelta(seconds=30),
    incidents: Sequence[Span] = (),
) -> Replay:
    """``rows`` の期間を ``step`` ごとに評価し、通知の数と、障害の外での発報を数える。

    発報中の繰り返し(``repeat``)は数えない。

    Args:
        incidents: 障害だった期間。終わってから最も長い期間の分は、障害のうちとみなす。

    Raises:
        ValueError: トレースかルールがない、または ``step`` が正でない。
    """
    if not config.rules or step <= timedelta(0):
        raise ValueError(f"replay needs rules and a step, got {len(config.rules)} and {step}")
    source = RecordedTraces(rows)
    start, end = source.span
    quiet = replace(config, offset="0s", repeat=None, routes=())
    engine = AlertEngine(quiet, source)
    warm_up = max(window for rule in config.rules for _, window in rule.queries()[-1:])
    moments = list(_moments(start + min(warm_up, end - start), end, step))
    events: list[tuple[datetime, Alert]] = []
    samples: dict[str, list[tuple[datetime, MetricSample]]] = {r.name: [] for r in config.rules}
    failed: dict[str, list[str]] = {r.name: [] for r in config.rules}
    rules = {rule.name: rule for rule in config.rules}
    for at in moments:
        events += [(at, alert) for alert in engine.evaluate(at)]
        for name, sample in engine.last_samples().items():
            if name in samples and name not in engine.failures:  # 失敗した回に残るのは、前の値
                samples[name].append((at, _compared(rules[name], sample, source)))
        for name, reason in engine.failures.items():
            failed[name].append(reason)
    judged = [_judge(rule, events, samples[rule.name], incidents) for rule in config.rules]
    results = [
        replace(rule, failures=len(failed[rule.name]), error="".join(failed[rule.name][:1]))
        for rule in judged
    ]
    return Replay(rules=tuple(results), span=(start, end), incidents=tuple(incidents))


def _compared(rule: Rule, sample: MetricSample, source: RecordedTraces) -> MetricSample:
    """しきい値と比べる値。前の期間と比べるルールでは、比。"""
    ago = getattr(rule, "ago", None)
    if ago is None:
        return sample
    earlier = source.sample(sample.metric, sample.end - sample.start, sample.end - ago)
    return replace(sample, value=ratio(sample, earlier))


def _moments(first: datetime, last: datetime, step: timedelta) -> Iterator[datetime]:
    while first <= last:
        yield first
        first += step


def _judge(
    rule: Rule,
    events: Sequence[tuple[datetime, Alert]],
    samples: Sequence[tuple[datetime, MetricSample]],
    incidents: Sequence[Span],
) -> RuleReplay:
    own = [(at, alert.status) for at, alert in events if alert.name == rule.name]
    fired = [at for at, status in own if status is AlertStatus.FIRING]
    resolved = [at for at, status in own if status is AlertStatus.RESOLVED]
    tail = rule.queries()[0][1]
    real = [(start, end + tail) for start, end in incidents]
    op = getattr(rule, "op", ">")
    naive = [
        at
        for at, sample in samples
        if sample.value is not None
        and (sample.value > rule.threshold if op == ">" else sample.value < rule.threshold)
    ]
    return RuleReplay(
        name=rule.name,
        firings=tuple(fired),
        resolutions=tuple(resolved),
        false_at=tuple(at for at in fired if not _inside(at, real)),
        detection=tuple(_detection(span, fired, resolved) for span in real),
        naive_notifications=len(naive),
        naive_false=sum(not _inside(at, real) for at in naive),
        values=tuple((at, sample.value) for at, sample in samples),
        threshold=rule.threshold,
    )


def _inside(at: datetime, spans: Sequence[Span]) -> bool:
    return any(start <= at <= end for start, end in spans)


def _detection(
    incident: Span, fired: Sequence[datetime], resolved: Sequence[datetime]
) -> timedelta | None:
    start, end = incident
    firing_before = [at for at in fired if at < start]
    if firing_before and not any(firing_before[-1] < at <= start for at in resolved):
        return timedelta(0)
    inside = [at for at in fired if start <= at <= end]
    return inside[0] - start if inside else None


@dataclass(frozen=True, kw_only=True)
class SyntheticTraffic:
    """障害を一つ含む(含まないこともできる)、決まった乱数の通信。"""

    seed: int = 7
    traces: int = 5000
    hours: float = 6.0
    incident: tuple[float, float] | None = (0.90, 0.95)
    """障害の期間(全体に対する割合)。``None`` なら平穏。"""
    error_rate: float = 0.02
    incident_error_rate: float = 0.25
    start: datetime = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def incidents(self) -> list[Span]:
        """障害の期間。"""
        whole = timedelta(hours=self.hours)
        low, high = self.incident or (0, 0)
        return [(self.start + low * whole, self.start + high * whole)] if self.incident else []

    def rows(self) -> list[TraceRow]:
        """トレースの行。障害の間は、エラーが増え、3 倍遅く、評価が下がる。"""
        rng = random.Random(self.seed)
        low, high = self.incident or (2.0, 2.0)
        span_ms = self.hours * 3_600_000
        first = round(self.start.timestamp() * 1000)
        return [
            self._row(rng, first + int(span_ms * i / self.traces), low <= i / self.traces < high, i)
            for i in range(self.traces)
        ]

    def _row(self, rng: random.Random, at_ms: int, bad: bool, i: int) -> TraceRow:
        failed = rng.random() < (self.incident_error_rate if bad else self.error_rate)
        latency = int(rng.lognormvariate(6.6, 0.5)) * (3 if bad else 1)
        tokens = {"input_tokens": rng.randint(200, 2000), "output_tokens": rng.randint(50, 600)}
        trace_id, judged = f"tr-{rng.getrandbits(128):032x}", rng.random()
        verdicts: dict[str, str] = {}
        if judged < 0.4:
            verdicts["relevance"] = "yes" if rng.random() < (0.6 if bad else 0.93) else "no"
        if judged < 0.1:
            verdicts["user_feedback"] = "yes" if rng.random() < 0.8 else "no"
        if judged < 0.2:
            verdicts["rating"] = f"{rng.uniform(1, 5):.1f}"
        _ = rng.getrandbits(64), rng.getrandbits(64)  # 乱数の並びを固定する(公開した数値を再現する)
        return TraceRow(
            trace_id=trace_id,
            at_ms=at_ms,
            state="ERROR" if failed else "OK",
            latency_ms=latency,
            tokens=tokens,
            cost_usd=tokens["input_tokens"] * 2.5e-6 + tokens["output_tokens"] * 1e-5,
            assessments=tuple(verdicts.items()),
        )
