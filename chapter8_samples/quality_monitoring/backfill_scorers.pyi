"""8.3.5 過去のトレースをさかのぼって採点する(バックフィル)。"""

from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any
from mlflow.genai.scorers import Scorer
from . import ScoringOptions, ScoringReport, ScoringTarget
from .scoring.plan import ProgressCallback

def backfill_with_scorer_names(experiment_id: str, scorer_names: Sequence[str], start_time: datetime | None=None, end_time: datetime | None=None, **run: Any) -> ScoringReport:
    """登録済みのスコアラーを名前で指定し、いまの割合でさかのぼって採点する。

    期間と ``run`` は ``backfill()`` を参照。停止中のスコアラーは、割合がないので例外になる。
    """

def backfill_with_custom_sample_rates(experiment_id: str, scorer_configs: Sequence[ScoringTarget | Mapping[str, Any]], start_time: datetime | None=None, end_time: datetime | None=None, **run: Any) -> ScoringReport:
    """``{"scorer": ..., "sample_rate": 0.8}`` か ``ScoringTarget`` で、割合を決めて採点する。"""

def backfill_last_week(experiment_id: str, scorer_names: Sequence[str], **run: Any) -> ScoringReport:
    """直近 7 日間(168 時間)を採点する。"""

def backfill_date_range(experiment_id: str, scorer_names: Sequence[str], start_date: date | str, end_date: date | str, *, tz: str='Asia/Tokyo', **run: Any) -> ScoringReport:
    """``date`` か ``"2025-01-31"`` の形の、両端の日を含めて採点する。"""

def backfill_new_scorer(experiment_id: str, new_scorer: Scorer, sample_rate: float=0.5, days_back: int=30, *, dry_run: bool=False, options: ScoringOptions | None=None, on_progress: ProgressCallback | None=None) -> ScoringReport:
    """新しいスコアラーを登録・開始し、``days_back`` 日前までさかのぼって採点する。"""

def backfill(experiment_id: str, targets: Sequence[ScoringTarget], *, start_time: datetime | None=None, end_time: datetime | None=None, dry_run: bool=False, options: ScoringOptions | None=None, on_progress: ProgressCallback | None=None) -> ScoringReport:
    """期間 ``[start_time, end_time)`` のトレースを、さかのぼって採点する。

    時刻はタイムゾーン付き。終了を省くと現在、開始を省くと終了の 7 日前(警告をログに出す)。
    ``dry_run`` では、件数とコストを見積もるだけ。``options`` は Databricks のジョブには効かない。

    Raises:
        BackfillError: 期間やスコアラーが正しくない、Databricks が拒否した、など。
        ScoringBusyError: ほかの実行が、同じスコアラーで採点している。
    """

def main() -> None:
    """見積もり、予算、再開、やり直し、新しいスコアラーを試す。"""
