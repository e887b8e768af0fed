"""8.3.3 集めたフィードバックを数える。

良い評価の割合は、件数が少ないうちは大きく揺れる。割合と一緒に 95% 信頼区間を出し、
プロンプトの版・ユーザー・日ごとに分けて、「本当に悪くなったのか」を判断できるようにする。

無効になった(本人が変更した)評価は数えない。``mlflow-tracing`` だけで動き、Databricks でも同じ。
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from statistics import NormalDist, fmean
from typing import Any, cast
from zoneinfo import ZoneInfo

import mlflow
from mlflow.entities import Assessment, Trace, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient

from .request import COMMENT, CORRECTION, ISSUE, RATING, REPLACED_BY_NEWER, THUMBS

VERSION_KEYS = ("prompt.version", "prompt_version", "app.version", "service.version")
_LINKED_PROMPTS = "mlflow.linkedPrompts"


@dataclass(frozen=True)
class Rate:
    """割合と、その 95% 信頼区間(Wilson)。すべて 0 から 1。

    20 件では、90% と 30% の差ははっきりしているが、それぞれの割合はまだ大きく揺れる。

    >>> for good in (18, 6):
    ...     low, high = Rate(good, 20).interval
    ...     print(f"{good / 20:.0%}: {low:.0%} - {high:.0%}")
    90%: 70% - 97%
    30%: 15% - 52%
    """

    positive: int
    total: int

    @property
    def value(self) -> float | None:
        """割合。1 件もなければ ``None``(0% ではない)。"""
        return self.positive / self.total if self.total else None

    @property
    def interval(self) -> tuple[float, float]:
        """信頼区間。1 件もなければ 0 から 1(何も分からない)。"""
        if not self.total:
            return 0.0, 1.0
        z = NormalDist().inv_cdf(0.975)
        n, p = self.total, self.positive / self.total
        center = p + z * z / (2 * n)
        spread = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        scale = 1 + z * z / n
        return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


@dataclass(frozen=True, kw_only=True)
class FeedbackSummary:
    """期間のフィードバックの集計。"""

    traces: int = 0
    """期間のトレースの数。"""
    rated_traces: int = 0
    """フィードバックが 1 件でもあったトレースの数。"""
    thumbs: Rate = field(default_factory=lambda: Rate(0, 0))
    ratings: tuple[float, ...] = ()
    issues: Mapping[str, int] = field(default_factory=dict[str, int])
    comments: int = 0
    corrections: int = 0
    by_version: Mapping[str, Rate] = field(default_factory=dict[str, Rate])
    """プロンプトの版ごとの、良い評価の割合。"""
    by_user: Mapping[str, Rate] = field(default_factory=dict[str, Rate])
    by_day: Mapping[str, Rate] = field(default_factory=dict[str, Rate])
    """日(``2026-01-31`` の形)ごとの、良い評価の割合。"""

    @property
    def mean_rating(self) -> float | None:
        """点数の平均。1 件もなければ ``None``。"""
        return fmean(self.ratings) if self.ratings else None


def summarize_feedback(
    experiment: str,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    tz: str = "Asia/Tokyo",
) -> FeedbackSummary:
    """期間 ``[start, end)`` に始まったトレースの、有効なフィードバックを集計する。

    Args:
        experiment: エクスペリメントの名前か ID。
        start: 開始(タイムゾーン付き)。省くと終了の 7 日前。
        end: 終了(タイムゾーン付き)。省くと現在。
        tz: ``by_day`` の日の区切り。

    Raises:
        ValueError: エクスペリメントがない、時刻にタイムゾーンがない、期間が逆。
    """
    end = end or datetime.now(timezone.utc)
    start = start or end - timedelta(days=7)
    if start.tzinfo is None or end.tzinfo is None or start >= end:
        raise ValueError(f"need timezone-aware start < end, got {start!r} and {end!r}")
    first, last = math.floor(start.timestamp() * 1000), math.ceil(end.timestamp() * 1000)
    found = mlflow.search_traces(
        locations=[_experiment_id(experiment)],
        filter_string=f"timestamp_ms >= {first} AND timestamp_ms < {last}",
        return_type="list",
        include_spans=False,
    )
    return summarize([trace.info for trace in cast("list[Trace]", found)], tz=tz)


def summarize(infos: Iterable[TraceInfo], *, tz: str = "Asia/Tokyo") -> FeedbackSummary:
    """読み込み済みのトレースのフィードバックを集計する。"""
    infos = list(infos)
    pairs = [(info, a) for info in infos for a in _human(info)]
    # 画面などから、この名前で別の形の値を入れることもできる。数えられるものだけを数える
    thumbs = [(i, a) for i, a in pairs if a.name == THUMBS and isinstance(_value(a), bool)]
    ratings = [_value(a) for _, a in pairs if a.name == RATING]
    zone = ZoneInfo(tz)
    return FeedbackSummary(
        traces=len(infos),
        rated_traces=len({info.trace_id for info, _ in pairs}),
        thumbs=_rate(a for _, a in thumbs),
        ratings=tuple(float(value) for value in ratings if _is_number(value)),
        issues=dict(Counter(str(_value(a)) for _, a in pairs if a.name == ISSUE)),
        comments=sum(a.name == COMMENT for _, a in pairs),
        corrections=sum(a.name == CORRECTION for _, a in pairs),
        by_version=_grouped(thumbs, lambda info, _: version_of(info) or "unknown"),
        by_user=_grouped(thumbs, lambda _, a: str(a.source.source_id)),
        by_day=_grouped(
            thumbs,
            lambda info, _: (
                datetime.fromtimestamp(info.request_time / 1000, zone).date().isoformat()
            ),
        ),
    )


def version_of(info: TraceInfo) -> str | None:
    """トレースのプロンプトの版: 使ったプロンプトの登録名と番号、なければ版を表すタグ。"""
    values = {**info.trace_metadata, **info.tags}
    linked: list[dict[str, Any]] = json.loads(values.get(_LINKED_PROMPTS) or "[]")
    if linked:
        return ", ".join(f"{p.get('name')}/{p.get('version')}" for p in linked)
    return next((values[key] for key in VERSION_KEYS if key in values), None)


def _human(info: TraceInfo) -> list[Assessment]:
    """人の有効な評価。同じ人が同時に 2 度押して両方とも有効なら、後の方だけを数える。"""
    latest: dict[tuple[str, str | None, str | None], Assessment] = {}
    for a in sorted(info.assessments, key=lambda a: a.create_time_ms or 0):
        if a.valid is not False and a.source.source_type == "HUMAN":
            one = None if a.name in REPLACED_BY_NEWER else a.assessment_id
            latest[a.name, a.source.source_id, one] = a
    return list(latest.values())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value(assessment: Assessment) -> Any:
    return assessment.feedback.value if assessment.feedback else None


def _rate(thumbs: Iterable[Assessment]) -> Rate:
    values = [_value(a) is True for a in thumbs]
    return Rate(sum(values), len(values))


def _grouped(
    thumbs: list[tuple[TraceInfo, Assessment]], key: Callable[[TraceInfo, Assessment], str]
) -> dict[str, Rate]:
    groups: dict[str, list[Assessment]] = {}
    for info, assessment in thumbs:
        groups.setdefault(key(info, assessment), []).append(assessment)
    return {name: _rate(group) for name, group in sorted(groups.items())}


def _experiment_id(name_or_id: str) -> str:
    store: Any = TracingClient().store  # mlflow-tracing に MlflowClient はない
    found = store.get_experiment_by_name(name_or_id)
    if found is not None:
        return str(found.experiment_id)
    if name_or_id.isdigit():
        with suppress(MlflowException):
            return str(store.get_experiment(name_or_id).experiment_id)
    raise ValueError(f"no experiment named {name_or_id!r} at {mlflow.get_tracking_uri()}")
