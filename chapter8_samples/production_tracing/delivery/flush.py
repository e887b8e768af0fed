"""8.1.4 送信待ちのトレースを、期限つきで送り終える(graceful_shutdown.py の土台)。

``mlflow.flush_trace_async_logging()`` には期限がなく、サーバーが止まると数分から 30 分
戻らない。送信の失敗は警告のログになるだけで、OTLP の送信待ちは含まれない。この 3 つを補う。

Databricks でも同じ。ノートブックのセルの最後や、ジョブの終わりで呼ぶ。
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlflow

from .._internals import current_provider
from .counts import LEDGER, start_counting, stop_counting

logger = logging.getLogger(__name__)

_NO_LIMIT_MS = 24 * 3600 * 1000


@dataclass(frozen=True)
class FlushResult:
    """``flush_traces`` の結果。"""

    ok: bool
    """時間内に終わり、1 件も失わず、送信の失敗もなかった。"""
    seconds: float
    error: str | None = None
    undelivered: int = 0
    """前回の結果の後に失った件数と、時間内に送れずに待っている件数の合計。"""


def flush_everything() -> str | None:
    """MLflow の 2 つのキューと OTLP のキューを空にする。失敗があればその説明を返す。

    ``terminate=True`` は使わない(その後のトレースがすべて消える)。まだ何も記録していなければ、
    接続もしない。
    """
    start_counting(follow=False)
    try:
        mlflow.flush_trace_async_logging()
        provider: Any = current_provider()
        if force_flush := getattr(provider, "force_flush", None):
            force_flush(_NO_LIMIT_MS)  # 期限は呼び出す側が決める
        LEDGER.settle()
        return LEDGER.take_failures()
    finally:
        stop_counting()


class FlushWorker:
    """送信を待つ専用スレッド。

    先に起動しておくのは、Python 3.12 以降では終了処理の中で新しいスレッドを作れないため。
    ``SimpleQueue.put`` は再入可能なので、シグナルハンドラーからも頼める。
    """

    def __init__(self, flush: Callable[[], str | None]) -> None:
        self.pid = os.getpid()
        self._flush = flush
        self._requests: queue.SimpleQueue[queue.SimpleQueue[str | None] | None]
        self._requests = queue.SimpleQueue()
        threading.Thread(target=self._run, name="trace-flush", daemon=True).start()

    def start(self) -> None:
        """結果を待たずに送信を始める。"""
        self._requests.put(None)

    def wait(self, timeout_seconds: float, *, for_good: bool = False) -> FlushResult:
        """送信を頼み、最大 ``timeout_seconds`` 秒待つ。

        間に合わなければ、新しく送るのを期限の少し前に止めて、送り始めた分の返事だけを待つ。届いた件数と
        届かない件数が、これで決まる。``for_good`` は、その後も送らない(プロセスの終わり)。
        """
        started = time.monotonic()
        grace = LEDGER.grace_seconds(timeout_seconds)
        try:
            error = self._ask(started, started + timeout_seconds - grace)
            undelivered = LEDGER.report(finished=True)
        except queue.Empty:
            LEDGER.stop_sending(grace, for_good=for_good)
            undelivered = LEDGER.report(finished=False)
            error = f"not finished within {timeout_seconds:g}s"
        if undelivered:
            error = f"{undelivered} traces not delivered ({error or 'lost before'})"
        return FlushResult(error is None, time.monotonic() - started, error, undelivered)

    def _ask(self, started: float, deadline: float) -> str | None:
        """送り終えたと言われても、届いていないものが残っていれば、もう一度頼む。"""
        first_error: str | None = None
        while True:
            answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
            self._requests.put(answer)
            error = answer.get(timeout=max(0.0, deadline - time.monotonic()))
            first_error = first_error or error
            if not LEDGER.waits_for(started):
                return first_error
            time.sleep(0.05)

    def _run(self) -> None:
        while True:
            answer = self._requests.get()
            try:
                error = self._flush()
            except Exception as failure:
                logger.exception("trace flush failed")
                error = f"{type(failure).__name__}: {failure}"
            if answer is not None:
                answer.put(error)


_worker_lock = threading.Lock()
_worker: FlushWorker | None = None


def _default_worker() -> FlushWorker:
    global _worker
    with _worker_lock:
        if _worker is None or _worker.pid != os.getpid():
            _worker = FlushWorker(flush_everything)
        return _worker


def require_seconds(timeout_seconds: float) -> None:
    """待てる長さでなければ ``ValueError``。"""
    if not 0 < timeout_seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout_seconds={timeout_seconds!r} must be > 0 and finite")


def flush_traces(timeout_seconds: float = 10.0) -> FlushResult:
    """送信待ちのトレースを送り終えるまで、最大 ``timeout_seconds`` 秒待つ。

    送った後もトレーシングは動き続ける。``setup_production_tracing`` も ``setup_graceful_shutdown``
    も呼んでいないプロセスでは、呼んでいる間の失敗だけが分かる。

    Raises:
        ValueError: ``timeout_seconds`` が 0 以下、または無限大。
    """
    require_seconds(timeout_seconds)
    result = _default_worker().wait(timeout_seconds)
    if not result.ok:
        logger.warning("trace flush: %s", result.error)
    return result
