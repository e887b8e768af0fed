"""8.2.3 保存先のトレースを、1 件ずつ問い合わせずに読む(本書にリストなし)。"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, cast

import mlflow
from mlflow.entities import Trace, TraceInfo
from mlflow.entities.trace_metrics import AggregationType, MetricAggregation, MetricViewType
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient  # MlflowClient は mlflow-tracing にない

WEIGHT_KEY = "sampling.weight"  # サンプリングで残したトレース 1 件が、何件分を代表するか
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
    bounds = ((">=", "start", start), ("<", "end", end))
    conditions = [f"timestamp_ms {op} {_millis(name, at)}" for op, name, at in bounds if at]
    conditions += [filter_string] if filter_string else []
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


def sampling_weight(info: TraceInfo) -> float:
    """このトレースが代表する件数。ないものと壊れたものは 1 件分(cost_analysis.sql と同じ扱い)。"""
    try:
        weight = float(info.trace_metadata.get(WEIGHT_KEY) or 1)
    except ValueError:
        return 1.0
    return weight if 0 < weight < float("inf") else 1.0


def totals_from_store(
    experiment_id: str, start: datetime | None = None, end: datetime | None = None
) -> dict[str, int] | None:
    """トレースを読まず、保存先の集計 API に足してもらう。

    1 件ずつ足したときと同じ数にならない恐れがあれば ``None``: サンプリングされたトレースがある、
    入力と出力の和が合計と違う(Gemini の思考トークンなど)、保存先が集計に対応していない。
    """
    weighted = f"metadata.`{WEIGHT_KEY}` IS NOT NULL"
    if next(iter_traces(experiment_id, start, end, filter_string=weighted, page_size=1), None):
        return None
    period = {
        "start_time_ms": _millis("start", start) if start else None,
        "end_time_ms": _millis("end", end) - 1 if end else None,  # この API の終わりは期間に入る
    }
    totals = {"trace_count": "COUNT", **dict.fromkeys(_TOKENS, "SUM")}
    try:
        found = {n: round(_ask_store(experiment_id, period, n, k)) for n, k in totals.items()}
        mean = _ask_store(experiment_id, period, "total_tokens", "AVG")
    except (MlflowException, NotImplementedError):  # 古いサーバー、Databricks、ファイルの保存先
        return None
    reported = found["total_tokens"] / mean if mean else 0.0  # 使用量のあるトレースの数
    unclear = abs(reported - round(reported)) > 0.1 or (not reported and found["trace_count"])
    if unclear or found["input_tokens"] + found["output_tokens"] != found["total_tokens"]:
        return None
    return {**found, "traces_without_usage": found["trace_count"] - round(reported)}


_TOKENS = ("input_tokens", "output_tokens", "total_tokens")


def _ask_store(experiment_id: str, period: dict[str, int | None], name: str, kind: str) -> float:
    points = cast(Any, TracingClient()).store.query_trace_metrics(
        experiment_ids=[experiment_id],
        view_type=MetricViewType.TRACES,
        metric_name=name,
        aggregations=[MetricAggregation(aggregation_type=AggregationType(kind))],
        **period,
    )
    return (points[0].values.get(kind) if points else 0.0) or 0.0
