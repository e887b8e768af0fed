"""8.3.3 ユーザーフィードバックの収集(リスト8.10)。"""

from collections.abc import Callable
from typing import Any
from mlflow.entities import Assessment
from .feedback.delivery import store_feedback
from .feedback.kinds import FeedbackRequest, FeedbackType

def send_feedback(request: FeedbackRequest, *, feedback_id: str | None=None, timeout_seconds: float=15.0, deliver: Callable[..., Any]=store_feedback) -> Any:
    """トレースが保存されるのを待って、ちょうど 1 回だけ記録する。戻り値は、記録した評価。

    ``feedback_id`` は画面が付けた重複防止の ID、``deliver`` は 1 回試みる関数
    (``outbox.submit`` など)。期限までに届かなければ ``FeedbackDeliveryError``(トレースがなければ
    その下の ``TraceNotFoundError``)、送り直しても無駄なら ``FeedbackError`` になる。
    """

def log_thumbs_feedback(trace_id: str, is_positive: bool, user_id: str, comment: str | None=None, **kw: Any) -> Assessment:
    """良い / 悪いを記録する(評価名 ``user_thumbs``、値は真偽値)。押し直すと置き換える。

    ``trace_id`` は応答と一緒に画面へ返したもの、``user_id`` は評価した人(個人を特定したくなければ
    ``pseudonymize()`` を通す)、``comment`` は理由、``kw`` は ``send_feedback()`` の引数。
    """

def log_rating_feedback(trace_id: str, rating: float, user_id: str, rationale: str | None=None, *, scale: tuple[float, float]=(1, 5), **kw: Any) -> Assessment:
    """点数を記録する(評価名 ``user_rating``)。``scale`` は両端を含む範囲。付け直すと置き換える。"""

def log_text_feedback(trace_id: str, comment: str, user_id: str, category: str | None=None, **kw: Any) -> Assessment:
    """自由記述を記録する(評価名 ``user_comment``、10,000 文字まで)。分類はメタデータに入る。"""

def log_issue_report(trace_id: str, issue_type: str, description: str, user_id: str, severity: str='medium', **kw: Any) -> Assessment:
    """問題の報告を記録する(評価名 ``user_issue``、値は種類、説明は ``rationale``)。"""

def log_user_correction(trace_id: str, expected_response: str, user_id: str, correction_type: str='factual', **kw: Any) -> Assessment:
    """正しい答えを、``Correctness`` が読む期待値 ``expected_response`` として記録する。"""

def withdraw_feedback(trace_id: str, user_id: str, kind: str=FeedbackType.THUMBS, **kw: Any) -> bool:
    """この人の、この種類の評価をすべて取り下げる(保存先から消える)。何もなければ偽。"""

class FeedbackCollector:
    """1 人のユーザーのフィードバックを送る。トレースを選ばずに呼ぶと例外になる。"""

    def __init__(self, user_id: str, trace_id: str | None=None) -> None:
        self.user_id = user_id
        self._trace_id = trace_id

    @property
    def trace_id(self) -> str:
        """いま対象にしているトレース。"""

    def set_trace(self, trace_id: str) -> FeedbackCollector:
        """対象のトレースを選ぶ。続けて ``collector.set_trace(id).thumbs_up()`` と書ける。"""

    def thumbs_up(self, comment: str | None=None) -> Assessment:
        ...

    def thumbs_down(self, comment: str | None=None) -> Assessment:
        ...

    def rate(self, rating: float, rationale: str | None=None) -> Assessment:
        ...

    def comment(self, text: str, category: str | None=None) -> Assessment:
        ...

    def report_issue(self, issue_type: str, description: str, severity: str='medium') -> Assessment:
        ...

    def correct(self, expected_response: str, correction_type: str='factual') -> Assessment:
        ...

    def withdraw(self, kind: str=FeedbackType.THUMBS) -> bool:
        ...

def main() -> None:
    """1 人のユーザーが評価し、考え直し、取り下げる。"""
