"""8.3.3 フィードバックを、ちょうど 1 回だけ確実に届ける。

トレースは既定で最大 5 秒ごとにまとめて保存されるので、応答の直後に ``mlflow.log_feedback()`` を
呼ぶと「トレースがない」という例外になり、評価は失われる。ここでは届くまで待ち、二重に記録しない。

Databricks でも同じコードで動く。届かなかったものを保存して後で送り直すのは ``feedback/outbox.py``。
"""

from __future__ import annotations

import contextvars
import hashlib
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import mlflow
from mlflow.entities import (
    Assessment,
    AssessmentSource,
    AssessmentSourceType,
    Expectation,
    Feedback,
)
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
from mlflow.tracing.client import TracingClient
from mlflow.tracing.provider import get_bridged_tracer_provider
from mlflow.tracing.trace_manager import InMemoryTraceManager

from .request import (
    CORRECTION,
    REPLACED_BY_NEWER,
    FeedbackDeliveryError,
    FeedbackError,
    FeedbackRequest,
    TraceNotFoundError,
)

T = TypeVar("T")

FEEDBACK_ID = "feedback_id"
GIVEN_AT = "feedback_given_at_ms"
_RETRYABLE = {
    "RESOURCE_DOES_NOT_EXIST",
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
}
_votes: WeakValueDictionary[tuple[str, str, str], threading.Lock] = WeakValueDictionary()
_votes_lock = threading.Lock()


def send_feedback(request: FeedbackRequest, *, timeout_seconds: float = 15.0) -> Assessment:
    """フィードバックを 1 件、ちょうど 1 回だけ記録する。

    トレースがまだ保存されていなければ、保存を促してから ``timeout_seconds`` まで待つ
    (MLflow の既定の保存間隔は 5 秒なので、15 秒で足りる)。期限は通信の途中でも守る。

    Raises:
        TraceNotFoundError: 期限までにトレースが現れなかった。
        FeedbackDeliveryError: サーバーに届かなかった。どちらも ``request`` を持つ。
        FeedbackError: サーバーが内容を拒否した(送り直しても成功しない)。
    """
    if mlflow.get_active_trace_id() == request.trace_id:
        added = _add_to_running(request)
        if added is not None:
            return added
    deadline = time.monotonic() + timeout_seconds
    turn = _turn_of(request)
    if not turn.acquire(timeout=min(max(timeout_seconds, 0.0), threading.TIMEOUT_MAX)):
        busy = TimeoutError("the previous vote of this user is still being sent")
        raise _undelivered(request, busy, timeout_seconds)
    try:
        return _send_until(deadline, request, timeout_seconds)
    finally:
        turn.release()


def _add_to_running(request: FeedbackRequest) -> Assessment | None:
    """実行中のトレースに付ける(一緒に保存される)。上流のサービスのトレースなら ``None``。"""
    with InMemoryTraceManager.get_instance().get_trace(request.trace_id) as trace:
        if trace is None or trace.is_remote_trace:
            return None
        given = trace.info.assessments
        settled, previous = _look_up(request, given)
        if settled is not None:
            return settled
        given[:] = [a for a in given if a is not previous]  # まだ保存していないので、入れ替える
    return _log_new(request)


def _turn_of(request: FeedbackRequest) -> threading.Lock:
    """同じ人の同じ評価を 1 件ずつ送る順番(続けて押すと、互いに相手が見えず 2 件とも有効になる)。"""
    with _votes_lock:
        key = (request.trace_id, request.name, request.user_id)
        return _votes.setdefault(key, threading.Lock())


def _send_until(deadline: float, request: FeedbackRequest, waited: float) -> Assessment:
    error: Exception | None = None
    for attempt in range(sys.maxsize):
        try:
            # 1 回の待ちを区切る。保存はされたのに応答だけ失われたことに、次の回で気づける
            return _within(min(deadline, time.monotonic() + 5), lambda: _store_once(request))
        except FutureTimeoutError as late:
            error = error or late
        except MlflowException as refused:
            error = refused
            if refused.error_code not in _RETRYABLE:
                raise FeedbackError(f"MLflow rejected the feedback: {refused.message}") from refused
            _hurry_export()
        delay = min(0.02 * 2 ** min(attempt, 6), 1.0)
        if time.monotonic() + delay >= deadline:
            break
        time.sleep(delay)
    raise _undelivered(request, error, waited) from error


def _hurry_export() -> None:
    """自分のプロセスのトレースなら、保存の順番(最大 5 秒)を待たずに書き出しを始める。

    ``mlflow.flush_trace_async_logging()`` は、何もなくても終わるまで約 2 秒かかるので使わない。
    """
    flush = get_bridged_tracer_provider().force_flush
    threading.Thread(target=flush, daemon=True, name="hurry-export").start()


