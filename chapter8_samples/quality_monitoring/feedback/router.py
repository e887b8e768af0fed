"""8.3.3 画面からのフィードバックを受け取る HTTP エンドポイント(FastAPI)。

画面は MLflow に直接書かず、アプリの ``POST /feedback`` に送る。誰の評価かはアプリがログイン情報から
決め、検査はリスト8.10 の関数と同じものを使い、届かなければ送信箱に残して 202 を返す。

使う側は ``app.include_router(create_feedback_router(...))`` の 1 行で、要るのは ``fastapi`` だけ。
Databricks でも同じコードで動く(``MLFLOW_TRACKING_URI=databricks``)。
"""
# FastAPI が関数の中で定義した型を読めるように、from __future__ import annotations は使わない

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from mlflow.entities import Assessment

from .delivery import send_feedback
from .kinds import (
    correction_request,
    issue_request,
    rating_request,
    text_request,
    thumbs_request,
)
from .request import (
    FeedbackDeliveryError,
    FeedbackError,
    FeedbackRequest,
    FeedbackValidationError,
)

if TYPE_CHECKING:
    from fastapi import APIRouter, Request

    from .outbox import FeedbackOutbox

Deliver = Callable[[FeedbackRequest], Assessment]
RETRY_AFTER = {"Retry-After": "30"}  # 画面が送り直すまでの秒数


@dataclass(kw_only=True)
class FeedbackBody:
    """画面が送る JSON。``type`` ごとに使う項目だけを入れる。"""

    trace_id: Any
    type: Literal["thumbs", "rating", "comment", "issue", "correction"] = "thumbs"
    is_positive: Any = None
    rating: Any = None  # 数かどうかも rating_request() が調べる(真偽値を 1.0 にさせない)
    comment: str | None = None
    category: str | None = None
    issue_type: str | None = None
    description: str | None = None
    severity: str = "medium"
    expected_response: str | None = None
    feedback_id: str | None = None
    """画面が付ける ID。同じ ID なら、通信のやり直しで何度届いても 1 件になる。"""


def create_feedback_router(
    user_of: "Callable[[Request], str]",
    *,
    outbox: "FeedbackOutbox | None" = None,
    path: str = "/feedback",
    timeout_seconds: float = 3.0,
    max_pending: int = 10_000,
) -> "APIRouter":
    """フィードバックを受け取る ``APIRouter`` を作る。

    応答は、200(記録した)、202(送信箱に残した。``outbox.replay()`` で送り直す)、
    422(入力が正しくない)、502(MLflow が内容を拒否した)、503(届かず、残す場所もない)。

    Args:
        user_of: リクエストから、評価した人の ID を求める関数。本文の ID は信用しない。
        outbox: 届かないときの送信箱。省くと 503 を返し、送り直しは画面に任せる。
        timeout_seconds: MLflow に届くまで待つ秒数。
        max_pending: 送信箱に残す上限(件)。超えたら 503 を返す。
    """
    from fastapi import APIRouter, HTTPException, Request, Response

    deliver = _deliver_to(outbox, timeout_seconds, max_pending)

    def feedback(request: Request, response: Response, body: FeedbackBody) -> dict[str, bool]:
        try:
            deliver(_request(body, user_of(request)))
        except FeedbackValidationError as error:
            raise HTTPException(422, str(error)) from error
        except _KeptForLater:
            response.status_code = 202
            return {"stored": False}
        except FeedbackDeliveryError as error:
            raise HTTPException(503, "feedback could not be stored now", RETRY_AFTER) from error
        except FeedbackError as error:
            raise HTTPException(502, "the tracking server rejected the feedback") from error
        return {"stored": True}

    router = APIRouter()
    router.add_api_route(path, feedback, methods=["POST"])
    return router


class _KeptForLater(FeedbackDeliveryError):
    """送信箱に残した。"""


def _deliver_to(
    outbox: "FeedbackOutbox | None", timeout_seconds: float, max_pending: int
) -> Deliver:
    def deliver(request: FeedbackRequest) -> Assessment:
        if outbox is None:
            return send_feedback(request, timeout_seconds=timeout_seconds)
        if len(outbox) >= max_pending:
            raise FeedbackDeliveryError(f"the outbox already keeps {len(outbox)}", request)
        stored = outbox.submit(request, timeout_seconds=timeout_seconds)
        if stored is None:
            raise _KeptForLater("kept in the outbox", request)
        return stored

    return deliver


def _request(body: FeedbackBody, user: str) -> FeedbackRequest:
    request = _of_kind(body, user)
    return replace(request, feedback_id=body.feedback_id) if body.feedback_id else request


def _of_kind(body: FeedbackBody, user: str) -> FeedbackRequest:
    trace, text = body.trace_id, body.comment
    if body.type == "thumbs":
        return thumbs_request(trace, body.is_positive, user, text)
    if body.type == "rating":
        return rating_request(trace, body.rating, user, text)
    if body.type == "comment":
        return text_request(trace, text or "", user, body.category)
    if body.type == "issue":
        kind, description = body.issue_type or "", body.description or ""
        return issue_request(trace, kind, description, user, body.severity)
    return correction_request(trace, body.expected_response or "", user)
