"""8.3.3 ユーザーフィードバックの収集(リスト8.10)。

トレースは非同期に保存されるため、応答の直後に送ったフィードバックは、そのままでは約 5 秒のあいだ
「トレースがない」と拒否されて失われる。ここでは届くまで待ち、二重に記録せず、届かなければ例外で知らせる。

実行::

    $ python chapter8_samples/03_quality_monitoring/feedback_collection.py
    mlflow.log_feedback をそのまま呼ぶ: RESOURCE_DOES_NOT_EXIST
    操作のたびに、有効な評価を読み直す
    低評価(応答の直後): {'user_thumbs': False}
    高評価に変更: {'user_thumbs': True}
    点数も付ける: {'user_rating': 4, 'user_thumbs': True}
    点数を取り下げる: {'user_thumbs': True}
    99 点を付ける: FeedbackValidationError(範囲の外): rating must be between 1 and 5, got 99

本番サーバーには ``mlflow-tracing`` だけがあればよい。Databricks でも同じコードで動く
(``MLFLOW_TRACKING_URI=databricks``)。トレース ID は応答と一緒に画面へ返し、画面から受け取る。
サーバーで ``mlflow.get_last_active_trace_id()`` を使うと、他人のトレースに記録することがある。
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlflow
from mlflow.entities import Assessment

from chapter8_samples.quality_monitoring.feedback import kinds
from chapter8_samples.quality_monitoring.feedback.delivery import hurry_export, store_feedback
from chapter8_samples.quality_monitoring.feedback.kinds import (
    FeedbackDeliveryError,
    FeedbackRequest,
    FeedbackType,
    FeedbackValidationError,
)


def send_feedback(
    request: FeedbackRequest,
    *,
    feedback_id: str | None = None,
    timeout_seconds: float = 15.0,
    deliver: Callable[..., Any] = store_feedback,
) -> Any:
    """トレースが保存されるのを待って、ちょうど 1 回だけ記録する。戻り値は、記録した評価。

    ``feedback_id`` は画面が付けた重複防止の ID、``deliver`` は 1 回試みる関数
    (``outbox.submit`` など)。期限までに届かなければ ``FeedbackDeliveryError``(トレースがなければ
    その下の ``TraceNotFoundError``)、送り直しても無駄なら ``FeedbackError`` になる。
    """
    if feedback_id:
        request = replace(request, feedback_id=feedback_id)
    deadline = time.monotonic() + timeout_seconds
    delay = 0.02  # 0.02、0.04、... 秒と延ばし、1 秒で止める
    while True:
        left = max(0.0, deadline - time.monotonic())
        try:
            return deliver(request, timeout_seconds=min(left, 5.0))
        except FeedbackDeliveryError:  # まだ保存されていないか、届かなかった
            if time.monotonic() + delay + 0.05 >= deadline:  # もう 1 回試みる時間がない
                raise
        hurry_export()  # 5 秒の間隔を待たずに、書き出しを始める
        time.sleep(delay)
        delay = min(2 * delay, 1.0)


def log_thumbs_feedback(
    trace_id: str, is_positive: bool, user_id: str, comment: str | None = None, **kw: Any
) -> Assessment:
    """良い / 悪いを記録する(評価名 ``user_thumbs``、値は真偽値)。押し直すと置き換える。

    ``trace_id`` は応答と一緒に画面へ返したもの、``user_id`` は評価した人(個人を特定したくなければ
    ``pseudonymize()`` を通す)、``comment`` は理由、``kw`` は ``send_feedback()`` の引数。
    """
    return send_feedback(kinds.thumbs_request(trace_id, is_positive, user_id, comment), **kw)


def log_rating_feedback(
    trace_id: str,
    rating: float,
    user_id: str,
    rationale: str | None = None,
    *,
    scale: tuple[float, float] = (1, 5),
    **kw: Any,
) -> Assessment:
    """点数を記録する(評価名 ``user_rating``)。``scale`` は両端を含む範囲。付け直すと置き換える。"""
    return send_feedback(kinds.rating_request(trace_id, rating, user_id, rationale, scale), **kw)


def log_text_feedback(
    trace_id: str, comment: str, user_id: str, category: str | None = None, **kw: Any
) -> Assessment:
    """自由記述を記録する(評価名 ``user_comment``、10,000 文字まで)。分類はメタデータに入る。"""
    return send_feedback(kinds.text_request(trace_id, comment, user_id, category), **kw)


def log_issue_report(
    trace_id: str,
    issue_type: str,
    description: str,
    user_id: str,
    severity: str = "medium",
    **kw: Any,
) -> Assessment:
    """問題の報告を記録する(評価名 ``user_issue``、値は種類、説明は ``rationale``)。"""
    request = kinds.issue_request(trace_id, issue_type, description, user_id, severity)
    return send_feedback(request, **kw)


def log_user_correction(
    trace_id: str, expected_response: str, user_id: str, correction_type: str = "factual", **kw: Any
) -> Assessment:
    """正しい答えを、``Correctness`` が読む期待値 ``expected_response`` として記録する。"""
    request = kinds.correction_request(trace_id, expected_response, user_id, correction_type)
    return send_feedback(request, **kw)


def withdraw_feedback(
    trace_id: str, user_id: str, kind: str = FeedbackType.THUMBS, **kw: Any
) -> bool:
    """この人の、この種類の評価をすべて取り下げる(保存先から消える)。何もなければ偽。"""
    return send_feedback(kinds.withdraw_request(trace_id, user_id, kind), **kw) is not None


class FeedbackCollector:
    """1 人のユーザーのフィードバックを送る。トレースを選ばずに呼ぶと例外になる。"""

    def __init__(self, user_id: str, trace_id: str | None = None) -> None:
        self.user_id = user_id
        self._trace_id = trace_id

    @property
    def trace_id(self) -> str:
        """いま対象にしているトレース。"""
        if self._trace_id is None:
            raise FeedbackValidationError("no trace selected: call set_trace(trace_id) first")
        return self._trace_id

    def set_trace(self, trace_id: str) -> FeedbackCollector:
        """対象のトレースを選ぶ。続けて ``collector.set_trace(id).thumbs_up()`` と書ける。"""
        self._trace_id = trace_id
        return self

    def thumbs_up(self, comment: str | None = None) -> Assessment:
        return log_thumbs_feedback(self.trace_id, True, self.user_id, comment)

    def thumbs_down(self, comment: str | None = None) -> Assessment:
        return log_thumbs_feedback(self.trace_id, False, self.user_id, comment)

    def rate(self, rating: float, rationale: str | None = None) -> Assessment:
        return log_rating_feedback(self.trace_id, rating, self.user_id, rationale)

    def comment(self, text: str, category: str | None = None) -> Assessment:
        return log_text_feedback(self.trace_id, text, self.user_id, category)

    def report_issue(
        self, issue_type: str, description: str, severity: str = "medium"
    ) -> Assessment:
        return log_issue_report(self.trace_id, issue_type, description, self.user_id, severity)

    def correct(self, expected_response: str, correction_type: str = "factual") -> Assessment:
        return log_user_correction(self.trace_id, expected_response, self.user_id, correction_type)

    def withdraw(self, kind: str = FeedbackType.THUMBS) -> bool:
        return withdraw_feedback(self.trace_id, self.user_id, kind)


def main() -> None:
    """1 人のユーザーが評価し、考え直し、取り下げる。"""
    from chapter8_samples import _lab

    with _lab.sample("ch8-feedback"):
        with mlflow.start_span("answer") as span:
            span.set_outputs("返品には 3 営業日かかります。")
        user = FeedbackCollector("user-123", span.trace_id)
        try:
            mlflow.log_feedback(trace_id=span.trace_id, name="user_thumbs", value=False)
        except mlflow.MlflowException as error:
            print(f"mlflow.log_feedback をそのまま呼ぶ: {error.error_code}")
        print("操作のたびに、有効な評価を読み直す")
        user.thumbs_down("送料のことが書かれていない")
        print("低評価(応答の直後):", _valid(user))
        user.thumbs_up()
        print("高評価に変更:", _valid(user))
        user.rate(4)
        print("点数も付ける:", _valid(user))
        user.withdraw(FeedbackType.RATING)
        print("点数を取り下げる:", _valid(user))
        try:
            user.rate(99)
        except FeedbackValidationError as error:
            print(f"99 点を付ける: {type(error).__name__}(範囲の外): {error}")


def _valid(user: FeedbackCollector) -> dict[str, object]:
    trace: Any = mlflow.get_trace(user.trace_id)
    found = (a for a in trace.info.assessments if a.valid is not False)
    return dict(sorted((a.name, a.feedback.value) for a in found))


if __name__ == "__main__":
    main()
