"""8.3.3 フィードバックの種類: それぞれの検査と、記録する名前と値。

本書の関数(リスト8.10)と HTTP の受け口が、同じ検査を使う。
"""

from __future__ import annotations

from enum import Enum

from .request import (
    COMMENT,
    CORRECTION,
    ISSUE,
    MAX_ID_CHARS,
    MAX_TEXT_CHARS,
    RATING,
    THUMBS,
    FeedbackRequest,
    FeedbackValidationError,
    check_text,
)


class FeedbackType(str, Enum):
    """フィードバックの種類。値は MLflow に記録される評価の名前。"""

    THUMBS = THUMBS
    RATING = RATING
    TEXT = COMMENT
    ISSUE = ISSUE
    CORRECTION = CORRECTION


class IssueType(str, Enum):
    """ユーザーが報告する問題の種類。"""

    INCORRECT = "incorrect"
    HALLUCINATION = "hallucination"
    INCOMPLETE = "incomplete"
    IRRELEVANT = "irrelevant"
    HARMFUL = "harmful"
    SLOW = "slow"
    OTHER = "other"


class Severity(str, Enum):
    """問題の重さ。"""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"
    CRITICAL = "critical"


def thumbs_request(
    trace_id: str, is_positive: bool, user_id: str, comment: str | None = None
) -> FeedbackRequest:
    """良い / 悪い。

    >>> request = thumbs_request("tr-1", True, "user-123", "役に立った")
    >>> request.name, request.value, request.rationale
    ('user_thumbs', True, '役に立った')
    """
    if not isinstance(is_positive, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise FeedbackValidationError(f"is_positive must be a bool, got {is_positive!r}")
    return FeedbackRequest(
        trace_id=trace_id,
        name=THUMBS,
        value=is_positive,
        user_id=user_id,
        rationale=comment or None,
    )


def rating_request(
    trace_id: str,
    rating: float,
    user_id: str,
    rationale: str | None = None,
    scale: tuple[float, float] = (1, 5),
) -> FeedbackRequest:
    """``scale``(両端を含む)の点数。

    >>> rating_request("tr-1", 4, "user-123").metadata
    {'scale_min': '1', 'scale_max': '5'}
    """
    low, high = scale
    number = isinstance(rating, int | float)  # pyright: ignore[reportUnnecessaryIsInstance]
    if isinstance(rating, bool) or not number:
        raise FeedbackValidationError(f"rating must be a number, got {rating!r}")
    if not low <= rating <= high:  # NaN もここで断る
        raise FeedbackValidationError(f"rating must be between {low} and {high}, got {rating}")
    return FeedbackRequest(
        trace_id=trace_id,
        name=RATING,
        value=rating,
        user_id=user_id,
        rationale=rationale or None,
        metadata={"scale_min": str(low), "scale_max": str(high)},
    )


def text_request(
    trace_id: str, comment: str, user_id: str, category: str | None = None
) -> FeedbackRequest:
    """自由記述。分類はメタデータに入る。"""
    value = check_text("comment", comment, MAX_TEXT_CHARS)
    metadata = {"category": check_text("category", category, MAX_ID_CHARS)} if category else {}
    return FeedbackRequest(
        trace_id=trace_id, name=COMMENT, value=value, user_id=user_id, metadata=metadata
    )


def issue_request(
    trace_id: str,
    issue_type: IssueType | str,
    description: str,
    user_id: str,
    severity: Severity | str = "medium",
) -> FeedbackRequest:
    """問題の報告。値は種類、説明は ``rationale``。

    >>> request = issue_request("tr-1", "incomplete", "送料がない", "user-123")
    >>> request.name, request.value, request.metadata
    ('user_issue', 'incomplete', {'severity': 'medium'})
    """
    value = _check_member(IssueType, "issue_type", issue_type)
    metadata = {"severity": _check_member(Severity, "severity", severity)}
    return FeedbackRequest(
        trace_id=trace_id,
        name=ISSUE,
        value=value,
        user_id=user_id,
        rationale=check_text("description", description, MAX_TEXT_CHARS),
        metadata=metadata,
    )


def correction_request(
    trace_id: str, expected_response: str, user_id: str, correction_type: str = "factual"
) -> FeedbackRequest:
    """正しい答え。"""
    value = check_text("expected_response", expected_response, MAX_TEXT_CHARS)
    kind = check_text("correction_type", correction_type, MAX_ID_CHARS)
    return FeedbackRequest(
        trace_id=trace_id,
        name=CORRECTION,
        value=value,
        user_id=user_id,
        metadata={"correction_type": kind},
    )


def _check_member(kind: type[Enum], name: str, value: object) -> str:
    try:
        return str(kind(value).value)
    except ValueError:
        choices = ", ".join(str(member.value) for member in kind)
        raise FeedbackValidationError(f"{name} must be one of {choices}, got {value!r}") from None
