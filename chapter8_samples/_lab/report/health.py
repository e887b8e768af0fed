"""保存されたトレースから、健全性の推移(レイテンシー、エラー、コスト、品質)を読み取る。

指標の式は 8.4 のアラートと同じもの(``alerting.metrics.measure``)を使う。サンプリングで間引いた
トレースは、重みで元の件数に直して数える。
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from mlflow.entities import TraceInfo

from chapter8_samples.alerting.metrics.measures import (
    FAIL_VALUES,
    PASS_VALUES,
    RowNumbers,
    TraceRow,
    measure,
)
from chapter8_samples.alerting.metrics.source import to_row
from chapter8_samples.cost_tracking.usage.span_costs import BY_MODEL_TAG

USER_KEY = "mlflow.trace.user"
LINKED_PROMPTS = "mlflow.linkedPrompts"
UNRECORDED = "(記録なし)"
BINS = 24


@dataclass(frozen=True)
class Point:
    """トレース 1 件の要点。``at`` は開始からの秒、コストは USD(重みを掛ける前)。"""

    row: TraceRow
    at: float
    user: str
    models: Mapping[str, float]
    prompts: frozenset[str]
    human: frozenset[str]
    """人が付けた評価の名前。"""

    @property
    def failed_verdicts(self) -> list[str]:
        """不合格だった評価の名前。"""
        return [name for name, value in self.row.assessments if value in FAIL_VALUES]


def points(infos: Iterable[TraceInfo], started_ms: int) -> list[Point]:
    """トレースを時刻順の点に直す。"""
    return [_point(info, started_ms) for info in infos]


def _point(info: TraceInfo, started_ms: int) -> Point:
    row = to_row(info)
    people = (a.name for a in info.assessments or [] if a.source.source_type == "HUMAN")
    return Point(
        row=row,
        at=(row.at_ms - started_ms) / 1000,
        user=info.trace_metadata.get(USER_KEY) or UNRECORDED,
        models=_cost_by_model(info, row.cost_usd or 0.0),
        prompts=frozenset(_prompt_names(info)),
        human=frozenset(people),
    )


def _cost_by_model(info: TraceInfo, total_usd: float) -> dict[str, float]:
    """8.2 の ``cost.by_model`` タグの内訳。タグがなければ、全額を「記録なし」に数える。"""
    tag = _json(info.tags.get(BY_MODEL_TAG))
    if not isinstance(tag, dict) or not tag:
        return {UNRECORDED: total_usd}
    items = cast("dict[str, list[Any]]", tag).items()
    return {model: float(numbers[3] or 0) for model, numbers in items}


def _prompt_names(info: TraceInfo) -> Iterator[str]:
    linked = _json(info.tags.get(LINKED_PROMPTS))
    if isinstance(linked, list):
        yield from (str(item["name"]) for item in cast("list[dict[str, Any]]", linked))


def _json(text: str | None) -> object:
    try:
        return json.loads(text or "null")
    except ValueError:  # 長すぎて途中で切られたタグ
        return None


def value_of(metric: str, history: Sequence[Point], seconds: float = 3600.0) -> float | None:
    """指標の値。決まらなければ ``None``。"""
    return measure(metric, seconds, RowNumbers([point.row for point in history])).value


def pass_rate_names(history: Iterable[Point]) -> list[str]:
    """値が合格か不合格のどちらかである評価の名前。多く付いた順。"""
    found: dict[str, list[str]] = {}
    for point in history:
        for name, value in point.row.assessments:
            found.setdefault(name, []).append(value)
    known = PASS_VALUES | FAIL_VALUES
    names = [
        n for n, values in found.items() if {*values} - {"error"} and {*values} <= {*known, "error"}
    ]
    return sorted(names, key=lambda name: (-len(found[name]), name))


def totals(pairs: Iterable[tuple[str, float]], limit: int = 8) -> list[tuple[str, float]]:
    """名前ごとの合計。多い順に ``limit`` 件、残りは「ほか」にまとめる。

    >>> totals([("a", 1.0), ("b", 3.0), ("c", 0.5), ("a", 1.0)], limit=1)
    [('b', 3.0), ('ほか 2 件', 2.5)]
    """
    sums: dict[str, float] = {}
    for name, value in pairs:
        sums[name] = sums.get(name, 0.0) + value
    ordered = sorted(sums.items(), key=lambda item: (-item[1], item[0]))
    rest = ordered[limit:]
    more = [(f"ほか {len(rest)} 件", sum(value for _, value in rest))] if rest else []
    return [*ordered[:limit], *more]


@dataclass(frozen=True)
class Timeline:
    """等間隔の区間に分けた推移。``times`` は区間の中央(秒)。"""

    times: list[float]
    bins: list[list[Point]]

    def series(self, metric: str, scale: float = 1.0) -> list[float | None]:
        """区間ごとの値に ``scale`` を掛けたもの。点のない区間は ``None``。"""
        values = (value_of(metric, group) if group else None for group in self.bins)
        return [None if value is None else scale * value for value in values]


def timeline(history: Sequence[Point]) -> Timeline:
    """推移を、``BINS`` 個ほどの区間に分ける。区間の長さは秒の整数倍。"""
    end = max((point.at for point in history), default=0.0)
    size = max(1, math.ceil(end / BINS))
    groups: list[list[Point]] = [[] for _ in range(int(end // size) + 1)]
    for point in history:
        groups[int(point.at // size)].append(point)
    return Timeline([(number + 0.5) * size for number in range(len(groups))], groups)
