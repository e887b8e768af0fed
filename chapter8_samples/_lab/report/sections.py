"""レポートの中身: カード、8.1 から 8.4 の図と表。シナリオにも、任意のエクスペリメントにも使う。"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from chapter8_samples.alerting.metrics.measures import FAIL_VALUES, PASS_VALUES
from chapter8_samples.quality_monitoring.feedback.summary import Rate, agreement

from ..console import shortened
from . import health
from .budget import budget_table
from .charts import KINDS, LineChart, Marker, Series, bars
from .health import Point
from .incidents import Event
from .names import THUMBS, assessment_name, problem_name
from .page import Card, Figure, Section, Table, link

WORST, EVENT_ROWS = 5, 20
_COMMENTS = {
    "8.1": "アプリの応答時間と、失敗した割合です。",
    "8.2": "LLM の呼び出しにかかったコストです(USD)。",
    "8.3": "スコアラーの判定とフィードバックです。品質の低下は、速さやコストだけでは分かりません。"
    "κ は、スコアラーとユーザーの評価の一致です(1 は完全な一致、0 は偶然と同じ)。",
    "8.4": "リリース、アラート、ロールバックを、起きた順に並べたものです。",
}
_NOTHING = {
    "8.3": "この期間に、スコアラーの判定とユーザーの評価はありませんでした。",
    "8.4": "この期間に、リリース、アラート、ロールバックはありませんでした。",
}
NAME_COLUMNS = 40


@dataclass(frozen=True)
class Limit:
    """しきい値。``op`` が ``>`` なら、越えると異常。"""

    op: str
    value: float

    def holds(self, value: float) -> bool:
        """正常か。"""
        return value <= self.value if self.op == ">" else value >= self.value


@dataclass(frozen=True, kw_only=True)
class Subject:
    """レポートにするもの。``history`` は時刻順で、1 件以上ある。"""

    started: datetime
    history: Sequence[Point]
    limits: Mapping[str, Limit]
    """指標の名前 -> しきい値。``pass_rate`` は、個別の指定のない合格率すべてに使う。"""
    events: Sequence[Event] = ()
    trace_url: Callable[[str], str] = lambda _: ""
    judged_from: float = 0.0
    """カードの判定に使う最初の時刻(開始からの秒)。"""
    judged_label: str = ""
    extra_tables: Sequence[Table] = ()
    """8.4 に加える表。"""

    @property
    def judged(self) -> list[Point]:
        """カードの判定に使うトレース。"""
        recent = [point for point in self.history if point.at >= self.judged_from]
        return recent or list(self.history)

    def limit(self, metric: str) -> Limit | None:
        """その指標のしきい値。"""
        kind = metric.partition(":")[0]
        return self.limits.get(metric) or (self.limits.get(kind) if ":" in metric else None)

    def ratings(self) -> list[str]:
        """合格率を示す評価: スコアラーと、ユーザーの 👍/👎(人が付けたほかの評価は除く)。"""
        human = {name for point in self.history for name in point.human} - {THUMBS}
        return [name for name in health.pass_rate_names(self.history) if name not in human]


# カード --------------------------------------------------------------------


def cards(subject: Subject) -> list[Card]:
    """しきい値と判定の付いた数値。"""
    return [
        _count_card(subject),
        _card(subject, "エラー率", "error_rate", "{:.2f}%", 100),
        _card(subject, "応答時間 p95", "latency_p95_ms", "{:,.0f} ms"),
        _card(subject, "1 件のコスト", "cost_usd_per_request", "${:.6f}"),
        _cost_card(subject),
        *(_quality_card(subject, name) for name in subject.ratings()),
    ]


def _count_card(subject: Subject) -> Card:
    seen = len(subject.history)
    stands_for = sum(point.row.weight for point in subject.history)
    failed = sum(point.row.state == "ERROR" for point in subject.history)
    whole = f"間引く前は推定 {stands_for:,.0f} 件" if round(stands_for) != seen else "間引きなし"
    return Card("リクエスト", f"{seen:,} 件", f"失敗 {failed:,} 件、{whole}")


def _card(
    subject: Subject, title: str, metric: str, unit: str, scale: float = 1, extra: str = ""
) -> Card:
    value = health.value_of(metric, subject.judged)
    if value is None:
        return Card(title, "-", "記録なし")
    limit = subject.limit(metric)
    rule, verdict = "しきい値なし", None
    if limit is not None:
        side = "以下" if limit.op == ">" else "以上"
        rule = f"しきい値 {unit.format(scale * limit.value)} {side}"
        verdict = limit.holds(value)
    notes = [note for note in (subject.judged_label, rule, extra) if note]
    return Card(title, unit.format(scale * value), "、".join(notes), verdict)


def _cost_card(subject: Subject) -> Card:
    total = health.value_of("cost_usd", subject.history) or 0.0
    unpriced = sum(point.row.cost_usd is None for point in subject.history)
    note = f"、コストの記録のないトレース {unpriced:,} 件" if unpriced else ""
    return Card("合計コスト", f"${total:.4f}", f"全期間{note}")


def _quality_card(subject: Subject, name: str) -> Card:
    good, total = _verdict_counts(subject.judged, name)
    low, high = Rate(good, total).interval
    spread = f"{total:,} 件、95% 区間 {100 * low:.0f} から {100 * high:.0f}%"
    return _card(subject, assessment_name(name), f"pass_rate:{name}", "{:.1f}%", 100, spread)


def _verdict_counts(history: Sequence[Point], name: str) -> tuple[int, int]:
    values = [v for point in history for n, v in point.row.assessments if n == name]
    good = sum(value in PASS_VALUES for value in values)
    return good, good + sum(value in FAIL_VALUES for value in values)


# 節 ------------------------------------------------------------------------


def sections(subject: Subject) -> list[Section]:
    """8.1 から 8.4 の図と表。"""
    return [
        _section("8.1", "応答時間とエラー", *_speed(subject)),
        _section("8.2", "コスト", *_cost(subject)),
        _section("8.3", "品質", *_quality(subject)),
        *_budget(subject),
        _section("8.4", "アラートとロールバック", [], _incidents(subject)),
    ]


def _section(
    number: str, title: str, figures: Sequence[Figure], tables: Sequence[Table]
) -> Section:
    tables = [table for table in tables if table.rows]
    comment = _COMMENTS[number] if figures or tables else _NOTHING[number]
    return Section(number, title, comment, figures, tables)


def _chart(
    subject: Subject,
    title: str,
    unit: str,
    lines: Sequence[tuple[str, str]],
    scale: float = 1,
    *,
    shown: bool = True,
) -> Figure:
    """指標の推移。しきい値は、最初の指標のもの。"""
    line = health.timeline(subject.history)
    limit = subject.limit(lines[0][1])
    markers = [
        Marker((event.at - subject.started).total_seconds(), event.label, event.kind)
        for event in subject.events
    ]
    chart = LineChart(
        subject.started.astimezone(),
        line.times,
        [Series(name, line.series(metric, scale)) for name, metric in lines],
        unit,
        None if limit is None else scale * limit.value,
        markers,
    )
    return Figure(title, chart.svg(), shown=shown)


def _speed(subject: Subject) -> tuple[list[Figure], list[Table]]:
    latency = [("p95", "latency_p95_ms"), ("p50", "latency_p50_ms")]
    timed = [point for point in subject.history if point.row.latency_ms is not None]
    slow = sorted(timed, key=lambda point: point.row.latency_ms or 0, reverse=True)
    failed = [point for point in reversed(subject.history) if point.row.state == "ERROR"]
    return [
        _chart(subject, "応答時間", "{:,.0f} ms", latency),
        _chart(subject, "エラー率", "{:.3g}%", [("エラー率", "error_rate")], 100, shown=False),
    ], [
        _traces(subject, "遅いトレース", slow),
        _traces(subject, "失敗したトレース(新しい順)", failed),
    ]


def _cost(subject: Subject) -> tuple[list[Figure], list[Table]]:
    history = subject.history
    by_model = health.totals(
        (m, p.row.weight * usd) for p in history for m, usd in p.models.items()
    )
    by_user = health.totals((p.user, p.row.weight * (p.row.cost_usd or 0.0)) for p in history)
    figures = [
        _chart(subject, "1 件のコスト", "${:.5f}", [("1 件のコスト", "cost_usd_per_request")]),
        Figure("モデルごとのコスト", bars(_short(by_model), "${:.4f}")),
        Figure("ユーザーごとのコスト", bars(_short(by_user), "${:.4f}")),
    ]
    costly = sorted((p for p in history if p.row.cost_usd), key=lambda p: -(p.row.cost_usd or 0))
    return figures, [_traces(subject, "コストの高いトレース", costly)]


def _short(rows: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    return [(shortened(name, NAME_COLUMNS), value) for name, value in rows]


def _quality(subject: Subject) -> tuple[list[Figure], list[Table]]:
    names = subject.ratings()
    lines = [(assessment_name(name), f"pass_rate:{name}") for name in names[:4]]
    figures = [_chart(subject, "合格率", "{:.0f}%", lines, 100)] if lines else []
    table = Table(
        "評価ごとの結果",
        ("評価", "合格率", "判定", "採点の失敗", "ユーザーとの一致 κ(95% 区間、件数)"),
        [_quality_row(subject, name) for name in names],
        numbers=(1, 2, 3),
        shown=True,
    )
    bad = sorted((p for p in subject.history if p.failed_verdicts), key=_badness)
    return figures, [table, _traces(subject, "品質の低いトレース", bad)]


def _badness(point: Point) -> tuple[int, float]:
    return -len(point.failed_verdicts), -point.at


def _quality_row(subject: Subject, name: str) -> tuple[str, ...]:
    value = health.value_of(f"pass_rate:{name}", subject.history)
    _, total = _verdict_counts(subject.history, name)
    values = [v for point in subject.history for n, v in point.row.assessments if n == name]
    rate = "-" if value is None else f"{100 * value:.1f}%"
    failed = f"{values.count('error'):,} 件"
    return assessment_name(name), rate, f"{total:,} 件", failed, _agreement(subject, name)


def _agreement(subject: Subject, name: str) -> str:
    """ユーザーの 👍/👎 との一致(Cohen のカッパ係数)と、その 95% 区間。"""
    known, pairs = PASS_VALUES | FAIL_VALUES, list[tuple[bool, bool]]()
    for point in subject.history:
        told = {n: v in PASS_VALUES for n, v in point.row.assessments if v in known}
        if name != THUMBS and name in told and THUMBS in told:
            pairs.append((told[name], told[THUMBS]))
    found = agreement(pairs) if pairs else None
    if found is None or found.kappa is None:
        return "-"
    low, high = found.interval
    return f"{found.kappa:.2f}({low:.2f} から {high:.2f}、{found.pairs:,} 件)"


def _traces(subject: Subject, title: str, found: Sequence[Point]) -> Table:
    header = ("時刻", "トレース", "応答時間", "コスト", "ユーザー", "問題")
    rows = [_trace_row(subject, point) for point in found[:WORST]]
    return Table(title, header, rows, numbers=(2, 3))


def _trace_row(subject: Subject, point: Point) -> list[object]:
    row = point.row
    problems = ["エラー"] if row.state == "ERROR" else []
    problems += map(problem_name, point.failed_verdicts)
    return [
        _clock(subject.started + timedelta(seconds=point.at)),
        link(row.trace_id[:15], subject.trace_url(row.trace_id)),
        "-" if row.latency_ms is None else f"{row.latency_ms:,.0f} ms",
        "-" if row.cost_usd is None else f"${row.cost_usd:.6f}",
        link(shortened(point.user, NAME_COLUMNS), ""),
        "、".join(problems) or "-",
    ]


def _incidents(subject: Subject) -> list[Table]:
    shown = subject.events[-EVENT_ROWS:]
    title = "出来事"
    if len(subject.events) > len(shown):
        title += f"(全 {len(subject.events)} 件のうち、新しい {len(shown)} 件)"
    rows = [(_clock(e.at), KINDS[e.kind], e.label, e.detail or "-") for e in shown]
    table = Table(title, ("時刻", "種類", "内容", "詳しく"), rows, shown=True)
    return [table, *subject.extra_tables]


def _budget(subject: Subject) -> list[Section]:
    table = budget_table(_limits(subject), subject.history)
    comment = "しきい値を目標としたときの、許される失敗(エラー予算)の残りです。"
    return [Section("8.4", "SLO とエラー予算", comment, (), [table])] if table.rows else []


def _limits(subject: Subject) -> dict[str, float]:
    metrics = ["error_rate", "latency_p95_ms", *(f"pass_rate:{n}" for n in subject.ratings())]
    found = {metric: subject.limit(metric) for metric in metrics}
    return {metric: limit.value for metric, limit in found.items() if limit}


def _clock(at: datetime) -> str:
    return f"{at.astimezone():%m/%d %H:%M:%S}"
