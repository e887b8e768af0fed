"""8.3.3 集めたフィードバックを数える。

良い評価の割合は、件数が少ないうちは大きく揺れるので、95% 信頼区間と一緒に示す。ジャッジの判定が、
ユーザーの評価とどれだけ一致するかも示す。``mlflow-tracing`` だけで動き、Databricks でも同じ。
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from statistics import NormalDist, fmean
from typing import Any, NamedTuple, TypeVar, cast

import mlflow
from mlflow.entities import Assessment, Trace, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient

from .kinds import COMMENT, CORRECTION, ISSUE, RATING, THUMBS

T = TypeVar("T")
VERSION_KEYS = ("prompt.version", "prompt_version", "app.version", "service.version")
_VERDICTS = {"yes": True, "true": True, "pass": True, "no": False, "false": False, "fail": False}


@dataclass(frozen=True)
class Rate:
    """割合と、その 95% 信頼区間(Wilson)。すべて 0 から 1。"""

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
        n = self.total
        p = self.positive / n
        center = p + z * z / (2 * n)
        scale = 1 + z * z / n
        spread = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


class Agreement(NamedTuple):
    """ジャッジとユーザーの一致。Cohen のカッパ係数(1 は完全な一致、0 は偶然と同じ)と 95% 区間。"""

    kappa: float | None  # どちらもいつも同じ答えなら、決まらない
    interval: tuple[float, float]
    pairs: int


def agreement(pairs: Sequence[tuple[bool, bool]]) -> Agreement:
    """(ジャッジ, ユーザー) が良いとしたかの組から求める。1 組以上。"""
    same = Rate(sum(judge == user for judge, user in pairs), len(pairs))
    judge = sum(judge for judge, _ in pairs) / len(pairs)
    user = sum(user for _, user in pairs) / len(pairs)
    chance = judge * user + (1 - judge) * (1 - user)
    if chance == 1:
        return Agreement(None, (-1.0, 1.0), len(pairs))
    rates = (same.positive / same.total, *same.interval)
    kappa, low, high = ((rate - chance) / (1 - chance) for rate in rates)
    return Agreement(kappa, (max(-1.0, low), high), len(pairs))


@dataclass(frozen=True)
class FeedbackSummary:
    """期間のフィードバックの集計。割合は、良い評価のもの。"""

    traces: int
    rated_traces: int
    thumbs: Rate
    ratings: tuple[float, ...]
    issues: Mapping[str, int]
    comments: int
    corrections: int
    by_version: Mapping[str, Rate]
    by_user: Mapping[str, Rate]
    judge_agreement: Mapping[str, Agreement]
    """はい・いいえで答えるジャッジの名前 -> ユーザーの良い / 悪いとの一致。"""

    @property
    def mean_rating(self) -> float | None:
        """点数の平均。1 件もなければ ``None``。"""
        return fmean(self.ratings) if self.ratings else None


def summarize_feedback(
    experiment: str,
    start: datetime | None = None,
    end: datetime | None = None,
) -> FeedbackSummary:
    """期間 ``[start, end)`` に始まったトレースの、有効なフィードバックを集計する。

    ``experiment`` は名前か ID(なければ ``ValueError``)。時刻はタイムゾーン付きで、``start`` を
    省くと終了の 7 日前、``end`` を省くと現在。
    """
    end = end or datetime.now(timezone.utc)
    infos = trace_infos(experiment, start or end - timedelta(days=7), end)
    told = [(info, a, _value(a)) for info in infos for a in _latest(info, human=True)]
    # 画面などから、この名前で別の形の値を入れることもできる。数えられるものだけを数える
    votes = [(info, a, v) for info, a, v in told if a.name == THUMBS and isinstance(v, bool)]
    ratings = [v for _, a, v in told if a.name == RATING and not isinstance(v, bool)]
    names = Counter(a.name for _, a, _ in told)
    judged = [(name, (ok, good)) for info, _, good in votes for name, ok in _verdicts(info)]
    return FeedbackSummary(
        traces=len(infos),
        rated_traces=len({info.trace_id for info, _, _ in told}),
        thumbs=Rate(sum(good for _, _, good in votes), len(votes)),
        ratings=tuple(float(v) for v in ratings if isinstance(v, int | float)),
        issues=dict(Counter(str(v) for _, a, v in told if a.name == ISSUE)),
        comments=names[COMMENT],
        corrections=names[CORRECTION],
        by_version=_rates((version_of(info) or "unknown", good) for info, _, good in votes),
        by_user=_rates((str(a.source.source_id), good) for _, a, good in votes),
        judge_agreement={name: agreement(pairs) for name, pairs in _grouped(judged).items()},
    )


def trace_infos(experiment: str, start: datetime, end: datetime) -> list[TraceInfo]:
    """期間 ``[start, end)`` のトレースの要約(評価を含む)。"""
    if start.tzinfo is None or end.tzinfo is None or start >= end:
        raise ValueError(f"need start < end with a time zone (timezone-aware), got {start}, {end}")
    first, last = math.floor(start.timestamp() * 1000), math.ceil(end.timestamp() * 1000)
    found = mlflow.search_traces(
        locations=[_experiment_id(experiment)],
        filter_string=f"timestamp_ms >= {first} AND timestamp_ms < {last}",
        return_type="list",
        include_spans=False,
    )
    return [trace.info for trace in cast("list[Trace]", found)]


def version_of(info: TraceInfo) -> str | None:
    """トレースのプロンプトの版: 使ったプロンプトの登録名と番号、なければ版を表すタグ。"""
    values = {**info.trace_metadata, **info.tags}
    linked: list[dict[str, Any]] = json.loads(values.get("mlflow.linkedPrompts") or "[]")
    if linked:
        return ", ".join(f"{p.get('name')}/{p.get('version')}" for p in linked)
    return next((values[key] for key in VERSION_KEYS if key in values), None)


def _latest(info: TraceInfo, *, human: bool) -> Iterable[Assessment]:
    """有効な評価。同じ人の同じ評価が 2 つとも有効なら(同時に押した)、後の方だけ。"""
    latest: dict[tuple[object, ...], Assessment] = {}
    for a in sorted(info.assessments, key=lambda a: a.create_time_ms or 0):
        if a.valid is not False and (a.source.source_type == "HUMAN") == human:
            one = a.assessment_id if a.name in (COMMENT, ISSUE) else None
            latest[a.name, a.source.source_id, one] = a
    return latest.values()


def _verdicts(info: TraceInfo) -> Iterable[tuple[str, bool]]:
    told = ((a.name, str(_value(a)).lower()) for a in _latest(info, human=False))
    return ((name, _VERDICTS[value]) for name, value in told if value in _VERDICTS)


def _value(assessment: Assessment) -> Any:
    return assessment.feedback.value if assessment.feedback else None


def _grouped(pairs: Iterable[tuple[str, T]]) -> dict[str, list[T]]:
    groups: defaultdict[str, list[T]] = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return dict(sorted(groups.items()))


def _rates(votes: Iterable[tuple[str, bool]]) -> dict[str, Rate]:
    return {key: Rate(sum(goods), len(goods)) for key, goods in _grouped(votes).items()}


def _experiment_id(name_or_id: str) -> str:
    store: Any = TracingClient().store  # mlflow-tracing に MlflowClient はない
    try:
        found = store.get_experiment_by_name(name_or_id) or store.get_experiment(name_or_id)
        return str(found.experiment_id)
    except (MlflowException, ValueError) as error:
        place = mlflow.get_tracking_uri()
        raise ValueError(f"no experiment named {name_or_id!r} at {place}") from error