def _within(deadline: float, call: Callable[[], T]) -> T:
    """``call`` を期限まで待つ。MLflow の HTTP 再試行は既定で 4 分かかることがある。"""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # 呼び出し元のスレッドで投げ直す
            future.set_exception(error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work,), daemon=True, name="feedback").start()
    return future.result(timeout=max(deadline - time.monotonic(), 0.0))


def _undelivered(
    request: FeedbackRequest, error: Exception | None, waited: float
) -> FeedbackDeliveryError:
    if isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST":
        return TraceNotFoundError(
            f"trace {request.trace_id!r} was not stored within {waited:g} s: check the id, the "
            "tracking URI and that the app exports its traces",
            request,
        )
    return FeedbackDeliveryError(
        f"the tracking server did not accept the feedback within {waited:g} s: {error!r}; "
        "keep error.request and send it again later",
        request,
    )


def _store_once(request: FeedbackRequest) -> Assessment:
    """送信済みなら記録を返し、同じ人の前の評価があれば置き換え、なければ新しく記録する。

    後から届いた古い評価は記録せず、本人の新しい評価を返す。
    """
    with InMemoryTraceManager.get_instance().get_trace(request.trace_id) as trace:
        settled, unsaved = _look_up(request, trace.info.assessments if trace else [])
    if settled is not None:
        return settled
    if unsaved is not None:  # トレースと一緒に保存される評価。置き換えられるまで待つ
        raise MlflowException("the earlier vote is not stored yet", RESOURCE_DOES_NOT_EXIST)
    settled, previous = _look_up(request, _in_store(request.trace_id))
    if settled is not None:
        return settled
    return _log_new(request) if previous is None else _replace(previous, request)


def _in_store(trace_id: str) -> list[Assessment]:
    """保存先にある評価。

    ``TracingClient.get_trace_info()`` は、書き出している途中のトレースについては手元の写しを返す。
    そこには、保存先にもう届いた評価が入っていないので、保存先に直接尋ねる。
    """
    store: Any = TracingClient().store
    return store.get_trace_info(trace_id).assessments


def _look_up(
    request: FeedbackRequest, given: list[Assessment]
) -> tuple[Assessment | None, Assessment | None]:
    """もう記録しなくてよいならその評価、置き換えるなら前の評価を返す。"""
    for assessment in given:
        if (assessment.metadata or {}).get(FEEDBACK_ID) == request.feedback_id:
            return assessment, None
    previous = _previous(request, given) if request.name in REPLACED_BY_NEWER else None
    if previous and int((previous.metadata or {}).get(GIVEN_AT, 0)) > request.given_at_ms:
        return previous, None  # 送信箱に残っていた古い評価。本人がもう変えている
    return None, previous


def _previous(request: FeedbackRequest, stored: list[Assessment]) -> Assessment | None:
    mine = [
        assessment
        for assessment in stored
        if assessment.name == request.name
        and assessment.valid is not False
        and assessment.source.source_id == request.user_id
    ]
    return max(mine, key=lambda a: a.create_time_ms or 0, default=None)


def _log_new(request: FeedbackRequest) -> Assessment:
    return mlflow.log_assessment(request.trace_id, _assessment(request))


def _replace(previous: Assessment, request: FeedbackRequest) -> Assessment:
    assert previous.assessment_id is not None
    new = _assessment(request)
    if isinstance(new, Expectation):
        return mlflow.update_assessment(request.trace_id, previous.assessment_id, new)
    new.overrides = previous.assessment_id  # 前の評価は無効として残る
    return mlflow.log_assessment(request.trace_id, new)


def _assessment(request: FeedbackRequest) -> Feedback | Expectation:
    # source を省くと、MLflow は「コードによる評価」として記録する
    source = AssessmentSource(AssessmentSourceType.HUMAN, request.user_id)
    metadata = {
        **request.metadata,
        FEEDBACK_ID: request.feedback_id,
        GIVEN_AT: str(request.given_at_ms),
    }
    if request.name == CORRECTION:
        made = Expectation(CORRECTION, request.value, source=source, metadata=metadata)
    else:
        made = Feedback(
            request.name,
            request.value,
            source=source,
            rationale=request.rationale,
            metadata=metadata,
        )
    if not mlflow.get_tracking_uri().startswith("databricks"):
        # 応答だけが失われると、HTTP の自動再試行が同じ内容をまた送る。ID を決めておけば 1 件になる
        made.assessment_id = f"a-{hashlib.sha256(request.feedback_id.encode()).hexdigest()[:32]}"
    return made
