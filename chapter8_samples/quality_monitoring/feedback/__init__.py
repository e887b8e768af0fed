"""フィードバック: 検査、届け方、送信箱、HTTP の受け口、集計。"""

# corrections だけは mlflow 全体(mlflow-tracing にない機能)が要るので、ここでは読み込まない
from .delivery import send_feedback
from .kinds import (
    FeedbackType,
    IssueType,
    Severity,
    correction_request,
    issue_request,
    rating_request,
    text_request,
    thumbs_request,
)
from .outbox import FeedbackOutbox, ReplayReport
from .request import (
    MAX_ID_CHARS,
    FeedbackDeliveryError,
    FeedbackError,
    FeedbackRequest,
    FeedbackValidationError,
    TraceNotFoundError,
    check_text,
    check_trace_id,
)
from .router import create_feedback_router
from .summary import FeedbackSummary, Rate, summarize_feedback

__all__ = [
    "MAX_ID_CHARS",
    "FeedbackDeliveryError",
    "FeedbackError",
    "FeedbackOutbox",
    "FeedbackRequest",
    "FeedbackSummary",
    "FeedbackType",
    "FeedbackValidationError",
    "IssueType",
    "Rate",
    "ReplayReport",
    "Severity",
    "TraceNotFoundError",
    "check_text",
    "check_trace_id",
    "correction_request",
    "create_feedback_router",
    "issue_request",
    "rating_request",
    "send_feedback",
    "summarize_feedback",
    "text_request",
    "thumbs_request",
]
