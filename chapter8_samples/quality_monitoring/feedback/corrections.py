"""8.3.3 ユーザーの訂正から、評価データセットを作る。

訂正(期待値 ``expected_response``)の付いたトレースを、質問と正解の組に直す。直したアプリを同じ質問で
評価すれば、本番で見つかった誤りが本当に直ったか、別の変更でまた壊れていないかを確かめられる。

Databricks では ``dataset_name`` に ``catalog.schema.name`` を渡す(Unity Catalog の表になる)。
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Any, cast

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Trace
from mlflow.exceptions import MlflowException

from .request import CORRECTION


def corrections_to_dataset(
    experiment_name: str,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    dataset_name: str | None = None,
) -> list[dict[str, Any]]:
    """期間 ``[start, end)`` の訂正を、``mlflow.genai.evaluate(data=...)`` に渡せる行にする。

    同じトレースに何人かの訂正があれば、最後のものを正解とする。同じ質問は、最後のトレースだけを残す。

    Args:
        experiment_name: エクスペリメントの名前。
        start: 開始(タイムゾーン付き)。省くと最初から。
        end: 終了(タイムゾーン付き)。省くと現在まで。
        dataset_name: MLflow の評価データセットの名前。なければ作り、あれば行を足す。
            同じ質問の行は置き換わる。省くと、何も保存しない。

    Raises:
        ValueError: エクスペリメントがない、時刻にタイムゾーンがない。
    """
    found = MlflowClient().get_experiment_by_name(experiment_name)
    if found is None:
        raise ValueError(f"no experiment named {experiment_name!r} at {mlflow.get_tracking_uri()}")
    records: dict[str, dict[str, Any]] = {}
    for trace in _traces(found.experiment_id, _window(start, end)):
        record = _record(trace)
        if record is not None:
            records[repr(record["inputs"])] = record
    rows = list(records.values())
    if dataset_name is not None and rows:
        copies = [dict(row) for row in rows]  # 渡した行に、出所などが書き足される
        _dataset(dataset_name, found.experiment_id).merge_records(copies)
    return rows


def _window(start: datetime | None, end: datetime | None) -> str:
    parts: list[str] = []
    for moment, sign in ((start, ">="), (end, "<")):
        if moment is not None:
            if moment.tzinfo is None:
                raise ValueError(f"{moment.isoformat()} has no time zone")
            parts.append(f"timestamp_ms {sign} {round(moment.timestamp() * 1000)}")
    return " AND ".join(parts)


def _traces(experiment_id: str, filter_string: str) -> Iterator[Trace]:
    token: str | None = None
    while True:
        page = MlflowClient().search_traces(
            locations=[experiment_id],
            filter_string=filter_string or None,
            max_results=100,
            order_by=["timestamp_ms ASC"],
            page_token=token,
            include_spans=False,
        )
        for trace in page:
            if any(a.name == CORRECTION for a in trace.info.assessments):
                yield MlflowClient().get_trace(trace.info.trace_id)
        token = cast("str | None", page.token)
        if not token:
            return


def _record(trace: Trace) -> dict[str, Any] | None:
    root = next((span for span in trace.data.spans if span.parent_id is None), None)
    told = [a for a in trace.info.assessments if a.name == CORRECTION and a.expectation]
    if root is None or not told:
        return None
    last = max(told, key=lambda a: a.last_update_time_ms or 0)
    inputs: Any = root.inputs
    return {
        "inputs": inputs if isinstance(inputs, dict) else {"input": inputs},
        "expectations": {CORRECTION: last.expectation.value if last.expectation else None},
    }


def _dataset(name: str, experiment_id: str) -> Any:
    from mlflow.genai import datasets

    if mlflow.get_tracking_uri().startswith("databricks"):
        try:
            return datasets.get_dataset(name=name)
        except MlflowException:
            return datasets.create_dataset(name=name, experiment_id=experiment_id)
    known = datasets.search_datasets(experiment_ids=[experiment_id])
    same = [dataset for dataset in known if dataset.name == name]
    return same[0] if same else datasets.create_dataset(name=name, experiment_id=experiment_id)
