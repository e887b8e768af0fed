"""8.3.4 コードのスコアラーを、登録する前に確かめる。"""

from collections.abc import Mapping
from typing import Any
from mlflow.entities import Trace
from mlflow.genai.scorers import Scorer
from .scorer_setup import FINISHED_TRACES, ScorerSetupError, ScorerStatus

class CustomScorerError(ScorerSetupError):
    """このコードのスコアラーは、登録すると動かない。"""

def setup_custom_code_scorer(experiment_name: str, scorer: Scorer, sample_rate: float=0.1, *, filter_string: str | None=FINISHED_TRACES, sample: Trace | Mapping[str, Any] | None=None) -> ScorerStatus:
    """コードのスコアラーを、確かめてから登録し、開始する。

    Args:
        experiment_name: エクスペリメントの名前。なければ作る。
        scorer: ``@scorer`` を付けた関数。
        sample_rate: 採点するトレースの割合(0 より大きく 1 以下)。
        filter_string: 採点の対象にするトレース。
        sample: 試しに採点するトレースか ``{"inputs": ..., "outputs": ...}``。渡すことを勧める。

    Raises:
        CustomScorerError: 登録すると動かなくなる書き方をしている。
        ScorerSetupError: 割合が範囲外、サーバーが断った、など。
    """

def validate_custom_scorer(scorer: Scorer, sample: Trace | Mapping[str, Any] | None=None) -> object:
    """組み立て直しても同じ結果になることを確かめ、``sample`` への評価の値を返す。

    Args:
        scorer: ``@scorer`` を付けた関数。
        sample: 試しに採点するトレースか、``inputs``、``outputs``、``expectations``、``trace`` の
            辞書。省くと、実行せずに書き方だけを調べる。

    Raises:
        CustomScorerError: 1 行で書いた本体、外の変数や import、``sample`` での失敗など。
    """
LIMIT = 100

def main() -> None:
    """サンプルを実行する。"""
