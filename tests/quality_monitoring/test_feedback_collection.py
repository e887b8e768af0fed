"""本書の関数は、検証した入力だけを、決まった名前で記録する。"""

from __future__ import annotations

import math
from typing import Any

import mlflow
import pytest
from mlflow.tracing.client import TracingClient

from chapter8_samples.quality_monitoring import (
    FeedbackCollector,
    FeedbackType,
    FeedbackValidationError,
    IssueType,
    Severity,
    log_issue_report,
    log_rating_feedback,
    log_text_feedback,
    log_thumbs_feedback,
    log_user_correction,
    pseudonymize,
    withdraw_feedback,
)


def stored(trace_id: str) -> dict[str, Any]:
    return {a.name: a for a in TracingClient().get_trace_info(trace_id).assessments if a.valid}


def test_every_kind_lands_under_its_fixed_name(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    log_thumbs_feedback(trace_id, True, "u", "役に立った")
    log_rating_feedback(trace_id, 4, "u", "だいたい正しい")
    log_text_feedback(trace_id, "送料も知りたい", "u", category="content")
    log_issue_report(trace_id, IssueType.INCOMPLETE, "送料がない", "u", Severity.HIGH)
    log_user_correction(trace_id, "送料は無料です。", "u")
    found = stored(trace_id)
    assert set(found) == {kind.value for kind in FeedbackType}
    assert found["user_thumbs"].feedback.value is True
    assert found["user_thumbs"].rationale == "役に立った"
    assert found["user_rating"].feedback.value == 4
    assert found["user_comment"].metadata["category"] == "content"
    assert found["user_issue"].feedback.value == "incomplete"
    assert found["user_issue"].metadata["severity"] == "high"
    assert found["expected_response"].expectation.value == "送料は無料です。"
    assert {a.source.source_type for a in found.values()} == {"HUMAN"}


def test_no_comment_means_no_rationale(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    log_thumbs_feedback(trace_id, False, "u")
    assert stored(trace_id)["user_thumbs"].rationale is None


def test_a_new_correction_replaces_the_old_one(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    log_user_correction(trace_id, "一つ目", "u")
    log_user_correction(trace_id, "二つ目", "u")
    found = TracingClient().get_trace_info(trace_id).assessments
    assert [a.expectation.value for a in found if a.expectation] == ["二つ目"]


def test_comments_and_issues_pile_up(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    for text in ("一つ目", "二つ目"):
        log_text_feedback(trace_id, text, "u")
        log_issue_report(trace_id, "slow", text, "u")
    names = [a.name for a in TracingClient().get_trace_info(trace_id).assessments]
    assert sorted(names) == ["user_comment"] * 2 + ["user_issue"] * 2


def test_a_feedback_id_from_the_browser_makes_double_clicks_harmless(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    for _ in range(3):
        log_text_feedback(trace_id, "二度押し", "u", feedback_id=f"click-{trace_id}")
    assert len(TracingClient().get_trace_info(trace_id).assessments) == 1


def test_the_scale_can_be_chosen(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    log_rating_feedback(trace_id, 9.5, "u", scale=(0, 10))
    assert stored(trace_id)["user_rating"].metadata["scale_max"] == "10"


def test_values_of_the_wrong_kind_are_refused() -> None:
    ratings: list[Any] = [True, math.nan, math.inf, 0, 6, 10**400, "5", None]
    for rating in ratings:
        with pytest.raises(FeedbackValidationError, match="rating"):
            log_rating_feedback("tr-1", rating, "u")
    votes: list[Any] = [1, "yes", None]
    for vote in votes:
        with pytest.raises(FeedbackValidationError, match="is_positive"):
            log_thumbs_feedback("tr-1", vote, "u")
    for text in ("", "   ", "x" * 10_001):
        with pytest.raises(FeedbackValidationError, match="comment"):
            log_text_feedback("tr-1", text, "u")


def test_unknown_issue_types_name_the_choices() -> None:
    with pytest.raises(FeedbackValidationError, match="hallucination"):
        log_issue_report("tr-1", "typo", "x", "u")
    with pytest.raises(FeedbackValidationError, match="critical"):
        log_issue_report("tr-1", "slow", "x", "u", severity="urgent")


def test_the_collector_never_guesses_the_trace(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    collector = FeedbackCollector("u")
    with pytest.raises(FeedbackValidationError, match="set_trace"):
        collector.thumbs_up()
    collector.set_trace(trace_id).thumbs_up("よい")
    assert stored(trace_id)["user_thumbs"].feedback.value is True


def test_pseudonyms_are_stable_and_keyed() -> None:
    assert pseudonymize("hanako", b"k") == pseudonymize("hanako", b"k")
    assert pseudonymize("hanako", b"k") != pseudonymize("hanako", b"other")
    assert "hanako" not in pseudonymize("hanako", b"k")


def test_a_vote_taken_back_is_gone_and_others_stay(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    user = FeedbackCollector("u", trace_id)
    for vote in (True, False):  # 考え直した評価は、前の評価を無効にしている
        log_thumbs_feedback(trace_id, vote, "u")
    log_thumbs_feedback(trace_id, True, "other")
    user.correct("正解")
    assert user.withdraw() and not user.withdraw()
    assert withdraw_feedback(trace_id, "u", FeedbackType.CORRECTION)
    left = TracingClient().get_trace_info(trace_id).assessments
    assert [(a.name, a.source.source_id) for a in left] == [("user_thumbs", "other")]
    with pytest.raises(FeedbackValidationError, match="kind must be one of"):
        withdraw_feedback(trace_id, "u", "stars")


def test_a_vote_on_a_running_trace_can_be_taken_back(store: str) -> None:
    with mlflow.start_span("answer") as span:
        log_thumbs_feedback(span.trace_id, True, "u")
        assert withdraw_feedback(span.trace_id, "u")
    assert TracingClient().get_trace_info(span.trace_id).assessments == []
