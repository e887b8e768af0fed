"""8.3.3 画面からのフィードバックを受け取る HTTP エンドポイント(FastAPI)。

画面は MLflow に直接書かず、アプリの ``POST /feedback`` に送る。誰の評価かはアプリがログイン情報から
決め、検査は ``feedback_collection.py`` と同じものを使い、届かなければ送信箱に残して 202 を返す。

実行::

    $ python chapter8_samples/03_quality_monitoring/feedback_api.py
    応答の直後の評価: 200 {'stored': True}
    範囲外の点数: 422 rating must be between 1 and 5, got 99
    MLflow の停止中: 202 {'stored': False}(手元に 1 件)
    復旧後の再送: 1 件
    このトレースの記録: user_issue(user-123), user_thumbs(user-123)

使う側は ``app.include_router(create_feedback_router(...))`` の 1 行で、要るのは ``fastapi`` だけ。
Databricks でも同じコードで動く(``MLFLOW_TRACKING_URI=databricks``)。
"""
# FastAPI が関数の中で定義した型を読めるように、from __future__ import annotations は使わない

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlflow
from mlflow.entities import Assessment

if TYPE_CHECKING or __package__:
    from .feedback_delivery import (
        FeedbackDeliveryError,
        FeedbackError,
        FeedbackRequest,
        FeedbackValidationError,
        send_feedback,
    )
else:  # feedback_delivery.py と 2 枚だけ写したとき、またはパスで実行したとき
    from feedback_delivery import (
        FeedbackDeliveryError,
        FeedbackError,
        FeedbackRequest,
        FeedbackValidationError,
        send_feedback,
    )

if TYPE_CHECKING:
    from fastapi import APIRouter, Request

    from .feedback_outbox import FeedbackOutbox

Deliver = Callable[..., Assessment]
RETRY_AFTER = {"Retry-After": "30"}  # 画面が送り直すまでの秒数


@dataclass(kw_only=True)
class FeedbackBody:
    """画面が送る JSON。``type`` ごとに使う項目だけを入れる。"""

    trace_id: Any
    type: Literal["thumbs", "rating", "comment", "issue", "correction"] = "thumbs"
    is_positive: Any = None
    rating: Any = None  # 数かどうかも feedback_collection が調べる(真偽値を 1.0 にさせない)
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
            _log(body, user_of(request), deliver)
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
    def deliver(request: FeedbackRequest, **_: object) -> Assessment:
        if outbox is None:
            return send_feedback(request, timeout_seconds=timeout_seconds)
        if len(outbox) >= max_pending:
            raise FeedbackDeliveryError(f"the outbox already keeps {len(outbox)}", request)
        stored = outbox.submit(request, timeout_seconds=timeout_seconds)
        if stored is None:
            raise _KeptForLater("kept in the outbox", request)
        return stored

    return deliver


def _log(body: FeedbackBody, user: str, deliver: Deliver) -> Assessment:
    if TYPE_CHECKING or __package__:
        from .feedback_collection import (
            log_issue_report,
            log_rating_feedback,
            log_text_feedback,
            log_thumbs_feedback,
            log_user_correction,
        )
    else:
        from feedback_collection import (
            log_issue_report,
            log_rating_feedback,
            log_text_feedback,
            log_thumbs_feedback,
            log_user_correction,
        )
    send: dict[str, Any] = {"feedback_id": body.feedback_id, "deliver": deliver}
    trace, text = body.trace_id, body.comment
    if body.type == "thumbs":
        return log_thumbs_feedback(trace, body.is_positive, user, text, **send)
    if body.type == "rating":
        return log_rating_feedback(trace, body.rating, user, text, **send)
    if body.type == "comment":
        return log_text_feedback(trace, text or "", user, body.category, **send)
    if body.type == "issue":
        kind, description = body.issue_type or "", body.description or ""
        return log_issue_report(trace, kind, description, user, body.severity, **send)
    return log_user_correction(trace, body.expected_response or "", user, **send)


def main() -> None:
    """サンプルを実行する。"""
    import logging
    import socket

    import requests
    from mlflow.tracing.client import TracingClient

    from chapter8_samples import _lab
    from chapter8_samples.quality_monitoring.feedback_outbox import FeedbackOutbox

    logging.basicConfig(level=logging.ERROR)
    with _lab.sample("ch8-feedback-api") as lab, socket.socket() as nobody:
        box = lab.home / "outbox" / "api.jsonl"
        box.unlink(missing_ok=True)
        outbox: Any = FeedbackOutbox(box)
        router = create_feedback_router(lambda _: "user-123", outbox=outbox, timeout_seconds=2)
        with mlflow.start_span("answer") as span:
            trace_id = span.trace_id
        with _serving(router) as url:

            def post(**body: Any) -> requests.Response:
                return requests.post(url, json={"trace_id": trace_id, **body}, timeout=10)

            answer = post(is_positive=False)
            print("応答の直後の評価:", answer.status_code, answer.json())
            answer = post(type="rating", rating=99)
            print("範囲外の点数:", answer.status_code, answer.json()["detail"])

            nobody.bind(("127.0.0.1", 0))  # 待ち受けていないポート = 止まっているサーバー
            mlflow.set_tracking_uri(f"http://127.0.0.1:{nobody.getsockname()[1]}")
            answer = post(type="issue", issue_type="incomplete", description="送料がない")
            kept = f"(手元に {len(outbox)} 件)"
            print("MLflow の停止中:", answer.status_code, f"{answer.json()}{kept}")
            mlflow.set_tracking_uri(lab.tracking_uri)
            print(f"復旧後の再送: {outbox.replay().sent} 件")

        found = TracingClient().get_trace_info(trace_id).assessments
        names = sorted(f"{a.name}({a.source.source_id})" for a in found)
        print("このトレースの記録:", ", ".join(names))


@contextmanager
def _serving(router: "APIRouter") -> Iterator[str]:
    """空いているポートで待ち受け、フィードバックを送る URL を渡す。"""
    import threading
    import time

    import uvicorn
    from fastapi import FastAPI

    app = FastAPI()
    app.include_router(router)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/feedback"
    finally:
        server.should_exit = True
        thread.join()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # インストールなしでも動くように
    main()
