"""8.3.3 フィードバックを、ちょうど 1 回だけ確実に届ける。"""

import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from mlflow.entities import Assessment
logger = logging.getLogger(__name__)
T = TypeVar('T')
THUMBS = 'user_thumbs'
RATING = 'user_rating'
COMMENT = 'user_comment'
ISSUE = 'user_issue'
CORRECTION = 'expected_response'
REPLACED_BY_NEWER = frozenset({THUMBS, RATING, CORRECTION})
MAX_TEXT_CHARS = 10000
MAX_ID_CHARS = 250
UNSAMPLED_TRACE_ID = 'MLFLOW_NO_OP_SPAN_TRACE_ID'
FEEDBACK_ID = 'feedback_id'
GIVEN_AT = 'feedback_given_at_ms'

class FeedbackError(Exception):
    """フィードバックを記録できなかった。"""

class FeedbackValidationError(FeedbackError, ValueError):
    """入力が正しくない(送り直しても成功しない)。"""

class FeedbackDeliveryError(FeedbackError):
    """期限までに届かなかった。``request`` を保存しておけば、後で送り直せる。"""

    def __init__(self, message: str, request: FeedbackRequest) -> None:
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
    '同じ ID のフィードバックは、何度送っても 1 件しか記録されない。'
    given_at_ms: int = field(default_factory=lambda: time.time_ns() // 1000000)
    '評価した時刻(UNIX ミリ秒)。遅れて届いた古い評価が、新しい評価を消さないために使う。'

    def __post_init__(self) -> None:
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON にできる辞書。"""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FeedbackRequest:
        """``to_dict()`` の逆。"""

def check_trace_id(trace_id: object) -> None:
    ...

def check_text(name: str, text: object, limit: int) -> str:
    ...

def send_feedback(request: FeedbackRequest, *, timeout_seconds: float=15.0) -> Assessment:
    """フィードバックを 1 件、ちょうど 1 回だけ記録する。

    トレースがまだ保存されていなければ、保存を促してから ``timeout_seconds`` まで待つ
    (MLflow の既定の保存間隔は 5 秒なので、15 秒で足りる)。期限は通信の途中でも守る。

    Raises:
        TraceNotFoundError: 期限までにトレースが現れなかった。
        FeedbackDeliveryError: サーバーに届かなかった。どちらも ``request`` を持つ。
        FeedbackError: サーバーが内容を拒否した(送り直しても成功しない)。
    """

def main() -> None:
    """サンプルを実行する。"""
