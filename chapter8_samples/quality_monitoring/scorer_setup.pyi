"""8.3.4 スコアラーの登録と開始(リスト8.12)。"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from mlflow.genai.scorers import Scorer
Backend = Literal['databricks', 'oss_http', 'oss_local']
Runs = Literal['server', 'client', 'databricks']
FINISHED_TRACES = "status = 'OK'"
DEFAULT_JUDGE = 'openai:/gpt-4.1-mini'
JUDGE_ENDPOINT = 'judge'
SETTING_TAG = 'quality.scorer.'

class ScorerSetupError(Exception):
    """スコアラーを登録・開始できない。"""

@dataclass(frozen=True, kw_only=True)
class ScorerPlan:
    """どのスコアラーを、何割のトレースに使うか。"""
    scorer: Scorer
    sample_rate: float = 1.0
    filter_string: str | None = FINISHED_TRACES

@dataclass(frozen=True, kw_only=True)
class ScorerStatus:
    """登録の結果。``run_scoring_cycle()`` にそのまま渡せる。"""
    name: str
    scorer: Scorer
    registered: bool
    runs: Runs
    sample_rate: float
    filter_string: str | None
    reason: str

    @property
    def version(self) -> int | None:
        """登録された版。登録していなければ ``None``。"""

@dataclass(frozen=True)
class KeptSetting:
    """エクスペリメントのタグに覚えておく、割合とフィルター(休止しても消えない)。"""
    sample_rate: float
    filter_string: str | None
    paused: bool = False

def detect_backend() -> Backend:
    """接続先の種類を、MLflow の tracking URI から判断する。"""

def setup_quality_scorers(experiment_name: str, safety_sample_rate: float=1.0, quality_sample_rate: float=0.5, custom_guidelines: str | Sequence[str] | None=None, *, judge_model: str | None=None, filter_string: str | None=FINISHED_TRACES, extra: Sequence[ScorerPlan]=(), create_judge_endpoint: bool=False, tracking_uri: str | None=None) -> list[ScorerStatus]:
    """本番の品質監視に使うスコアラーをまとめて登録し、開始する。

    何度呼んでもよい。定義が同じなら新しい版を作らず、割合とフィルターだけを合わせる。

    Args:
        safety_sample_rate: 安全性を採点する割合(0 より大きく 1 以下)。ほかは ``quality_...``。
        custom_guidelines: 自然言語の採点基準(1 つでも複数でもよい)。
        judge_model: 省略の仕方は ``resolve_judge_model()``。
        filter_string: 採点の対象にするトレース。``extra``: 追加のスコアラー。
        create_judge_endpoint: サーバーに接続先がなければ、``OPENAI_API_KEY`` を保存して作る。
        tracking_uri: MLflow の接続先。省略すると環境変数か、手元の SQLite。

    Raises:
        ScorerSetupError: 割合が範囲外、サーバーが断った、など。
    """

def setup_builtin_scorers(experiment_name: str, safety_sample_rate: float=1.0, quality_sample_rate: float=0.5, *, judge_model: str | None=None) -> list[ScorerStatus]:
    """組み込みのスコアラー(安全性、関連性、根拠)だけを登録し、開始する。"""

def setup_custom_guidelines_scorer(experiment_name: str, guidelines: str | Sequence[str], scorer_name: str='custom_guidelines', sample_rate: float=0.5, *, judge_model: str | None=None) -> ScorerStatus:
    """自然言語で書いた採点基準を、スコアラーとして登録し、開始する。"""

def setup_scorers(experiment_name: str, plans: Sequence[ScorerPlan]) -> list[ScorerStatus]:
    """任意のスコアラーを登録し、接続先に合わせて開始する。"""

def check_sample_rate(name: str, rate: object) -> float:
    """割合が 0 より大きく 1 以下の数であることを確かめる(MLflow は真偽値や 5.0 も受け入れる)。"""

def resolve_judge_model(judge_model: str | None=None, *, create_judge_endpoint: bool=False) -> str | None:
    """使うジャッジのモデル。Databricks では ``None``(用意されたジャッジ)。

    省くと、``MLFLOW_GENAI_JUDGE_DEFAULT_MODEL``、サーバーの接続先 ``judge``、既定の順。
    """

def kept_setting(experiment_id: str, name: str) -> KeptSetting | None:
    """覚えておいた割合とフィルター。なければ ``None``。"""

def keep_setting(experiment_id: str, name: str, setting: KeptSetting | None) -> None:
    """割合とフィルターを覚える。``None`` なら忘れる。"""

def check_filter(experiment_id: str, filter_string: str | None) -> None:
    """フィルターの誤りを、採点を始める前に知らせる(サーバーの採点では、サーバーが調べる)。"""

def who_runs(scorer: Scorer) -> tuple[Runs, str]:
    """このスコアラーを誰が採点するかと、その理由。"""

def is_custom_code(scorer: Scorer) -> bool:
    """``@scorer`` の関数(登録すると、ソースコードがサーバーで実行される)か、自作のクラスか。"""

def find_scorer(name: str, experiment_id: str) -> Scorer | None:
    """登録済みのスコアラー。なければ ``None``。"""

def set_sampling(scorer: Scorer, experiment_id: str, sample_rate: float, filter_string: str | None) -> Scorer:
    """割合とフィルターを合わせる。止まっていれば ``start()``、動いていれば ``update()`` を使う。"""

def evaluate_with_scorers(eval_data: Sequence[dict[str, Any]], statuses: Sequence[ScorerStatus]) -> dict[str, float]:
    """本番と同じスコアラーで ``inputs`` と ``outputs`` の行を評価し、平均を返す。"""

def main() -> None:
    """サンプルを実行する。"""
