"""8.3.4 スコアラーの登録と開始(リスト8.12)。"""

from collections.abc import Sequence
from typing import Any
from .scoring.plan import FINISHED_TRACES, ScorerPlan
from .scoring.registry import ScorerStatus

def setup_quality_scorers(experiment_name: str, safety_sample_rate: float=1.0, quality_sample_rate: float=0.5, custom_guidelines: str | Sequence[str] | None=None, *, judge_model: str | None=None, filter_string: str | None=FINISHED_TRACES, extra: Sequence[ScorerPlan]=(), create_judge_endpoint: bool=False, tracking_uri: str | None=None) -> list[ScorerStatus]:
    """本番の品質監視に使うスコアラーをまとめて登録し、開始する。

    何度呼んでもよい。定義が同じなら新しい版を作らず、割合とフィルターだけを合わせる。

    Args:
        safety_sample_rate: 安全性を採点する割合(0 より大きく 1 以下)。ほかは
            ``quality_sample_rate``。
        custom_guidelines: 自然言語の採点基準(1 つでも複数でもよい)。
        judge_model: すべてのジャッジのモデル。省くと、Databricks では用意されたもの、ほかでは
            ``MLFLOW_GENAI_JUDGE_DEFAULT_MODEL``、サーバーの接続先 ``judge``、gpt-4.1-mini の順。
        filter_string: 採点の対象にするトレース。
        extra: 追加のスコアラー。
        create_judge_endpoint: サーバーに接続先がなければ、``OPENAI_API_KEY`` を保存して作る。
        tracking_uri: MLflow の接続先。省略すると環境変数か、手元の SQLite。

    Raises:
        ScorerSetupError: 割合が範囲外、サーバーが拒否した、など。
    """

def setup_builtin_scorers(experiment_name: str, safety_sample_rate: float=1.0, quality_sample_rate: float=0.5, *, judge_model: str | None=None) -> list[ScorerStatus]:
    """組み込みのスコアラー(安全性、関連性、根拠)だけを登録し、開始する。"""

def setup_custom_guidelines_scorer(experiment_name: str, guidelines: str | Sequence[str], scorer_name: str='custom_guidelines', sample_rate: float=0.5, *, judge_model: str | None=None) -> ScorerStatus:
    """自然言語で書いた採点基準を、スコアラーとして登録し、開始する。"""

def evaluate_with_scorers(eval_data: Sequence[dict[str, Any]], statuses: Sequence[ScorerStatus]) -> dict[str, float]:
    """本番と同じスコアラーで ``inputs`` と ``outputs`` の行を評価し、平均を返す。"""

def main() -> None:
    """登録し、60 件のトレースを作って採点し(リスト8.11)、割合どおりに採点されたかを見る。"""
