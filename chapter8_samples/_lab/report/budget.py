"""エラー予算: カードと同じしきい値を SLO の目標とし、この期間に使った分と残りを示す。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from chapter8_samples.alerting import Slo

from . import health
from .health import Point
from .names import assessment_name
from .page import Table

LATENCY = "latency_p95_ms"


def budget_table(limits: Mapping[str, float], history: Sequence[Point]) -> Table:
    """目標ごとに 1 行。``limits`` は、指標の名前 -> しきい値。"""
    rows = [row for title, slo in _objectives(limits) if (row := _row(title, slo, history))]
    header = ("目標", "よい結果の割合", "実績", "予算の残り")
    return Table("この期間のエラー予算", header, rows, numbers=(1, 2, 3), shown=True)


def _objectives(limits: Mapping[str, float]) -> Iterator[tuple[str, Slo]]:
    for metric, limit in limits.items():
        kind, _, name = metric.partition(":")
        if metric == LATENCY:
            yield f"{limit:,.0f} ms 以内の応答", Slo(f"slow_rate:{limit:.0f}ms", 0.95)
        elif metric == "error_rate" and 0 < limit < 1:
            yield "エラーのない応答", Slo(metric, 1 - limit)
        elif kind == "pass_rate" and 0 < limit < 1:
            yield assessment_name(name), Slo(metric, limit)


def _row(title: str, slo: Slo, history: Sequence[Point]) -> tuple[str, ...] | None:
    failed = health.value_of(slo.failures, history)
    if failed is None:
        return None
    left = 100 * slo.left(failed)
    shown = f"{left:.0f}%" if left >= 0 else f"{-left:.0f}% の超過"
    return title, f"{100 * slo.objective:g}%", f"{100 * (1 - failed):.2f}%", shown
