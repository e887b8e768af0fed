"""8.3.5 サーバーと Databricks に任せた採点(進み具合、写し)。"""

from __future__ import annotations

import contextlib
import io
import json
from datetime import datetime, timezone

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from .registry import ScorerSetupError, detect_backend, existing_experiment_id

_CHECKPOINT_TAG = "mlflow.latestOnlineScoring.trace.checkpoint"


def server_scored_until(experiment_name: str) -> datetime | None:
    """MLflow サーバーの自動採点が、どの時刻のトレースまで進んだか。まだなら ``None``。

    ``start()`` は、サーバーのジョブ実行が無効でも成功し、何も採点されない。``None`` のまま、または
    何分も前の時刻のままなら、``MLFLOW_SERVER_ENABLE_JOB_EXECUTION`` を確かめる。
    """
    tags = MlflowClient().get_experiment(existing_experiment_id(experiment_name)).tags
    checkpoint = tags.get(_CHECKPOINT_TAG)
    if not checkpoint:
        return None
    return datetime.fromtimestamp(json.loads(checkpoint)["timestamp_ms"] / 1000, timezone.utc)


def set_trace_archive(experiment_name: str, table: str | None) -> None:
    """Databricks のトレースを表 ``catalog.schema.name`` に写す。``None`` でやめる。"""
    if detect_backend() != "databricks":
        raise ScorerSetupError("trace archival needs MLFLOW_TRACKING_URI=databricks")
    from mlflow.tracing import archival

    where = {"experiment_id": existing_experiment_id(experiment_name)}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # クライアントは結果を print する
            if table is None:
                archival.disable_databricks_trace_archival(**where)
            else:
                archival.enable_databricks_trace_archival(delta_table_fullname=table, **where)
    except (ImportError, OSError, MlflowException) as error:  # requests の例外は OSError
        raise ScorerSetupError(f"trace archival of {experiment_name!r}: {error}") from error
