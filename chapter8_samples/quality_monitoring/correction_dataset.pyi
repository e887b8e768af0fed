"""8.3.3 ユーザーの訂正から、評価データセットを作る。"""

from datetime import datetime
from typing import Any
CORRECTION = 'expected_response'

def corrections_to_dataset(experiment_name: str, start: datetime | None=None, end: datetime | None=None, *, dataset_name: str | None=None) -> list[dict[str, Any]]:
    """期間 ``[start, end)`` の訂正を、``mlflow.genai.evaluate(data=...)`` に渡せる行にする。

    同じトレースに何人かの訂正があれば、最後のものを正解とする。同じ質問は、最後のトレースだけを残す。

    Args:
        experiment_name: エクスペリメントの名前。
        start: 開始(タイムゾーン付き)。省くと最初から。
        end: 終了(タイムゾーン付き)。省くと現在まで。
        dataset_name: MLflow の評価データセットの名前。なければ作り、あれば行を足す。
            同じ質問の行は置き換わる。省くと、何も保存しない。

    Raises:
        ValueError: エクスペリメントがない、時刻にタイムゾーンがない。
    """

def main() -> None:
    """サンプルを実行する。"""
