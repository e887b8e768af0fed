"""8.3.3 ユーザーフィードバックの収集(リスト8.10)。

トレースは非同期に保存されるため、応答の直後に送ったフィードバックは、そのままでは約 5 秒のあいだ
「トレースがない」と断られて失われる。ここでは届くまで待ち、二重に記録せず、届かなければ例外で知らせる。

実行::

    $ python chapter8_samples/03_quality_monitoring/feedback_collection.py
    応答の直後に送ったフィードバック: user_thumbs = False(保存 1 件)
    考え直して評価を変更: user_thumbs = True(保存 2 件、うち有効 1 件)
    このトレースの有効な記録
      expected_response  返品には 3 営業日かかります。送料は無料です。
      user_comment       返品の送料も知りたい
      user_issue         incomplete
      user_rating        4
      user_thumbs        True
    拒否された入力: rating must be between 1 and 5, got 99

本番サーバーには ``mlflow-tracing`` だけがあればよい。Databricks でも同じコードで動く
(``MLFLOW_TRACKING_URI=databricks``)。トレース ID は応答と一緒に画面へ返し、画面から受け取る。
サーバーで ``mlflow.get_last_active_trace_id()`` を使うと、他人のトレースに記録することがある。
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlflow
from mlflow.entities import Assessment
from mlflow.tracing.client import TracingClient

from chapter8_samples.quality_monitoring.feedback import (
    MAX_ID_CHARS,
    FeedbackRequest,
    FeedbackValidationError,
    IssueType,
    Severity,
    check_text,
    check_trace_id,
    correction_request,
    issue_request,
    rating_request,
    send_feedback,
    text_request,
    thumbs_request,
)


def log_thumbs_feedback(
    trace_id: str, is_positive: bool, user_id: str, comment: str | None = None, **send: Any
) -> Assessment:
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
    return _send(thumbs_request(trace_id, is_positive, user_id, comment), **send)


def log_rating_feedback(
    trace_id: str,
    rating: float,
    user_id: str,
    rationale: str | None = None,
    *,
    scale: tuple[float, float] = (1, 5),
    **send: Any,
) -> Assessment:
    """点数を記録する(評価名 ``user_rating``)。``scale`` は両端を含む範囲。付け直すと置き換える。"""
    return _send(rating_request(trace_id, rating, user_id, rationale, scale), **send)


def log_text_feedback(
    trace_id: str, comment: str, user_id: str, category: str | None = None, **send: Any
) -> Assessment:
    """自由記述を記録する(評価名 ``user_comment``、10,000 文字まで)。分類はメタデータに入る。"""
    return _send(text_request(trace_id, comment, user_id, category), **send)


def log_issue_report(
    trace_id: str,
    issue_type: IssueType | str,
    description: str,
    user_id: str,
    severity: Severity | str = "medium",
    **send: Any,
) -> Assessment:
    """問題の報告を記録する(評価名 ``user_issue``、値は種類、説明は ``rationale``)。

    本書の旧版は評価名に種類を含めていた(``issue_report_...``)。名前が増え続けると
    ``feedback.user_issue = 'hallucination'`` のような検索ができないので、名前は 1 つにした。
    """
    return _send(issue_request(trace_id, issue_type, description, user_id, severity), **send)


def log_user_correction(
    trace_id: str,
    expected_response: str,
    user_id: str,
    correction_type: str = "factual",
    **send: Any,
) -> Assessment:
    """正しい答えを、``Correctness`` が読む期待値 ``expected_response`` として記録する。"""
    request = correction_request(trace_id, expected_response, user_id, correction_type)
    return _send(request, **send)


def _send(
    request: FeedbackRequest,
    *,
    feedback_id: str | None = None,
    timeout_seconds: float = 15.0,
    deliver: Callable[..., Assessment] = send_feedback,
) -> Assessment:
    if feedback_id:
        request = replace(request, feedback_id=feedback_id)
    return deliver(request, timeout_seconds=timeout_seconds)


def pseudonymize(user_id: str, key: bytes) -> str:
    """ユーザー ID を、鍵がなければ元に戻せない 32 文字の仮名にする(同じ人は同じ仮名)。"""
    return hmac.new(key, user_id.encode(), hashlib.sha256).hexdigest()[:32]


class FeedbackCollector:
    """1 人のユーザーのフィードバックをまとめて送る。トレース ID は必ず明示する。

    本書の旧版は、省略すると「最後のトレース」に記録した。並行してリクエストを受けるサーバーでは
    他人のトレースに付いてしまうので、省略はエラーにする。
    """

    def __init__(self, user_id: str, trace_id: str | None = None) -> None:
        self.user_id = check_text("user_id", user_id, MAX_ID_CHARS)
        self._trace_id = trace_id

    @property
    def trace_id(self) -> str:
        """いま対象にしているトレース。"""
        if self._trace_id is None:
            raise FeedbackValidationError("no trace selected: call set_trace(trace_id) first")
        return self._trace_id

    def set_trace(self, trace_id: str) -> FeedbackCollector:
        """対象のトレースを選ぶ。続けて ``collector.set_trace(id).thumbs_up()`` と書ける。"""
        check_trace_id(trace_id)
        self._trace_id = trace_id
        return self

    def thumbs_up(self, comment: str | None = None) -> Assessment:
        """良い、と評価する。"""
        return log_thumbs_feedback(self.trace_id, True, self.user_id, comment)

    def thumbs_down(self, comment: str | None = None) -> Assessment:
        """悪い、と評価する。"""
        return log_thumbs_feedback(self.trace_id, False, self.user_id, comment)

    def rate(self, rating: float, rationale: str | None = None) -> Assessment:
        """1 から 5 の点数を付ける。"""
        return log_rating_feedback(self.trace_id, rating, self.user_id, rationale)

    def comment(self, text: str, category: str | None = None) -> Assessment:
        """自由記述を送る。"""
        return log_text_feedback(self.trace_id, text, self.user_id, category)

    def report_issue(
        self, issue_type: IssueType | str, description: str, severity: Severity | str = "medium"
    ) -> Assessment:
        """問題を報告する。"""
        return log_issue_report(self.trace_id, issue_type, description, self.user_id, severity)

    def correct(self, expected_response: str, correction_type: str = "factual") -> Assessment:
        """正しい答えを教える。"""
        return log_user_correction(self.trace_id, expected_response, self.user_id, correction_type)


def main() -> None:
    """サンプルを実行する。"""
    from chapter8_samples import _lab

    @mlflow.trace
    def answer(question: str) -> str:
        return f"{question}には 3 営業日かかります。"

    with _lab.sample("ch8-feedback"):
        answer("返品")
        trace_id = mlflow.get_last_active_trace_id(thread_local=True)  # デモなので 1 スレッド
        assert trace_id is not None
        user = FeedbackCollector("user-123", trace_id)

        vote = user.thumbs_down("送料のことが書かれていない")
        kept = len(_stored(trace_id))
        print(f"応答の直後に送ったフィードバック: {vote.name} = {_value(vote)}(保存 {kept} 件)")
        vote = user.thumbs_up()
        kept, valid = len(_stored(trace_id)), len(_valid(trace_id))
        print(
            f"考え直して評価を変更: {vote.name} = {_value(vote)}"
            f"(保存 {kept} 件、うち有効 {valid} 件)"
        )
        user.rate(4)
        user.comment("返品の送料も知りたい", category="content")
        user.report_issue(IssueType.INCOMPLETE, "送料の説明がない")
        user.correct("返品には 3 営業日かかります。送料は無料です。")
        print("このトレースの有効な記録")
        for assessment in sorted(_valid(trace_id), key=lambda a: a.name):
            print(f"  {assessment.name:<19}{_value(assessment)}")
        try:
            user.rate(99)
        except FeedbackValidationError as error:
            print("拒否された入力:", error)


def _stored(trace_id: str) -> list[Assessment]:
    return TracingClient().get_trace_info(trace_id).assessments


def _valid(trace_id: str) -> list[Assessment]:
    return [assessment for assessment in _stored(trace_id) if assessment.valid is not False]


def _value(assessment: Assessment) -> object:
    told = assessment.feedback or assessment.expectation
    return told.value if told else None


if __name__ == "__main__":
    main()
