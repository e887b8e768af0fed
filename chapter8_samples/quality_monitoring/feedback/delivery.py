"""8.3.3 フィードバックを 1 回だけ試みる: 二重に記録せず、置き換え、取り下げ、期限を守る。

トレースが保存されるまで待つのは呼ぶ側の仕事(本書の関数は眠り、受け口は await し、送信箱は後で)。
"""

from __future__ import annotations

import contextvars
import hashlib
import json
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict
from typing import Any, TypeVar

import mlflow
from mlflow.entities import Assessment, AssessmentSource, Expectation, Feedback, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient
from mlflow.tracing.constant import TRACE_SCHEMA_VERSION_KEY
from mlflow.tracing.provider import get_bridged_tracer_provider
from mlflow.tracing.trace_manager import InMemoryTraceManager

from .kinds import (
    CORRECTION,
    REPLACED_BY_NEWER,
    FeedbackDeliveryError,
    FeedbackError,
    FeedbackNotAllowedError,
    FeedbackRequest,
    TraceNotFoundError,
)

T = TypeVar("T")
Authorize = Callable[[TraceInfo], bool]
FEEDBACK_ID = "feedback_id"
GIVEN_AT = "feedback_given_at_ms"
_RETRYABLE = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}
# パスワードが変わった、MLflow の再起動中にプロキシーが 404 を返した(評価の内容と関係がない)
_NOT_THE_VOTE = {"UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "ENDPOINT_NOT_FOUND"}
# 同じ人の同じ評価は 1 件ずつ(続けて押すと、互いに相手が見えず 2 件とも有効になる)
_TURNS = [threading.Lock() for _ in range(256)]
_HURRY = threading.Lock()


def store_feedback(
    request: FeedbackRequest, *, timeout_seconds: float = 5.0, authorize: Authorize | None = None
) -> Assessment | None:
    """記録するか、取り下げる。期限は通信の途中でも守る(MLflow の再試行は 4 分かかることがある)。

    値は記録した(取り下げた)評価。本人のもっと新しい評価があれば、古い方は記録せず、それを返す
    (``is_superseded()``)。取り下げるものがなければ ``None``。

    Raises:
        FeedbackDeliveryError: 届かなかった。トレースがまだなければ ``TraceNotFoundError``。
        FeedbackNotAllowedError: ``authorize`` が拒否したか、別のエクスペリメントのトレース。
        FeedbackError: サーバーが内容を拒否した(送り直しても成功しない)。
    """
    turn = _TURNS[hash((request.trace_id, request.name, request.user_id)) % len(_TURNS)]
    if not turn.acquire(timeout=max(0.0, timeout_seconds)):
        raise FeedbackDeliveryError("the previous vote of this user is still being sent", request)
    try:
        return _within(timeout_seconds, lambda: _store(request, authorize))
    except FutureTimeoutError as late:
        message = f"the tracking server did not answer within {timeout_seconds:g} s"
        raise FeedbackDeliveryError(message, request) from late
    except MlflowException as refused:
        raise _explained(refused, request) from refused
    finally:
        turn.release()


def is_superseded(request: FeedbackRequest, stored: Assessment | None) -> bool:
    """``stored`` が、``request`` の代わりに残っている、本人のもっと新しい評価か。"""
    return int(_metadata(stored).get(GIVEN_AT, 0)) > request.given_at_ms


def stored_among(trace_ids: Iterable[str], *, timeout_seconds: float) -> set[str]:
    """保存されているトレース。何件でも 1 回で尋ねる。Databricks などでは ``MlflowException``。"""
    store: Any = TracingClient().store
    infos = _within(timeout_seconds, lambda: store.batch_get_trace_infos(list(trace_ids)))
    return {info.trace_id for info in infos}


def hurry_export() -> None:
    """自分のプロセスのトレースなら、保存の順番(最大 5 秒)を待たずに書き出しを始める。"""
    if _HURRY.acquire(blocking=False):  # 何人が待っていても、書き出しは 1 つ
        try:
            threading.Thread(target=_export, daemon=True, name="hurry-export").start()
        except RuntimeError:  # スレッドの上限。次の機会に書き出す
            _HURRY.release()


def _export() -> None:
    try:
        # mlflow.flush_trace_async_logging() は、何もなくても終わるまで約 2 秒かかる
        get_bridged_tracer_provider().force_flush()
    finally:
        _HURRY.release()


def _within(seconds: float, call: Callable[[], T]) -> T:
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # 呼び出し元のスレッドで投げ直す
            future.set_exception(error)

    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(work,), daemon=True, name="feedback").start()
    return future.result(timeout=seconds)


def _explained(error: MlflowException, request: FeedbackRequest) -> FeedbackError:
    if error.error_code == "RESOURCE_DOES_NOT_EXIST":
        advice = "check the id, the tracking URI and that the app exports its traces"
        return TraceNotFoundError(f"trace {request.trace_id!r} is not stored; {advice}", request)
    if error.error_code in _RETRYABLE | _NOT_THE_VOTE:
        return FeedbackDeliveryError(f"the server failed: {error.message}", request)
    return FeedbackError(f"MLflow rejected the feedback: {error.message}")


