"""8.1.4 送信待ちのトレースを、期限つきで送り終える(graceful_shutdown.py の土台)。

``mlflow.flush_trace_async_logging()`` には期限がなく、サーバーが止まると数分から 30 分戻らない。
失敗はログになるだけで、OTLP の送信待ちは含まれない。この 3 つを補う。Databricks でも同じ。
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from dataclasses import dataclass

import mlflow

from .._internals import current_provider
from .counts import LEDGER

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlushResult:
    """``flush_traces`` の結果。"""

    ok: bool
    """時間内に終わり、1 件も失わず、送信の失敗もなかった。"""
    seconds: float
    error: str | None = None
    undelivered: int = 0
    """前回の結果の後に失った件数と、時間内に送れずに待っている件数の合計。"""


def flush_traces(timeout_seconds: float = 10.0) -> FlushResult:
    """送信待ちのトレースを送り終えるまで、最大 ``timeout_seconds`` 秒待つ(トレーシングは続く)。

    ``setup_production_tracing`` も ``setup_graceful_shutdown`` も呼んでいないプロセスでは、呼んだ
    後の失敗だけが分かる。0 以下や無限大の ``timeout_seconds`` は ``ValueError``。
    """
    require_seconds(timeout_seconds)
    result = deliver(timeout_seconds)
    if not result.ok:
        logger.warning("trace flush: %s", result.error)
    return result


def require_seconds(timeout_seconds: float) -> None:
    if not 0 < timeout_seconds <= threading.TIMEOUT_MAX:
        raise ValueError(f"timeout_seconds={timeout_seconds!r} must be > 0 and finite")


def deliver(timeout_seconds: float, *, for_good: bool = False) -> FlushResult:
    """送り終えるまで待つ。間に合わなければ、新しく送るのを止め(``for_good`` なら最後まで)、
    送り始めた分の返事だけを待つ。届いた件数と届かない件数が、これで決まる(返事がそれより遅い
    サーバーでは、届いていても届かない方に数える)。
    """
    started = time.monotonic()
    grace = LEDGER.grace_seconds(timeout_seconds)
    finished = _finishes(started, started + timeout_seconds - grace)
    if not finished:
        LEDGER.stop_sending(grace, for_good=for_good)
    undelivered, error = LEDGER.report(finished=finished)
    if not finished:
        error = f"not finished within {timeout_seconds:g}s"
    if undelivered:
        error = f"{undelivered} traces not delivered ({error})"
    return FlushResult(error is None, time.monotonic() - started, error, undelivered)


def _finishes(started: float, deadline: float) -> bool:
    while start_flush().wait(max(0.0, deadline - time.monotonic())):
        if not LEDGER.waiting(started):
            return True
        time.sleep(0.05)
    return False


_owner = 0  # _requests を読むスレッドがいるプロセス
_requests: queue.SimpleQueue[threading.Event]


def start_flush() -> threading.Event:
    """専用のスレッドに頼む(終わると立つ)。終了処理の中では、新しく起動できない。

    シグナルハンドラーからも呼べるように、ロックは使わない(同時なら、余分なスレッドが残るだけ)。
    """
    global _owner, _requests
    if _owner != os.getpid():  # 最初か、fork した子。起動できなければ、次にもう一度
        requests: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()
        threading.Thread(
            target=_flush_forever, args=(requests,), name="trace-flush", daemon=True
        ).start()
        _requests, _owner = requests, os.getpid()
    done = threading.Event()
    _requests.put(done)
    return done


def _flush_forever(requests: queue.SimpleQueue[threading.Event]) -> None:
    while True:
        done = requests.get()
        try:
            LEDGER.attach()
            mlflow.flush_trace_async_logging()  # terminate=True では、その後のトレースが消える
            if force_flush := getattr(current_provider(), "force_flush", None):
                force_flush(24 * 3600 * 1000)  # 期限は、待つ側が決める
            LEDGER.settle()
        except Exception as error:
            logger.exception("trace flush failed")
            LEDGER.lost((), f"{type(error).__name__}: {error}")
        done.set()
