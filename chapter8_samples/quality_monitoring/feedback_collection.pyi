"""8.3.3 ユーザーフィードバックの収集(リスト8.10)。"""

from typing import Any
from mlflow.entities import Assessment
from .feedback import IssueType, Severity

def log_thumbs_feedback(trace_id: str, is_positive: bool, user_id: str, comment: str | None=None, **send: Any) -> Assessment:
    """良い / 悪いを記録する(評価名 ``user_thumbs``、値は真偽値)。押し直すと置き換える。

    Args:
        trace_id: 応答と一緒に画面へ返したトレース ID。
        is_positive: 良ければ真。
        user_id: 評価した人。個人を特定したくなければ ``pseudonymize()`` を通す。
        comment: 理由(任意、10,000 文字まで)。
        send: ``feedback_id``(画面が付けた重複防止の ID)、``timeout_seconds``(秒)、
            ``deliver``(``send_feedback()`` の代わりに届ける関数)。

    Raises:
        FeedbackError: 下位クラスは ``send_feedback()`` を参照。
    """

def log_rating_feedback(trace_id: str, rating: float, user_id: str, rationale: str | None=None, *, scale: tuple[float, float]=(1, 5), **send: Any) -> Assessment:
    """点数を記録する(評価名 ``user_rating``)。``scale`` は両端を含む範囲。付け直すと置き換える。"""

def log_text_feedback(trace_id: str, comment: str, user_id: str, category: str | None=None, **send: Any) -> Assessment:
    """自由記述を記録する(評価名 ``user_comment``、10,000 文字まで)。分類はメタデータに入る。"""

def log_issue_report(trace_id: str, issue_type: IssueType | str, description: str, user_id: str, severity: Severity | str='medium', **send: Any) -> Assessment:
    """問題の報告を記録する(評価名 ``user_issue``、値は種類、説明は ``rationale``)。

    本書の旧版は評価名に種類を含めていた(``issue_report_...``)。名前が増え続けると
    ``feedback.user_issue = 'hallucination'`` のような検索ができないので、名前は 1 つにした。
    """

def log_user_correction(trace_id: str, expected_response: str, user_id: str, correction_type: str='factual', **send: Any) -> Assessment:
    """正しい答えを、``Correctness`` が読む期待値 ``expected_response`` として記録する。"""

def pseudonymize(user_id: str, key: bytes) -> str:
    """ユーザー ID を、鍵がなければ元に戻せない 32 文字の仮名にする(同じ人は同じ仮名)。"""

class FeedbackCollector:
    """1 人のユーザーのフィードバックをまとめて送る。トレース ID は必ず明示する。

    本書の旧版は、省略すると「最後のトレース」に記録した。並行してリクエストを受けるサーバーでは
    他人のトレースに付いてしまうので、省略はエラーにする。
    """

    def __init__(self, user_id: str, trace_id: str | None=None) -> None:
        self._trace_id = trace_id

    @property
    def trace_id(self) -> str:
        """いま対象にしているトレース。"""

    def set_trace(self, trace_id: str) -> FeedbackCollector:
        """対象のトレースを選ぶ。続けて ``collector.set_trace(id).thumbs_up()`` と書ける。"""

    def thumbs_up(self, comment: str | None=None) -> Assessment:
        """良い、と評価する。"""

    def thumbs_down(self, comment: str | None=None) -> Assessment:
        """悪い、と評価する。"""

    def rate(self, rating: float, rationale: str | None=None) -> Assessment:
        """1 から 5 の点数を付ける。"""

    def comment(self, text: str, category: str | None=None) -> Assessment:
        """自由記述を送る。"""

    def report_issue(self, issue_type: IssueType | str, description: str, severity: Severity | str='medium') -> Assessment:
        """問題を報告する。"""

    def correct(self, expected_response: str, correction_type: str='factual') -> Assessment:
        """正しい答えを教える。"""

def main() -> None:
    """サンプルを実行する。"""
