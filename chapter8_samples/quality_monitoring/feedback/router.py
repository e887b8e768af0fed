"""8.3.3 画面からのフィードバックを受け取る HTTP の受け口(FastAPI)。

画面はアプリの ``POST /feedback`` に送り、``DELETE /feedback`` で取り下げる。使う側の例::

    from fastapi import FastAPI, Request
    from mlflow.entities import Trace

    from chapter8_samples.quality_monitoring import create_feedback_router

    def user_of(request: Request) -> str:
        return request.headers.get("x-user", "")  # 前段の認証が付けたもの。なければ 422

    def authorize(request: Request, trace: Trace) -> bool:  # 自分が受け取った応答にだけ
        return trace.info.trace_metadata.get("mlflow.trace.user") == user_of(request)

    app = FastAPI()
    app.include_router(create_feedback_router(user_of, authorize=authorize))

回数の制限はここに置かない(ワーカーごとに別々に数えてしまう)。前段のリバースプロキシーか API
ゲートウェイで、ユーザーごとに掛ける。Databricks でも同じコードで動く。
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, get_args

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from mlflow.entities import Assessment, Trace, TraceData, TraceInfo
from mlflow.exceptions import MlflowException
from pydantic import BaseModel, ValidationError

from .._internals import current_experiment_id
from . import kinds
from .arrivals import Arrivals
from .delivery import is_superseded, store_feedback
from .kinds import FeedbackDeliveryError, FeedbackRequest
from .outbox import FeedbackOutbox

logger = logging.getLogger(__name__)

_MAX_BODY_BYTES = 131_072  # 10,000 文字の、どんな文章も収まる
Kind = Literal["thumbs", "rating", "comment", "issue", "correction"]
KINDS = dict(zip(get_args(Kind), kinds.FeedbackType, strict=True))


class FeedbackBody(BaseModel):
    """画面が送る JSON。``type`` ごとに使う項目だけを入れる。"""

    trace_id: Any
    type: Kind = "thumbs"
    is_positive: Any = None
    rating: Any = None  # 数かどうかも rating_request() が調べる(真偽値を 1.0 にさせない)
    comment: str | None = None
    category: str | None = None
    issue_type: str | None = None
    description: str | None = None
    severity: str = "medium"
    expected_response: str | None = None
    feedback_id: str | None = None  # 同じなら、通信のやり直しで何度届いても 1 件になる

    def request(self, user: str) -> FeedbackRequest:
        """検査して、送る形にする。"""
        made = self._of_kind(user)
        return replace(made, feedback_id=self.feedback_id) if self.feedback_id else made

    def _of_kind(self, user: str) -> FeedbackRequest:
        trace, text = self.trace_id, self.comment
        if self.type == "thumbs":
            return kinds.thumbs_request(trace, self.is_positive, user, text)
        if self.type == "rating":
            return kinds.rating_request(trace, self.rating, user, text, (1, 5))
        if self.type == "comment":
            return kinds.text_request(trace, text, user, self.category)
        if self.type == "issue":
            told = self.description
            return kinds.issue_request(trace, self.issue_type, told, user, self.severity)
        return kinds.correction_request(trace, self.expected_response, user)


def create_feedback_router(
    user_of: Callable[[Request], str],
    *,
    authorize: Callable[[Request, Trace], bool] | None = None,
    outbox: FeedbackOutbox | None = None,
    timeout_seconds: float = 3.0,
    max_pending: int = 10_000,
) -> APIRouter:
    """フィードバックを受け取る ``APIRouter`` を作る。

    応答は、200(記録した)、202(送信箱に残した。後で ``outbox.replay()`` で送る)、403(許されない)、
    409(本人のもっと新しい評価がある)、413(本文が大きい)、422(入力が正しくない)、502(MLflow が
    内容を拒否した)、503(届かず、残せない)。202 と 503 でも記録されていることがあるので、画面は同じ
    ``feedback_id`` で送り直す。

    Args:
        user_of: リクエストから、評価した人の ID を求める関数。
        authorize: このトレース(スパンは入っていない)に書かせるなら ``True`` を返す関数。省くと、
            アプリのエクスペリメントだけに書かせる。渡すと、トレースを確かめられない評価は残さない。
        outbox: 届かないときの送信箱。``authorize`` を渡すと使わない(503 になる)。
        max_pending: 送信箱に残す上限(件)。
        timeout_seconds: トレースが保存されるまで待つ秒数。待つ間、スレッドは使わない。

    Raises:
        TypeError: ``user_of`` か ``authorize`` が ``async def`` の関数である。
    """
    for given in (user_of, authorize):
        if inspect.iscoroutinefunction(given):  # 待たずに真とみなすと、誰にでも書かせてしまう
            raise TypeError(f"{given} is async: pass a plain function (it runs in a thread)")
    desk = _Desk(user_of, authorize, outbox, timeout_seconds, max_pending)

    async def vote(request: Request, response: Response) -> dict[str, bool]:
        body = await _read(request)
        return {"stored": await desk.take(request, response, body.request)}

    async def withdraw(
        request: Request, response: Response, trace_id: str, type: Kind = "thumbs"
    ) -> dict[str, bool]:
        make = partial(kinds.withdraw_request, trace_id, kind=KINDS[type])
        return {"withdrawn": await desk.take(request, response, make)}

    router = APIRouter()
    router.post("/feedback")(vote)
    router.delete("/feedback")(withdraw)
    return router


async def _read(request: Request) -> FeedbackBody:
    if "json" not in request.headers.get("content-type", ""):  # よそのページのフォームは拒否する
        raise HTTPException(422, "the content type must be application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise HTTPException(413, f"the body is over {_MAX_BODY_BYTES} bytes")
    try:
        return FeedbackBody.model_validate_json(body)
    except ValidationError as error:  # 届いた値は返さない
        shown = error.errors(include_url=False, include_context=False, include_input=False)
        raise HTTPException(422, shown) from error


@dataclass
class _Desk:
    user_of: Callable[[Request], str]
    authorize: Callable[[Request, Trace], bool] | None
    outbox: FeedbackOutbox | None
    timeout_seconds: float
    max_pending: int
    # アプリのスレッドは使わず、1 件ずつ試みる(並べて走らせると、ほかの応答が GIL を待つ)
    arrivals: Arrivals = field(default_factory=Arrivals)
    threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "feedback"))

    async def take(
        self, http: Request, response: Response, make: Callable[[str], FeedbackRequest]
    ) -> bool:
        try:
            request = await run_in_threadpool(self.prepare, http, make)
            stored = await self.deliver(http, request)
        except FeedbackDeliveryError as error:
            await run_in_threadpool(self.keep, error)
            response.status_code = 202
            return False
        except kinds.FeedbackValidationError as error:
            raise HTTPException(422, str(error)) from error
        except kinds.FeedbackNotAllowedError as error:
            advice = "authorize= refused it" if self.authorize else "call mlflow.set_experiment()"
            logger.warning("%s: %s", error, advice)
            raise HTTPException(403, "feedback on this trace is not allowed") from error
        except kinds.FeedbackError as error:
            raise HTTPException(502, "the tracking server rejected the feedback") from error
        except (MlflowException, OSError) as error:
            raise _unavailable() from error
        if is_superseded(request, stored):
            raise HTTPException(409, "a newer vote of this user is stored")
        return stored is not None

    def prepare(self, http: Request, make: Callable[[str], FeedbackRequest]) -> FeedbackRequest:
        request = make(self.user_of(http))
        if self.authorize is None:
            mine = current_experiment_id()
            if mine is None:  # MLflow につながる前は、書かせてよいトレースが決まらない
                logger.warning("feedback is refused: mlflow.set_experiment() has not succeeded yet")
                raise _unavailable()
            request = replace(request, experiment_id=mine)
        if self.outbox is not None and request.withdraws:
            self.outbox.drop(request)
        return request

    async def deliver(self, http: Request, request: FeedbackRequest) -> Assessment | None:
        """トレースが保存されるのを待って送る。届かなければ、期限まで繰り返す。"""

        def allowed(info: TraceInfo) -> bool:
            trace = Trace(info, TraceData([]))
            return self.authorize is None or self.authorize(http, trace) is True

        def attempt() -> Assessment | None:
            return store_feedback(request, timeout_seconds=left, authorize=allowed)

        loop = asyncio.get_running_loop()
        deadline, delay = time.monotonic() + self.timeout_seconds, 0.1
        with self.arrivals.of(request.trace_id) as arrival:
            try:
                await asyncio.wait_for(asyncio.wrap_future(arrival), self.timeout_seconds)
            except asyncio.TimeoutError as late:
                raise kinds.TraceNotFoundError("the trace is not stored", request) from late
        while True:
            left = deadline - time.monotonic()
            try:
                job = loop.run_in_executor(self.threads, copy_context().run, attempt)
                return await asyncio.wait_for(job, left)
            except asyncio.TimeoutError as late:  # サーバーが止まり、スレッドが空かない
                raise FeedbackDeliveryError("no thread was free", request) from late
            except FeedbackDeliveryError:
                if time.monotonic() + delay >= deadline:
                    raise
            await asyncio.sleep(delay)
            delay = min(2 * delay, 0.5)

    def keep(self, error: FeedbackDeliveryError) -> None:
        """送信箱に残す。残す場所がないか、残してよいか分からなければ 503。"""
        try:
            if self.outbox is None or self.authorize or len(self.outbox) >= self.max_pending:
                raise _unavailable() from error
            self.outbox.keep(error.request)
        except OSError as broken:
            logger.error("feedback is refused: %s; %s", error, broken)
            raise _unavailable() from broken


def _unavailable() -> HTTPException:
    return HTTPException(503, "feedback could not be stored now", {"Retry-After": "30"})
