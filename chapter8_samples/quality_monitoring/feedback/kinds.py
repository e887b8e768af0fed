"""8.3.3 フィードバックの種類と、送る前の検査。

MLflow は、点数の範囲も、長すぎる名前も、保存できない文字も拒否しない。送ってから失敗したり、黙って
捨てられたりするものを、ここで拒否する。本書の関数(リスト8.10)と HTTP の受け口が、同じ検査を使う。
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from reprlib import repr as shortened


class FeedbackType(str, Enum):
    """フィードバックの種類。値は MLflow に記録される評価の名前。"""

    THUMBS = "user_thumbs"
    RATING = "user_rating"
    TEXT = "user_comment"
    ISSUE = "user_issue"
    CORRECTION = "expected_response"  # Correctness スコアラーが正解として読む名前


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


THUMBS, RATING, COMMENT, ISSUE, CORRECTION = (kind.value for kind in FeedbackType)
REPLACED_BY_NEWER = {THUMBS, RATING, CORRECTION}
MAX_TEXT_CHARS = 10_000
MAX_ID_CHARS = 250  # MLflow の列 source_id は VARCHAR(250)
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")  # NUL と、対になっていないサロゲート
# トレース ID は URL の一部になる。画面から来た ID で、別の API を呼ばせない
_LEAVES_THE_URL = re.compile(r"[\s?#%\\]|(?:^|/)\.{0,2}(?:/|$)")


class FeedbackError(Exception):
    """フィードバックを記録できなかった。"""


class FeedbackValidationError(FeedbackError, ValueError):
    """入力が正しくない(送り直しても成功しない)。"""


class FeedbackNotAllowedError(FeedbackError):
    """このトレースに記録することは許されていない。"""


class FeedbackDeliveryError(FeedbackError):
    """期限までに届かなかった。``request`` を保存しておけば、後で送り直せる。"""

    def __init__(self, message: str, request: FeedbackRequest) -> None:
        super().__init__(message)
        self.request = request


class TraceNotFoundError(FeedbackDeliveryError):
    """トレースがまだ保存されていない。"""


@dataclass(frozen=True)
class FeedbackRequest:
    """送信 1 回分。``asdict()`` で JSON にして保存し、後で同じ内容を送り直せる。"""

    trace_id: str
    name: str
    value: bool | int | float | str
    user_id: str
    rationale: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    feedback_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """同じトレース・人・名前・内容なら、同じ ID で何度送っても 1 件しか記録されない。"""
    given_at_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    """評価した時刻(UNIX ミリ秒)。遅れて届いた古い評価が、新しい評価を消さないために使う。"""
    experiment_id: str | None = None
    """このエクスペリメントのトレースにだけ記録する。``None`` なら確かめない。"""
    withdraws: bool = False
    """真なら、この人のこの名前の評価を取り下げる(``value`` は使わない)。"""

    def __post_init__(self) -> None:
        for name in ("trace_id", "name", "user_id", "feedback_id"):
            check_text(name, getattr(self, name), MAX_ID_CHARS)
        if self.trace_id == "MLFLOW_NO_OP_SPAN_TRACE_ID":
            raise FeedbackValidationError("this request was not sampled, so it has no trace")
        if _LEAVES_THE_URL.search(self.trace_id):
            told = shortened(self.trace_id)
            raise FeedbackValidationError(f"trace_id must be an id as MLflow made it, got {told}")
        for key, told in self.metadata.items():
            check_text("metadata", key, MAX_ID_CHARS)
            check_text(f"metadata {key!r}", told, MAX_TEXT_CHARS)
        if not isinstance(self.given_at_ms, int):  # pyright: ignore
            raise FeedbackValidationError(f"given_at_ms must be an int, got {self.given_at_ms!r}")
        if self.rationale is not None:
            check_text("rationale", self.rationale, MAX_TEXT_CHARS)
        if isinstance(self.value, str):
            check_text("value", self.value, MAX_TEXT_CHARS)
        elif not isinstance(self.value, int | float) or not math.isfinite(self.value):  # pyright: ignore
            told = shortened(self.value)
            raise FeedbackValidationError(f"value must be a str, bool or finite number, got {told}")


def check_text(name: str, text: object, limit: int) -> str:
    """空でなく、``limit`` 文字以内で、保存できる文字だけの文字列であることを確かめる。"""
    if not isinstance(text, str) or not text.strip():
        raise FeedbackValidationError(f"{name} must be a non-blank string, got {shortened(text)}")
    if len(text) > limit:
        raise FeedbackValidationError(f"{name} is {len(text)} characters, the limit is {limit}")
    if found := _UNSTORABLE.search(text):
        raise FeedbackValidationError(f"{name} has a character that cannot be stored: {found[0]!a}")
    return text


def thumbs_request(
    trace_id: str, is_positive: object, user_id: str, comment: str | None
) -> FeedbackRequest:
    """良い / 悪い。"""
    if not isinstance(is_positive, bool):
        raise FeedbackValidationError(f"is_positive must be a bool, got {shortened(is_positive)}")
    return FeedbackRequest(trace_id, THUMBS, is_positive, user_id, comment or None)


def rating_request(
    trace_id: str, rating: object, user_id: str, rationale: str | None, scale: tuple[float, float]
) -> FeedbackRequest:
    """``scale``(両端を含む)の点数。"""
    (low, high), told = scale, shortened(rating)
    if isinstance(rating, bool) or not isinstance(rating, int | float):
        raise FeedbackValidationError(f"rating must be a number, got {told}")
    if not low <= rating <= high:  # NaN もここで拒否する
        raise FeedbackValidationError(f"rating must be between {low} and {high}, got {told}")
    metadata = {"scale_min": str(low), "scale_max": str(high)}
    return FeedbackRequest(trace_id, RATING, rating, user_id, rationale or None, metadata)


def text_request(
    trace_id: str, comment: object, user_id: str, category: str | None
) -> FeedbackRequest:
    """自由記述。分類はメタデータに入る。"""
    value = check_text("comment", comment, MAX_TEXT_CHARS)
    metadata = {"category": check_text("category", category, MAX_ID_CHARS)} if category else {}
    return FeedbackRequest(trace_id, COMMENT, value, user_id, metadata=metadata)


def issue_request(
    trace_id: str, issue_type: object, description: object, user_id: str, severity: object
) -> FeedbackRequest:
    """問題の報告。値は種類、説明は ``rationale``。"""
    value = _member(IssueType, "issue_type", issue_type)
    metadata = {"severity": _member(Severity, "severity", severity)}
    told = check_text("description", description, MAX_TEXT_CHARS)
    return FeedbackRequest(trace_id, ISSUE, value, user_id, told, metadata)


def correction_request(
    trace_id: str, expected_response: object, user_id: str, correction_type: str = "factual"
) -> FeedbackRequest:
    """正しい答え。"""
    value = check_text("expected_response", expected_response, MAX_TEXT_CHARS)
    metadata = {"correction_type": check_text("correction_type", correction_type, MAX_ID_CHARS)}
    return FeedbackRequest(trace_id, CORRECTION, value, user_id, metadata=metadata)


def withdraw_request(trace_id: str, user_id: str, kind: object) -> FeedbackRequest:
    """この人の、この種類の評価の取り下げ。"""
    name = _member(FeedbackType, "kind", kind)
    return FeedbackRequest(trace_id, name, False, user_id, withdraws=True)


def _member(kind: type[Enum], name: str, value: object) -> str:
    if value not in [one.value for one in kind]:
        choices = ", ".join(str(one.value) for one in kind)
        raise FeedbackValidationError(f"{name} must be one of {choices}, got {shortened(value)}")
    return str(kind(value).value)


def pseudonymize(user_id: str, key: bytes) -> str:
    """ユーザー ID を、鍵がなければ元に戻せない 32 文字の仮名にする(同じ人は同じ仮名)。"""
    return hmac.new(key, user_id.encode(), hashlib.sha256).hexdigest()[:32]
