"""8.3.5 過去のトレースをさかのぼって採点する(バックフィル)。"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any, Literal
from mlflow.genai.scorers import Scorer
from .scoring.judges import ScoringError
from .scoring.plan import ProgressCallback, ScoringOptions, ScoringReport, ScoringTarget
logger = logging.getLogger(__name__)
DEFAULT_DAYS = 7

class BackfillError(ScoringError):
    """バックフィルを始められない。"""

@dataclass(frozen=True, kw_only=True)
class BackfillReport:
    """バックフィル 1 回の結果。Databricks では、ジョブを登録した時点の内容。"""
    job_id: str
    runs: Literal['client', 'databricks']
    start: datetime
    end: datetime
    sample_rates: Mapping[str, float]
    dry_run: bool = False
    scoring: ScoringReport | None = None
    judge_calls: int = 0
    cost_usd: float | None = None
    unpriced: tuple[str, ...] = ()

    @property
    def traces(self) -> int:
        """対象の期間にあったトレースの数。"""

    @property
    def scored(self) -> int:
        """採点した数(``dry_run`` では採点することになる数)。"""

    @property
    def skipped(self) -> int:
        """採点済みで飛ばした数。"""

    @property
    def failed(self) -> int:
        """採点に失敗した数。"""

def backfill_with_scorer_names(experiment_id: str, scorer_names: Sequence[str], start_time: datetime | None=None, end_time: datetime | None=None, **run: Any) -> BackfillReport:
    """登録済みのスコアラーを名前で指定し、いまの割合でさかのぼって採点する。

    期間と ``run``(``dry_run``、``options``、``on_progress``)は ``backfill()`` を参照。停止中の
    スコアラーは、割合がないので ``BackfillError`` になる。
    """

def backfill_with_custom_sample_rates(experiment_id: str, scorer_configs: Sequence[ScoringTarget | Mapping[str, Any]], start_time: datetime | None=None, end_time: datetime | None=None, **run: Any) -> BackfillReport:
    """``{"scorer": ..., "sample_rate": 0.8}`` か ``ScoringTarget`` で、割合を決めて採点する。"""

def backfill_last_week(experiment_id: str, scorer_names: Sequence[str], **run: Any) -> BackfillReport:
    """直近 7 日間(168 時間)を採点する。"""

def backfill_date_range(experiment_id: str, scorer_names: Sequence[str], start_date: date | str, end_date: date | str, *, tz: str='Asia/Tokyo', **run: Any) -> BackfillReport:
    """``date`` か ``"2025-01-31"`` の形の、両端の日を含めて採点する。"""

def backfill_new_scorer(experiment_id: str, new_scorer: Scorer, sample_rate: float=0.5, days_back: int=30, *, dry_run: bool=False, options: ScoringOptions | None=None, on_progress: ProgressCallback | None=None) -> BackfillReport:
    """新しいスコアラーを登録・開始し、``days_back`` 日前までさかのぼって採点する。"""

def backfill(experiment_id: str, targets: Sequence[ScoringTarget], *, start_time: datetime | None=None, end_time: datetime | None=None, dry_run: bool=False, options: ScoringOptions | None=None, on_progress: ProgressCallback | None=None) -> BackfillReport:
    """期間 ``[start_time, end_time)`` のトレースを、さかのぼって採点する。

    Args:
        start_time: 開始(タイムゾーン付き)。省くと終了の 7 日前とし、警告をログに出す。
        end_time: 終了(タイムゾーン付き)。省くと現在。
        dry_run: 真なら、トレースの数、ジャッジの回数、コストを見積もるだけ。
        options: 並列数、呼び出し頻度、予算など。Databricks のジョブには効かない。
        on_progress: 1 件ごとと最後に、結果を渡して呼ぶ。省くと、端末には 1 行で途中経過を出す。

    Raises:
        BackfillError: 期間やスコアラーが正しくない、Databricks が断った、など。
        ScoringBusyError: ほかの実行が、同じスコアラーで採点している。
    """

def main() -> None:
    """サンプルを実行する。"""
