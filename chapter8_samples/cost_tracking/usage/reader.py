"""8.2.3 保存先のトレースを、1 件ずつ問い合わせずに読む(本書にリストなし)。"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, cast

import mlflow
from mlflow.entities import Trace
from mlflow.tracing.client import TracingClient  # MlflowClient は mlflow-tracing にない

PAGE_SIZE = 500  # MLflow サーバーが 1 回に返す上限


class ExperimentNotFoundError(LookupError):
    """その名前のエクスペリメントが、いまの接続先にない。"""


class TraceNotFoundError(LookupError):
    """その ID のトレースが、いまの接続先にない。"""


def find_experiment_id(experiment_name: str) -> str:
    """エクスペリメントの ID。なければ作らずに ``ExperimentNotFoundError``。"""
    experiment = cast(Any, TracingClient()).store.get_experiment_by_name(experiment_name)
    if experiment is None:
        raise ExperimentNotFoundError(
            f"no experiment {experiment_name!r} at {mlflow.get_tracking_uri()}; "
            "check the name and MLFLOW_TRACKING_URI"
        )
    return experiment.experiment_id


def load_trace(trace: Trace | str) -> Trace:
    """ID なら読み込み、トレースならそのまま返す。なければ ``TraceNotFoundError``。"""
    found = mlflow.get_trace(trace) if isinstance(trace, str) else trace
    if found is None:
        raise TraceNotFoundError(f"no trace {trace!r} at {mlflow.get_tracking_uri()}")
    return found


def iter_traces(
    experiment_id: str,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    filter_string: str | None = None,
    include_spans: bool = False,
    page_size: int = PAGE_SIZE,
) -> Iterator[Trace]:
    """期間のトレースを古い順に 1 件ずつ。1 件ごとに問い合わせず、ページ単位で読む。"""
    if page_size < 1:
        raise ValueError(f"page_size must be >= 1, got {page_size!r}")
    conditions: list[str] = []
    if start:
        conditions.append(f"timestamp_ms >= {_millis('start', start)}")
    if end:
        conditions.append(f"timestamp_ms < {_millis('end', end)}")
    if filter_string:
        conditions.append(filter_string)
    client, token = TracingClient(), None
    while True:
        page = client.search_traces(
            locations=[experiment_id],
            filter_string=" AND ".join(conditions) or None,
            max_results=page_size,
            order_by=["timestamp_ms ASC"],
            page_token=token,
            include_spans=include_spans,
        )
        yield from page
        token = cast("str | None", page.token)
        if not token:
            return


def _millis(name: str, at: datetime) -> int:
    return round(with_time_zone(name, at).timestamp() * 1000)


def with_time_zone(name: str, at: datetime) -> datetime:
    """時刻をそのまま返す。タイムゾーンがなければ、どこの時刻か分からないので ``ValueError``。"""
    if at.tzinfo is None:
        raise ValueError(f"{name}={at!r} has no time zone; use datetime(..., tzinfo=timezone.utc)")
    return at
