"""8.3.4 スコアラーの状態を変える: 一覧、割合の変更、休止、再開、削除(リスト8.12)。"""

from collections.abc import Iterator
from typing import Literal, NamedTuple
from .scoring.plan import ScorerPlan
from .scoring.registry import ScorerStatus
RECOMMENDED_SAMPLE_RATES = {'safety': 1.0, 'relevance': 0.5, 'groundedness': 0.5, 'guidelines': 0.5, 'complex_custom': 0.1}

def list_scorer_statuses(experiment_name: str) -> list[ScorerStatus]:
    """登録済みのスコアラー(最新版)と、誰が何割を採点しているか。休止中の割合は 0.0。

    別のプロセスから ``run_scoring_cycle()`` に渡せる。OSS 版では、コードのスコアラーは
    登録されないので含まれない。
    """

def get_scorer_status(experiment_name: str, name: str) -> ScorerStatus:
    """スコアラー 1 つの状態。なければ ``ScorerNotFoundError``。"""

def change_sample_rate(experiment_name: str, name: str, sample_rate: float, *, filter_string: str | Literal['keep'] | None='keep') -> ScorerStatus:
    """割合を変える。フィルターは、渡さなければそのまま残り、``None`` を渡すとなくなる。

    休止中なら、再開後の割合になる。
    """

def pause_scorer(experiment_name: str, name: str) -> ScorerStatus:
    """採点を休止する。登録、割合、フィルターは残る。"""

def resume_scorer(experiment_name: str, name: str) -> ScorerStatus:
    """休止した採点を、休止前の割合とフィルターで再開する。"""

def stop_all_scorers(experiment_name: str) -> list[ScorerStatus]:
    """すべてのスコアラーを休止する。"""

def remove_scorer(experiment_name: str, name: str) -> None:
    """スコアラーを、すべての版について削除する。トレースに残る評価は消えない。"""

def delete_all_scorers(experiment_name: str, confirm: bool=False) -> list[str]:
    """すべてのスコアラーを削除し、名前を返す。``confirm=True`` がなければ、消さずに例外にする。"""

class LifecycleStep(NamedTuple):
    """操作を 1 つ終えたあとの、保存先から読み直した状態。"""
    operation: str
    state: Literal['UNREGISTERED', 'STARTED', 'STOPPED'] = 'UNREGISTERED'
    sample_rate: float = 0.0
    filter_string: str | None = None

def demonstrate_scorer_lifecycle(experiment_name: str, plan: ScorerPlan) -> Iterator[LifecycleStep]:
    """登録から削除までを行い、操作のたびに保存先から読み直した状態を返す。"""

def main() -> None:
    """登録から削除までを、操作のたびに読み直して表にする。"""
