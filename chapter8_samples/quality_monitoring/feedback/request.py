"""8.3.3 フィードバック 1 件の内容と、送る前の検査。

MLflow は、点数の範囲も、長すぎる名前も、保存できない文字も断らない。送ってから失敗したり、黙って
捨てられたりするものを、ここで断る。
"""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

THUMBS = "user_thumbs"
RATING = "user_rating"
COMMENT = "user_comment"
ISSUE = "user_issue"
CORRECTION = "expected_response"  # Correctness スコアラーが正解として読む名前
REPLACED_BY_NEWER = frozenset({THUMBS, RATING, CORRECTION})

MAX_TEXT_CHARS = 10_000
MAX_ID_CHARS = 250  # MLflow の列 source_id は VARCHAR(250)
UNSAMPLED_TRACE_ID = "MLFLOW_NO_OP_SPAN_TRACE_ID"
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")  # NUL と、対になっていないサロゲート
# トレース ID は URL の一部になる。画面から来た ID で、別の API を呼ばせない
_LEAVES_THE_URL = re.compile(r"[\s?#%\\]|(?:^|/)\.{0,2}(?:/|$)")


class FeedbackError(Exception):
    """フィードバックを記録できなかった。"""


class FeedbackValidationError(FeedbackError, ValueError):
    """入力が正しくない(送り直しても成功しない)。"""


class FeedbackDeliveryError(FeedbackError):
    """期限までに届かなかった。``request`` を保存しておけば、後で送り直せる。"""

    def __init__(self, message: str, request: FeedbackRequest) -> None:
        super().__init__(message)
        self.request = request


class TraceNotFoundError(FeedbackDeliveryError):
    """期限まで待ってもトレースが保存されなかった。"""


@dataclass(frozen=True, kw_only=True)
class FeedbackRequest:
    """送信 1 回分。JSON にして保存し、後で同じ内容を送り直せる。"""

    trace_id: str
    name: str
    value: bool | int | float | str
    user_id: str
    rationale: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    feedback_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """同じ ID のフィードバックは、何度送っても 1 件しか記録されない。"""
    given_at_ms: int = field(default_factory=lambda: time.time_ns() // 1_000_000)
    """評価した時刻(UNIX ミリ秒)。遅れて届いた古い評価が、新しい評価を消さないために使う。"""

    def __post_init__(self) -> None:
        check_trace_id(self.trace_id)
        check_text("name", self.name, MAX_ID_CHARS)
        check_text("user_id", self.user_id, MAX_ID_CHARS)
        check_text("feedback_id", self.feedback_id, MAX_ID_CHARS)
        if self.rationale is not None:
            check_text("rationale", self.rationale, MAX_TEXT_CHARS)
        if not isinstance(self.value, bool | int | float | str):  # pyright: ignore
            raise FeedbackValidationError(
                f"value must be a bool, number or str, got {self.value!r}"
            )
        if isinstance(self.value, float) and not math.isfinite(self.value):
            raise FeedbackValidationError(f"value must be finite, got {self.value}")
        if isinstance(self.value, str):
            check_text("value", self.value, MAX_TEXT_CHARS)

    def to_dict(self) -> dict[str, Any]:
        """JSON にできる辞書。"""
        return {**asdict(self), "metadata": dict(self.metadata)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FeedbackRequest:
        """``to_dict()`` の逆。"""
        return cls(**data)


def check_trace_id(trace_id: object) -> None:
    """MLflow が付けたトレース ID の形であることを確かめる。"""
    if not isinstance(trace_id, str) or not trace_id.strip():
        raise FeedbackValidationError(f"trace_id must be a non-empty string, got {trace_id!r}")
    if trace_id == UNSAMPLED_TRACE_ID:
        raise FeedbackValidationError(
            "this request was not sampled, so it has no trace to attach feedback to"
        )
    check_text("trace_id", trace_id, MAX_ID_CHARS)
    if _LEAVES_THE_URL.search(trace_id):
        raise FeedbackValidationError(
            f"trace_id must be an id as MLflow made it (tr-...), got {trace_id!r}"
        )


def check_text(name: str, text: object, limit: int) -> str:
    """空でなく、``limit`` 文字以内で、保存できる文字だけの文字列であることを確かめる。"""
    if not isinstance(text, str) or not text.strip():
        raise FeedbackValidationError(f"{name} must be a non-blank string, got {text!r}")
    if len(text) > limit:
        raise FeedbackValidationError(f"{name} is {len(text)} characters, the limit is {limit}")
    _check_storable(name, text)
    return text


def _check_storable(name: str, text: str) -> None:
    """データベースに保存できない文字を断る(残しておいても、何度送り直しても失敗する)。"""
    if found := _UNSTORABLE.search(text):
        raise FeedbackValidationError(f"{name} has a character that cannot be stored: {found[0]!a}")
