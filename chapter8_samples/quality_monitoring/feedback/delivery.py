"""8.3.3 フィードバックを、ちょうど 1 回だけ確実に届ける。

トレースは既定で最大 5 秒ごとにまとめて保存されるので、応答の直後に ``mlflow.log_feedback()`` を
呼ぶと「トレースがない」という例外になり、評価は失われる。ここでは届くまで待ち、二重に記録しない。

Databricks でも同じコードで動く。届かなかったものを保存して後で送り直すのは ``feedback_outbox.py``。
"""

from __future__ import annotations

import contextvars
import hashlib
import logging
import math
import re
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import asdict, dataclass, field
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

logger = logging.getLogger(__name__)
T = TypeVar("T")

THUMBS = "user_thumbs"
RATING = "user_rating"
COMMENT = "user_comment"
ISSUE = "user_issue"
CORRECTION = "expected_response"  # Correctness スコアラーが正解として読む名前
REPLACED_BY_NEWER = frozenset({THUMBS, RATING, CORRECTION})

MAX_TEXT_CHARS = 10_000
MAX_ID_CHARS = 250  # MLflow の列 source_id は VARCHAR(250)
UNSAMPLED_TRACE_ID = "MLFLOW_NO_OP_SPAN_TRACE_ID"
FEEDBACK_ID = "feedback_id"
GIVEN_AT = "feedback_given_at_ms"
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")  # NUL と、対になっていないサロゲート
# トレース ID は URL の一部になる。画面から来た ID で、別の API を呼ばせない
_LEAVES_THE_URL = re.compile(r"[\s?#%\\]|(?:^|/)\.{0,2}(?:/|$)")
_votes: WeakValueDictionary[tuple[str, str, str], threading.Lock] = WeakValueDictionary()
_votes_lock = threading.Lock()

_RETRYABLE = {
    "RESOURCE_DOES_NOT_EXIST",
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "REQUEST_LIMIT_EXCEEDED",
}


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
