"""8.3.3 ユーザーの訂正から、評価データセットを作る。

訂正(期待値 ``expected_response``)の付いたトレースを、質問と正解の組に直す。直したアプリを同じ質問で
評価すれば、本番で見つかった誤りが本当に直ったかを確かめられる。Databricks では ``dataset_name`` に
``catalog.schema.name`` を渡す(Unity Catalog の表になる)。
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import mlflow
from mlflow.entities import Assessment, TraceInfo
from mlflow.exceptions import MlflowException

from .kinds import CORRECTION
from .summary import trace_infos

_EVER = (datetime(1970, 1, 2, tzinfo=timezone.utc), datetime(9999, 1, 1, tzinfo=timezone.utc))


def corrections_to_dataset(
    experiment_name: str,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    dataset_name: str | None = None,
) -> list[dict[str, Any]]:
    """期間 ``[start, end)`` の訂正を、``mlflow.genai.evaluate(data=...)`` に渡せる行にする。

    同じ質問に何度か訂正があれば、最後の訂正を正解とする。期間は省くと全体。``dataset_name`` は、
    MLflow の評価データセットの名前で、なければ作り、同じ質問の行は置き換える(省くと保存しない)。

    Raises:
        ValueError: エクスペリメントがない、時刻にタイムゾーンがない。
    """
    infos = trace_infos(experiment_name, start or _EVER[0], end or _EVER[1])
    corrected = [(told, info) for info in infos if (told := _correction(info))]
    corrected.sort(key=lambda pair: pair[0].last_update_time_ms or 0)
    rows: dict[str, dict[str, Any]] = {}
    for told, info in corrected:
        inputs = _inputs(info.trace_id)
        if inputs is not None and told.expectation is not None:
            expectations = {CORRECTION: told.expectation.value}
            rows[repr(inputs)] = {"inputs": inputs, "expectations": expectations}
    if dataset_name is not None and rows:
        copies = [dict(row) for row in rows.values()]  # 渡した行に、出所などが書き足される
        _dataset(dataset_name, str(infos[0].experiment_id)).merge_records(copies)
    return list(rows.values())


def _correction(info: TraceInfo) -> Assessment | None:
    """最後の訂正。``evaluate()`` が、評価のトレースに転記した正解は除く。"""
    told = [a for a in info.assessments if a.name == CORRECTION]
    told = [a for a in told if "mlflow.assessment.sourceRunId" not in (a.metadata or {})]
    return max(told, key=lambda a: a.last_update_time_ms or 0, default=None)


def _inputs(trace_id: str) -> dict[str, Any] | None:
    trace = mlflow.get_trace(trace_id)
    roots = [span for span in trace.data.spans if span.parent_id is None] if trace else []
    if not roots:
        return None
    inputs: Any = roots[0].inputs
    return inputs if isinstance(inputs, dict) else {"input": inputs}


def _dataset(name: str, experiment_id: str) -> Any:
    from mlflow.genai import datasets

    try:
        if mlflow.get_tracking_uri().startswith("databricks"):
            return datasets.get_dataset(name=name)
        known = datasets.search_datasets(experiment_ids=[experiment_id])
        return next(dataset for dataset in known if dataset.name == name)
    except (MlflowException, StopIteration):
        return datasets.create_dataset(name=name, experiment_id=experiment_id)
