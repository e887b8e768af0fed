"""8.1.4 終了のときにトレースを送り終える仕組み(graceful_shutdown.py の土台)。

終了処理、シグナル、fork した子のそれぞれで、送信待ちを期限のうちに送る。登録はプロセスに 1 つ。
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import multiprocessing.util
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterable
from typing import Any

from .._internals import before_threads_are_joined
from .counts import LEDGER, start_counting
from .flush import deliver, flush_traces, require_seconds, start_flush
from .spool import TraceSpool

logger = logging.getLogger(__name__)

_SPARE_SECONDS = 0.5  # 期限で強制終了する前に、結果をログに残す余裕
_ON_WINDOWS = os.name == "nt"


class GracefulShutdownHandler:
    """終了のしかたを変えずに、終了の前にトレースを送り終える(``setup_graceful_shutdown`` が作る)。

    シグナルハンドラーは処理に割り込むので、その中では送らない。``SystemExit`` で実行中のスパンを
    閉じ、終了処理で送り、最後に元のシグナルで終わり直す。
    """

    def __init__(
        self, timeout_seconds: float, signals: tuple[int, ...], spool: TraceSpool | None
    ) -> None:
        require_seconds(timeout_seconds)
        self.timeout_seconds = timeout_seconds
        self.signals = signals
        self.spool = spool
        self._previous: dict[int, Any] = {}
        self._signals_of = 0  # シグナルを登録したプロセス
        self._stop_counting = start_counting()
        self._start_over()
        before_threads_are_joined(self._deliver_before_the_end)
        atexit.register(self._at_exit)
        # multiprocessing の子では、Pool を止めるシグナルを元に戻す
        multiprocessing.util.register_after_fork(self, GracefulShutdownHandler._restore_signals)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self._before_fork, after_in_child=self._in_forked_child)

    def unregister(self) -> None:
        """登録を取り消し、前のシグナルハンドラーに戻す。"""
        global _installed
        if _installed is self:
            _installed = None
            self._stop_counting()
            atexit.unregister(self._at_exit)
            self._restore_signals()

    def _start_over(self) -> None:
        """スレッドを起動しておく(終わりかけてからではできない)。fork した子では、もう一度。"""
        self._received: int | None = None
        self._exit_by: float | None = None
        self._deadline: queue.SimpleQueue[int] = queue.SimpleQueue()
        start_flush()
        threading.Thread(target=self._watch, name="trace-flush-deadline", daemon=True).start()
        if "celery" in sys.modules:  # prefork の子は、atexit を通らず os._exit で終わる
            from celery import signals  # pyright: ignore

            signals.worker_process_shutdown.connect(self._deliver_before_the_end, weak=False)

    def _before_fork(self) -> None:
        if _installed is self:  # キューに残りがあるまま fork すると、子の送信は永久に終わらない
            flush_traces(self.timeout_seconds)

    def _in_forked_child(self) -> None:
        if _installed is self:
            self._start_over()

    def _deliver_before_the_end(self, **_: object) -> None:
        if _installed is not self or LEDGER.closed:
            return
        if self._exit_by is None:
            self._exit_by = time.monotonic() + self.timeout_seconds
            if number := self._signal_to_repeat():
                self._deadline.put(number)
                if self._uvicorn(signal.SIGTERM):  # 親が重ねて送ってくる。上の期限があれば十分
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
        seconds = max(0.1, self._exit_by - _SPARE_SECONDS - time.monotonic())
        result = deliver(seconds, for_good=True)
        kept = self.spool.drain(max(0.0, seconds - result.seconds)) if self.spool else 0
        if kept:
            reason = result.error or "undelivered"
            logger.warning("at shutdown %d traces are kept on disk for replay (%s)", kept, reason)
        elif not result.ok:
            logger.warning("trace flush at shutdown: %s", result.error)

    def _watch(self) -> None:
        """シグナルから期限まで待ち、まだ終わらなければ強制終了する。次のシグナルなら、すぐに。"""
        number = self._deadline.get()
        with contextlib.suppress(queue.Empty):
            self._deadline.get(timeout=max(0.0, self.timeout_seconds - _SPARE_SECONDS / 2))
        left = deliver(_SPARE_SECONDS / 4, for_good=True).undelivered
        seconds = self.timeout_seconds
        logger.error("shutdown took over %gs; %d more traces not delivered", seconds, left)
        os._exit(128 + number)

    def install_signals(self) -> None:
        if self._signals_of == os.getpid():
            return
        self._signals_of = os.getpid()
        for number in self.signals:
            previous = signal.getsignal(number)
            if previous == self._on_signal:  # fork した子で、そのまま残っている
                continue
            self._previous[number] = previous
            if previous is not signal.SIG_IGN:  # nohup などの指定はそのまま
                signal.signal(number, self._on_signal)
        if uvicorn := self._uvicorn(signal.SIGTERM):
            if _ON_WINDOWS:  # ワーカーは、ほかのシグナルで止められる
                logger.warning("uvicorn may end too early: use FastAPI(lifespan=tracing_lifespan)")
            if uvicorn.should_exit:  # 起動中に届いていた
                self._leave(signal.SIGTERM)

    def _restore_signals(self) -> None:
        self._signals_of = os.getpid()  # multiprocessing の子では、呼ばれても登録しない
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._on_signal and previous is not None:
                signal.signal(number, previous)

    def _on_signal(self, number: int, frame: Any) -> None:
        previous = self._previous.get(number)
        if self._exit_by is not None or not callable(previous):
            self._leave(number)
        elif uvicorn := self._uvicorn(number):
            self._received = number
            uvicorn.should_exit = True
        else:  # アプリやサーバーのハンドラーが決める
            previous(number, frame)

    def _uvicorn(self, number: int) -> Any:
        """シグナルを受けていた ``uvicorn.Server``(なければ ``None``)。

        その ``handle_exit`` を呼ぶと、止まり終えてから同じシグナルを自分に送り直し、即死する
        (Ctrl+C では、ふつうに終わる)。
        """
        previous = self._previous.get(number)
        is_uvicorns = str(getattr(previous, "__module__", "")).startswith("uvicorn.")
        if number == signal.SIGINT or not is_uvicorns:
            return None
        return getattr(previous, "__self__", None)

    def _leave(self, number: int) -> None:
        self._deadline.put(number)
        if self._exit_by is None:  # 終了処理の送信は中断しない
            self._received = number
            self._exit_by = time.monotonic() + self.timeout_seconds
            start_flush()
            raise SystemExit(128 + number)

    def _at_exit(self) -> None:
        self._deliver_before_the_end()
        if number := self._signal_to_repeat():
            logging.shutdown()
            with contextlib.suppress(AttributeError, OSError, ValueError):  # 閉じた標準出力
                sys.stdout.flush()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # 待つ側には「シグナルで終わった」と見える

    def _signal_to_repeat(self) -> int | None:
        if threading.current_thread() is not threading.main_thread():
            return None
        if getattr(sys, "last_type", None) is KeyboardInterrupt:
            return signal.SIGINT  # MLflow の終了処理で 1 に変わる終了コードを 130 に戻す
        return self._received


_installed: GracefulShutdownHandler | None = None


def install_handler(
    timeout_seconds: float, signals: Iterable[int], spool: TraceSpool | None
) -> GracefulShutdownHandler:
    """プロセスに 1 つだけ登録する。2 回目は、登録済みのものを返す(違う設定なら ``ValueError``)。

    メインスレッドのほかで呼んだときは、次にメインスレッドで呼ぶまで、シグナルは登録されない。
    """
    global _installed
    settings = (timeout_seconds, tuple(signals), spool)
    if _installed is None:
        _installed = GracefulShutdownHandler(*settings)
    elif settings != (_installed.timeout_seconds, _installed.signals, _installed.spool):
        raise ValueError("graceful shutdown is already set up differently; unregister() it first")
    if threading.current_thread() is threading.main_thread():
        _installed.install_signals()
    else:
        logger.warning("signals still lose traces: call setup_graceful_shutdown in the main thread")
    return _installed
