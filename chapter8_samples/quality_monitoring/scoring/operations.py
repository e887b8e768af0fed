"""8.3.5 バックフィルの報告。サーバーと Databricks に任せた採点(ジョブ、進み具合、写し)。"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from .judges import ScoringError
from .plan import ScoringReport, ScoringTarget
from .registry import ScorerSetupError, detect_backend, existing_experiment_id

logger = logging.getLogger(__name__)
_CHECKPOINT_TAG = "mlflow.latestOnlineScoring.trace.checkpoint"


class BackfillError(ScoringError):
    """バックフィルを始められない。"""


@dataclass(frozen=True, kw_only=True)
class BackfillReport:
    """バックフィル 1 回の結果。Databricks では、ジョブを登録した時点の内容。"""

    job_id: str
    runs: Literal["client", "databricks"]
    start: datetime
    end: datetime
    sample_rates: Mapping[str, float]
    dry_run: bool = False
    scoring: ScoringReport | None = None  # Databricks のジョブでは None(採点はジョブの中で進む)

    @property
    def traces(self) -> int:
        """対象の期間にあったトレースの数。"""
        return self.scoring.traces if self.scoring else 0

    @property
    def scored(self) -> int:
        """採点した数(``dry_run`` では採点することになる数)。"""
        return self.scoring.scored if self.scoring else 0

    @property
    def skipped(self) -> int:
        """採点済みで飛ばした数。"""
        return self.scoring.skipped if self.scoring else 0

    @property
    def failed(self) -> int:
        """採点に失敗した数。"""
        return self.scoring.failed if self.scoring else 0

    @property
    def judge_calls(self) -> int:
        """LLM ジャッジを呼んだ(``dry_run`` では、呼ぶことになる)回数。"""
        return self.scoring.judge_calls if self.scoring else 0

    @property
    def cost_usd(self) -> float | None:
        """ジャッジのコスト(USD、``dry_run`` では見積もり)。単価が分からなければ ``None``。"""
        return self.scoring.cost_usd if self.scoring and not self.unpriced else None

    @property
    def unpriced(self) -> tuple[str, ...]:
        """単価が分からないスコアラー。"""
        return self.scoring.unpriced if self.scoring else ()


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
