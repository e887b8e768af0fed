"""8.3.4 スコアラーの状態を変える: 一覧、割合の変更、休止、再開、削除(リスト8.12)。"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Literal
from .scoring import ScorerPlan, ScorerStatus
State = Literal['UNREGISTERED', 'STARTED', 'STOPPED']
RECOMMENDED_SAMPLE_RATES = {'safety': 1.0, 'relevance': 0.5, 'groundedness': 0.5, 'guidelines': 0.5, 'complex_custom': 0.1}

@dataclass(frozen=True)
class LifecycleStep:
    """操作を 1 つ終えたあとの、保存先から読み直した状態。"""
    operation: str
    state: State
    sample_rate: float = 0.0
    filter_string: str | None = None

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

def server_scored_until(experiment_name: str) -> datetime | None:
    """MLflow サーバーの自動採点が、どの時刻のトレースまで進んだか。まだなら ``None``。

    ``start()`` は、サーバーのジョブ実行が無効でも成功し、何も採点されない。``None`` のまま、または
    何分も前の時刻のままなら、``MLFLOW_SERVER_ENABLE_JOB_EXECUTION`` を確かめる。
    """

def set_trace_archive(experiment_name: str, table: str | None) -> None:
    """Databricks のトレースを表 ``catalog.schema.name`` に写す。``None`` でやめる。

    Raises:
        ScorerSetupError: Databricks でない、すでに写している、写していない、など。
    """

def demonstrate_scorer_lifecycle(experiment_name: str, plan: ScorerPlan) -> Iterator[LifecycleStep]:
    """登録から削除までを行い、操作のたびに保存先から読み直した状態を返す。"""

def estimate_monthly_judge_cost(traffic: float, rates: Mapping[str, float], judge_price: tuple[float, float] | tuple[Decimal, Decimal] | float | Decimal=(0.4, 1.6), *, tokens_per_call: tuple[int, int]=(600, 60)) -> float:
    """スコアラーの割合から、1 か月のジャッジのコスト(USD)を見積もる。

    Args:
        traffic: 1 か月のトレースの数。
        rates: LLM ジャッジごとの割合。
        judge_price: 入力と出力の単価(USD / 100 万トークン)。``JudgePrice`` でもよい。
            数を 1 つだけ渡すと、ジャッジ 1 回の額(USD)とみなす。既定は gpt-4.1-mini。
        tokens_per_call: ジャッジ 1 回の入力と出力のトークン数。評価に残る実績から決めるとよい。

    Raises:
        ScorerSetupError: 割合が範囲外、数が負。
    """

def main() -> None:
    """サンプルを実行する。"""
