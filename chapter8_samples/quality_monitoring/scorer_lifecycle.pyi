"""8.3.4 スコアラーの状態を変える: 一覧、割合の変更、休止、再開、削除(リスト8.12)。"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal
from .scoring.registry import ScorerPlan, ScorerStatus
State = Literal['UNREGISTERED', 'STARTED', 'STOPPED']
RECOMMENDED_SAMPLE_RATES = {'safety': 1.0, 'relevance': 0.5, 'groundedness': 0.5, 'guidelines': 0.5, 'complex_custom': 0.1}

def list_scorer_statuses(experiment_name: str) -> list[ScorerStatus]:
    """登録済みのスコアラー(最新版)と、誰が何割を採点しているか。休止中の割合は 0.0。

    別のプロセスから ``run_scoring_cycle()`` に渡せる。OSS 版では、コードのスコアラーは
    登録されないので含まれない。
    """

def get_scorer_status(experiment_name: str, name: str) -> ScorerStatus:
    """スコアラー 1 つの状態。なければ ``ScorerNotFoundError``。"""

def state_of(experiment_name: str, name: str) -> State:
    """スコアラーの状態。"""

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
    """すべてのスコアラーを削除し、名前を返す。``confirm=True`` がなければ何もしない。"""

def estimate_monthly_judge_cost(traffic: float, rates: Mapping[str, float], judge_price: tuple[float, float] | tuple[Decimal, Decimal] | float | Decimal=(0.4, 1.6), *, tokens_per_call: tuple[int, int]=(600, 60)) -> float:
    """1 か月のトレースの数 ``traffic`` と割合から、ジャッジのコスト(USD / 月)を見積もる。

    ``judge_price`` は、入力と出力の単価(USD / 100 万トークン、``JudgePrice`` でもよい)か、ジャッジ
    1 回の額(USD)。既定は gpt-4.1-mini。
    """

@dataclass(frozen=True)
class LifecycleStep:
    """操作を 1 つ終えたあとの、保存先から読み直した状態。"""
    operation: str
    state: State
    sample_rate: float = 0.0
    filter_string: str | None = None

def demonstrate_scorer_lifecycle(experiment_name: str, plan: ScorerPlan) -> Iterator[LifecycleStep]:
    """登録から削除までを行い、操作のたびに保存先から読み直した状態を返す。"""

def main() -> None:
    """サンプルを実行する。"""
