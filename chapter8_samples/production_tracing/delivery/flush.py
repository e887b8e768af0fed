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

logger = logging.getLogger(__name__)

_EXPORT_LOGGERS = ("mlflow.tracing.export", "opentelemetry.exporter.otlp")
_NO_LIMIT_MS = 24 * 3600 * 1000


@dataclass(frozen=True)
class FlushResult:
    """``flush_traces`` の結果。"""

    ok: bool
    """時間内に終わり、送信の失敗も記録されなかった。"""
    seconds: float
    error: str | None = None


class _FailureCounter(logging.Handler):
    """MLflow は送信の失敗を例外にせず警告として記録するので、それを数える。

    アプリが MLflow の警告を出さない設定(``MLFLOW_LOGGING_LEVEL=ERROR`` など)でも数える。
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self._muted: list[tuple[logging.Logger, int, bool]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().splitlines()[0][:200])

    def __enter__(self) -> _FailureCounter:
        for target in map(logging.getLogger, _EXPORT_LOGGERS):
            target.addHandler(self)
            if not target.isEnabledFor(logging.WARNING):  # 数えるだけで、表示はしない
                self._muted.append((target, target.level, target.propagate))
                target.setLevel(logging.WARNING)
                target.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        for target in map(logging.getLogger, _EXPORT_LOGGERS):
            target.removeHandler(self)
        for target, level, propagate in self._muted:
            target.setLevel(level)
            target.propagate = propagate


def flush_everything() -> str | None:
    """MLflow の 2 つのキューと OTLP のキューを空にする。失敗があればその説明を返す。

    ``flush_trace_async_logging()`` は OTLP を含まない。``terminate=True`` は使わない(その後の
    トレースがすべて消える)。まだ何も記録していなければ、接続もしない。
    """
    with _FailureCounter() as failures:
        mlflow.flush_trace_async_logging()
        provider: Any = current_provider()
        if force_flush := getattr(provider, "force_flush", None):
            force_flush(_NO_LIMIT_MS)  # 期限は呼び出す側が決める
    if not failures.messages:
        return None
    return f"{len(failures.messages)} export failures, first: {failures.messages[0]}"


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

    def wait(self, timeout_seconds: float) -> FlushResult:
        """送信を頼み、最大 ``timeout_seconds`` 秒待つ。"""
        started = time.monotonic()
        answer: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._requests.put(answer)
        try:
            error = answer.get(timeout=timeout_seconds)
        except queue.Empty:
            error = f"not finished within {timeout_seconds:g}s; traces may be lost"
        return FlushResult(error is None, time.monotonic() - started, error)

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


def flush_traces(timeout_seconds: float = 10.0) -> FlushResult:
    """送信待ちのトレースを送り終えるまで、最大 ``timeout_seconds`` 秒待つ。

    ``mlflow.flush_trace_async_logging()`` は期限がなく(サーバーが止まると数分から 30 分)、失敗を
    知らせず、OTLP を含まない。これはその 3 つを補い、送った後もトレーシングは動き続ける。

    Raises:
        ValueError: ``timeout_seconds`` が 0 以下、または無限大。
    """
    if not 0 < timeout_seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout_seconds={timeout_seconds!r} must be > 0 and finite")
    result = _default_worker().wait(timeout_seconds)
    if not result.ok:
        logger.warning("trace flush: %s", result.error)
    return result
