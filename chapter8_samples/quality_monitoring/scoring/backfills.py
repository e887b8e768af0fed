"""8.3.5 バックフィルの引数の検査と、Databricks のジョブ。"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import mlflow
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import list_scorers

from .judges import ScoringError
from .plan import ScoringTarget
from .registry import find_status

logger = logging.getLogger(__name__)


class BackfillError(ScoringError):
    """バックフィルを始められない。"""


def check_window(start: datetime | None, end: datetime | None) -> tuple[datetime, datetime]:
    """期間を確かめる。開始を省くと終了の 7 日前、終了を省くと現在。"""
    end = end or datetime.now(timezone.utc)
    if start is None:
        start = end - timedelta(days=7)
        logger.warning("no start_time: only the last 7 days are scored, from %s", start)
    for name, value in (("start_time", start), ("end_time", end)):
        if getattr(value, "tzinfo", None) is None:
            raise BackfillError(
                f"{name} {value} has no time zone: "
                "use datetime(..., tzinfo=timezone.utc) or backfill_date_range(tz=...)"
            )
    if start >= end:
        raise BackfillError(f"start_time {start.isoformat()} is not before {end.isoformat()}")
    return start, end


def whole_days(first: date | str, last: date | str, tz: str) -> tuple[datetime, datetime]:
    """``tz`` での ``first`` の始まりから、``last`` の終わりまで。"""
    try:
        zone = ZoneInfo(tz)
        after = _day(last, zone) + timedelta(days=1)
        start = datetime.combine(_day(first, zone), time(), zone)
        return start, datetime.combine(after, time(), zone)
    except (ValueError, TypeError, KeyError, OSError, OverflowError) as error:
        raise BackfillError(
            f"need dates (2025-01-31), a zone: {first!r}, {last!r}, {tz!r}: {error}"
        ) from error


def _day(value: date | str, zone: ZoneInfo) -> date:
    if isinstance(value, datetime):  # 時刻は、その時間帯での日にする
        return (value.astimezone(zone) if value.tzinfo else value).date()
    return date.fromisoformat(value) if isinstance(value, str) else value


def experiment_of(experiment_id: str) -> Experiment:
    """ID のエクスペリメント。"""
    try:
        return mlflow.MlflowClient().get_experiment(str(experiment_id))
    except MlflowException as error:
        raise BackfillError(f"no experiment with id {experiment_id!r}: {error.message}") from error


def target_of(**config: Any) -> ScoringTarget:
    """``ScoringTarget`` の引数を確かめて作る。"""
    try:
        return ScoringTarget(**config)
    except (ScoringError, TypeError) as error:
        raise BackfillError(str(error)) from error


def registered_targets(experiment_id: str, names: Sequence[str]) -> list[ScoringTarget]:
    """登録されている割合とフィルターでの、採点の指定。"""
    if isinstance(names, str):
        raise BackfillError(f"scorer_names must be a list, got the string {names!r}")
    experiment_id = experiment_of(experiment_id).experiment_id
    return [_registered(experiment_id, name) for name in names]


def _registered(experiment_id: str, name: str) -> ScoringTarget:
    status = find_status(experiment_id, name)
    if status is None:
        known = [scorer.name for scorer in list_scorers(experiment_id=experiment_id)]
        raise BackfillError(f"no scorer {name!r} in {experiment_id}; registered: {known}")
    if status.sample_rate == 0:
        raise BackfillError(
            f"scorer {name!r} is stopped: resume it, or use backfill_with_custom_sample_rates()"
        )
    where = {"sample_rate": status.sample_rate, "filter_string": status.filter_string}
    return target_of(scorer=status.scorer, **where)


def submit_backfill(
    experiment_id: str, targets: Sequence[ScoringTarget], start: datetime, end: datetime
) -> str:
    """Databricks に、過去のトレースを採点するジョブを登録し、ジョブ ID を返す。"""
    try:
        from databricks.agents.scorers import (  # pyright: ignore[reportMissingTypeStubs]
            BackfillScorerConfig,
            backfill_scorers,
        )
    except ImportError as error:
        raise BackfillError(
            'backfill on Databricks needs: pip install "databricks-agents>=1.13"'
        ) from error
    # 率を省くとクライアントが AttributeError になり、時刻を省くと 7 日間に変わるので、必ず渡す
    configs = [BackfillScorerConfig(scorer=t.scorer, sample_rate=t.sample_rate) for t in targets]
    window: dict[str, Any] = {"start_time": start, "end_time": end}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # クライアントは進捗を print する
            return str(backfill_scorers(experiment_id=experiment_id, scorers=configs, **window))
    except (ValueError, OSError, MlflowException) as error:  # requests の例外は OSError
        raise BackfillError(
            f"Databricks refused the backfill: {error}; scorers must be registered and started"
        ) from error
