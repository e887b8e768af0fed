"""8.3.5 直近のトレースを定期的に採点する(継続的評価、リスト8.11)。"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Protocol
from mlflow.genai.scorers import Scorer
from .scoring_plan import ScoringOptions, ScoringReport, ScoringTarget
from .scoring_engine import ProgressCallback

class _StatusLike(Protocol):
    """``scorer_setup.ScorerStatus`` と同じ形。"""
    name: str
    scorer: Scorer
    runs: str
    sample_rate: float
    filter_string: str | None

def run_scoring_cycle(experiment_name_or_id: str, scorers: Sequence[Any], *, lookback: timedelta=timedelta(hours=1), options: ScoringOptions | None=None, now: datetime | None=None, flush: bool=True, on_progress: ProgressCallback | None=None) -> ScoringReport:
    """直近 ``lookback`` のトレースを採点する。cron などから、それより短い間隔で呼ぶ。

    重なった分は、採点済みとして飛ばされる。

    Args:
        scorers: ``setup_quality_scorers()`` の戻り値か、MLflow のスコアラー。
            休止中のものと、サーバーや Databricks が採点するものは飛ばす。
        flush: 先に、このプロセスの未保存のトレースを書き出す(トレースを作るプロセスでは約 2 秒)。

    Raises:
        ScoringError: エクスペリメントやジャッジの API キーがない、など。
    """

def as_target(scorer: Scorer | ScoringTarget | _StatusLike) -> ScoringTarget:
    """スコアラー、または ``ScorerStatus`` を採点の指定に直す。"""

def main() -> None:
    """サンプルを実行する。"""
