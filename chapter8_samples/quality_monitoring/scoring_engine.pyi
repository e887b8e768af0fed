"""8.3.5 保存済みのトレースを採点するエンジン(継続的評価とバックフィルの共通部品)。"""

import logging
from collections.abc import Callable, Sequence
from datetime import datetime
from mlflow.entities import Feedback, Trace
from mlflow.genai.scorers import Scorer
from .scoring_plan import ScoringOptions, ScoringReport, ScoringTarget
logger = logging.getLogger(__name__)
ProgressCallback = Callable[[ScoringReport], None]

def score_traces(experiment_id: str, targets: Sequence[ScoringTarget], *, start: datetime, end: datetime, options: ScoringOptions | None=None, on_progress: ProgressCallback | None=None) -> ScoringReport:
    """期間 ``[start, end)`` のトレースを採点する。採点済みは飛ばすので、続きから再開できる。

    Args:
        experiment_id: エクスペリメントの ID。
        targets: 使うスコアラー。
        start: この時刻以降に始まったトレースを対象にする(タイムゾーン付き)。
        end: この時刻より前に始まったトレースを対象にする(タイムゾーン付き)。
        on_progress: トレースを 1 件処理するたびに、途中の結果を渡して、採点のスレッドから呼ぶ。

    Raises:
        JudgeNotConfiguredError: ジャッジの API キーなどがない。
        BudgetError: 予算があるのに、ジャッジのコストが分からない。
        ScoringError: 引数が正しくない。
    """

def call_scorer(scorer: Scorer, trace: Trace) -> list[Feedback]:
    """スコアラーを 1 回呼ぶ。例外はエラーの付いた評価として返す。トレースは残さない。"""

def main() -> None:
    """サンプルを実行する。"""