def _store(request: FeedbackRequest, authorize: Authorize | None) -> Assessment | None:
    active = mlflow.get_active_trace_id() == request.trace_id
    with InMemoryTraceManager.get_instance().get_trace(request.trace_id) as trace:
        unsaved = trace.info.assessments if trace else []
        settled, mine = _look_up(request, unsaved)
        if settled is None and trace and active and not trace.is_remote_trace:
            return _change_unsaved(request, unsaved, mine)  # 実行中のトレースと一緒に保存される
    if settled is not None:
        return settled
    if mine:
        raise TraceNotFoundError("the earlier vote is stored with its trace, not yet", request)
    # TracingClient.get_trace_info() は、書き出している途中のトレースについては、保存先にもう届いた
    # 評価のない手元のコピーを返す。そこで、保存先に直接尋ねる
    store: Any = TracingClient().store
    info: TraceInfo = store.get_trace_info(request.trace_id)
    elsewhere = request.experiment_id not in (None, info.experiment_id)
    refused = authorize is not None and not authorize(info)
    if refused and TRACE_SCHEMA_VERSION_KEY not in info.trace_metadata:
        # スパンだけが先に届いた。ユーザーなどのメタデータは、少し遅れて書かれる
        raise TraceNotFoundError(f"trace {request.trace_id!r} is stored only in part", request)
    if elsewhere or refused:
        place = f"trace {request.trace_id!r} of experiment {info.experiment_id}"
        raise FeedbackNotAllowedError(f"{place} takes no feedback here")
    settled, mine = _look_up(request, info.assessments)
    return settled or _change(request, mine)


def _look_up(
    request: FeedbackRequest, given: list[Assessment]
) -> tuple[Assessment | None, list[Assessment]]:
    """もう記録しなくてよいならその評価。そうでなければ、置き換える(取り下げる)本人の評価。"""
    who = (request.name, "HUMAN", request.user_id)
    mine = [a for a in given if (a.name, a.source.source_type, a.source.source_id) == who]
    mine.sort(key=lambda a: a.create_time_ms or 0)
    if request.withdraws:
        return None, [a for a in mine if not is_superseded(request, a)]
    same = [a for a in mine if _metadata(a).get(FEEDBACK_ID) == request.feedback_id]
    replaceable = mine if request.name in REPLACED_BY_NEWER else same
    current = [a for a in replaceable if a.valid is not False][-1:]
    if current and is_superseded(request, current[0]):
        return current[0], []
    # 通信のやり直しなら記録済み。同じ ID で評価を変え、また元に戻したときは、もう 1 度記録する
    changed = bool(current) and current[0] in same
    done = [a for a in same if _says(a, request) and (a.valid is not False or not changed)]
    return (done[-1], []) if done else (None, current)


def _says(assessment: Assessment, request: FeedbackRequest) -> bool:
    told = assessment.feedback or assessment.expectation
    content = (told and told.value, assessment.rationale or None)
    same = content == (request.value, request.rationale)
    return same and request.metadata.items() <= _metadata(assessment).items()


def _metadata(assessment: Assessment | None) -> dict[str, str]:
    return (assessment and assessment.metadata) or {}


def _change_unsaved(
    request: FeedbackRequest, unsaved: list[Assessment], mine: list[Assessment]
) -> Assessment | None:
    unsaved[:] = [a for a in unsaved if a not in mine]
    if request.withdraws:
        return mine[-1] if mine else None
    unsaved.append(_assessment(request, []))
    unsaved[-1].trace_id = request.trace_id
    return unsaved[-1]


def _change(request: FeedbackRequest, mine: list[Assessment]) -> Assessment | None:
    trace_id, ids = request.trace_id, [str(a.assessment_id) for a in mine]
    if request.withdraws:
        for old in reversed(ids):  # 新しい方を消すと、それが置き換えた評価が有効に戻る
            mlflow.delete_assessment(trace_id, old)
        return mine[-1] if mine else None
    made = _assessment(request, ids)
    if ids and isinstance(made, Expectation):
        return mlflow.update_assessment(trace_id, ids[0], made)
    return mlflow.log_assessment(trace_id, made)


def _assessment(request: FeedbackRequest, replaced: list[str]) -> Feedback | Expectation:
    source = AssessmentSource("HUMAN", request.user_id)  # 省くと「コードによる評価」になる
    given = {FEEDBACK_ID: request.feedback_id, GIVEN_AT: str(request.given_at_ms)}
    metadata = {**request.metadata, **given}
    made: Feedback | Expectation
    if request.name == CORRECTION:
        made = Expectation(CORRECTION, request.value, source=source, metadata=metadata)
    else:
        made = Feedback(request.name, request.value, source=source, metadata=metadata)
        made.rationale = request.rationale
        made.overrides = replaced[0] if replaced else None  # 前の評価は無効として残る
    if not mlflow.get_tracking_uri().startswith("databricks"):
        # 応答だけが失われると、HTTP の自動再試行が同じ内容をまた送る。ID を決めておけば 1 件になる
        content = json.dumps({**asdict(request), "given_at_ms": replaced}, sort_keys=True)
        made.assessment_id = f"a-{hashlib.sha256(content.encode()).hexdigest()[:32]}"
    return made
