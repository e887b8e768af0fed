"""8.1.4 終了のときにトレースを送り終える仕組み(graceful_shutdown.py の土台)。

終了処理、シグナル、fork した子のそれぞれで、送信待ちを期限のうちに送る。プロセスに 1 つの登録も
ここにあるので、設定のファイルを直接実行しても 2 つに分かれない。
"""

# fork のフックは取り消せず、ハンドラーの内側をモジュールの関数から呼ぶ
# pyright: reportPrivateUsage=false
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
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, Protocol

from .._internals import before_threads_are_joined, reset_but_keep_settings
from .counts import LEDGER, keep_counting, start_counting, stop_counting
from .flush import FlushResult, FlushWorker, flush_everything, require_seconds

logger = logging.getLogger(__name__)

_SPARE_SECONDS = 0.5  # 期限で強制終了する前に、結果をログに残す余裕
_CAN_HOLD = hasattr(signal, "pthread_sigmask")  # Windows にはない


class Drainable(Protocol):
    """終了時に残りを配達できるもの(``TraceSpool``)。"""

    def drain(self, timeout_seconds: float) -> int:
        """配達し、ディスクに残った件数を返す。"""
        ...


class GracefulShutdownHandler:
    """終了のしかたを変えずに、終了の前にトレースを送り終える。

    シグナルハンドラーの中では送らない(ロックを持った処理に割り込んでいることがある)。
    ``SystemExit`` で実行中のスパンを閉じ、終了処理で送り、最後に元のシグナルで終わり直す。
    そのとき、これより先に登録された ``atexit`` の処理は動かない(既定の SIGTERM と同じ)。
    """

    def __init__(
        self,
        timeout_seconds: float = 30.0,
        *,
        signals: Iterable[int] = (signal.SIGTERM, signal.SIGINT),
        spool: Drainable | None = None,
        flush: Callable[[], str | None] = flush_everything,
    ) -> None:
        """設定だけを行う。登録は ``register()``。

        Args:
            timeout_seconds: シグナルから強制終了までの上限。送れなかった分は、件数をログに残す。
            signals: 対象のシグナル。SIGHUP などを足せる。
            spool: 送れなかった分をディスクに残すもの(``TraceSpool``)。
            flush: 送信の関数。失敗の説明か ``None`` を返す。
        """
        require_seconds(timeout_seconds)
        self.timeout_seconds = timeout_seconds
        self.signals = tuple(signal.Signals(number) for number in signals)
        self._spool = spool
        self._flush = flush
        self._previous: dict[int, Any] = {}
        self._registered = self._has_signals = False
        self._start_over()

    def _start_over(self) -> None:
        self.received: signal.Signals | None = None
        self._leaving = False  # シグナルで終わると決まった(次のシグナルは待たない)
        self._exit_by: float | None = None
        self._held: set[int] = set()
        self._pid = os.getpid()
        self._worker = FlushWorker(self._flush)
        self._deadline: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="trace-flush-deadline", daemon=True).start()

    def register(self) -> GracefulShutdownHandler:
        """終了処理とシグナルを登録する(2 回目は何もしない)。メインスレッドで呼ぶ。

        ほかのスレッドで呼んだときは、シグナルだけ、次にメインスレッドで呼ぶまで登録されない。
        """
        if not self._registered:
            self._registered = True
            start_counting()
            atexit.register(self._at_exit)
            _watch_the_process(self)
        if self._has_signals:
            return self
        if threading.current_thread() is threading.main_thread():
            self._install_signals()
        else:
            logger.warning(
                "not in the main thread: signals still lose queued traces; "
                "call register() again in the main thread"
            )
        return self

    def unregister(self) -> None:
        """登録を取り消し、前のシグナルハンドラーに戻す。"""
        if not self._registered:
            return
        self._registered = self._has_signals = False
        atexit.unregister(self._at_exit)
        self._restore_signals()
        _watched.discard(self)
        stop_counting()

    def flush(self, timeout_seconds: float | None = None) -> FlushResult:
        """送信待ちを送り終える。既定の上限はコンストラクターの ``timeout_seconds``。"""
        limit = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        return self._deliver(limit)

    def _deliver(self, limit: float, *, for_good: bool = False) -> FlushResult:
        result = self._worker.wait(limit, for_good=for_good)
        left = self._spool.drain(max(0.0, limit - result.seconds)) if self._spool else 0
        if left:
            error = f"{left} traces are kept on disk for replay ({result.error or 'undelivered'})"
            result = FlushResult(False, result.seconds, error, result.undelivered + left)
        if not result.ok:
            logger.warning("trace flush at shutdown: %s", result.error)
        return result

    def _deliver_before_the_end(self) -> None:
        """プロセスの終わりに、期限まで送る。"""
        if self._pid != os.getpid() or not self._registered or LEDGER.closed:
            return
        if self._exit_by is None:
            self._exit_by = time.monotonic() + self.timeout_seconds
            if number := self._signal_to_repeat() or next(iter(self._held), None):
                self._deadline.put(number)
        left = self._exit_by - time.monotonic() - _SPARE_SECONDS
        self._deliver(max(0.1, left), for_good=True)

    def _watch(self) -> None:
        """シグナルから期限まで待ち、まだ終わらなければ強制終了する。次のシグナルなら、すぐに。"""
        number = self._deadline.get()
        with contextlib.suppress(queue.Empty):
            self._deadline.get(timeout=max(0.0, self.timeout_seconds - _SPARE_SECONDS / 2))
        left = self._worker.wait(_SPARE_SECONDS / 4, for_good=True).undelivered
        logger.error(
            "shutdown took over %gs; exiting now%s",
            self.timeout_seconds,
            f" ({left} traces not delivered)" if left else "",
        )
        os._exit(128 + number)

    def _install_signals(self) -> None:
        self._has_signals = True
        for number in self.signals:
            self._previous[number] = signal.getsignal(number)
            if self._previous[number] is not signal.SIG_IGN:  # nohup などの指定はそのまま
                signal.signal(number, self._on_signal)
            if getattr(getattr(self._previous[number], "__self__", None), "should_exit", False):
                self._hold_if_raised_again(number, self._previous[number])  # 起動中に届いていた
        if not _CAN_HOLD and any(map(_is_uvicorn, self._previous.values())):
            logger.warning(
                "uvicorn ends its workers before they can deliver on this platform: "
                "use FastAPI(lifespan=tracing_lifespan)"
            )

    def _restore_signals(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._on_signal and previous is not None:
                signal.signal(number, previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        previous = self._previous.get(number)
        if callable(previous) and self._exit_by is None:  # アプリやサーバーのハンドラーが決める
            self._hold_if_raised_again(number, previous)
            previous(number, frame)
            return
        self._deadline.put(number)
        if not self._leaving and self._exit_by is None:  # 終了処理の送信は中断しない
            self._leaving = True
            self._exit_by = time.monotonic() + self.timeout_seconds
            self._worker.start()
            raise SystemExit(128 + number)

    def _hold_if_raised_again(self, number: int, previous: Any) -> None:
        """uvicorn は、止まり終えると設定を既定に戻し、同じシグナルを自分に送って即死する。

        送り終えるまで、メインスレッドへの分だけを止めておく(外からのシグナルは別のスレッドが受ける)。
        """
        if _CAN_HOLD and _is_uvicorn(previous) and number != signal.SIGINT:
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
            self._held.add(number)

    def _at_exit(self) -> None:
        if self._pid != os.getpid():
            return
        self._deliver_before_the_end()
        number = self._signal_to_repeat()
        if number or self._held:
            logging.shutdown()
            with contextlib.suppress(AttributeError, OSError, ValueError):  # 閉じた標準出力
                sys.stdout.flush()
        if self._held:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._held)
        if number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)  # 待つ側には「シグナルで終わった」と見える

    def _signal_to_repeat(self) -> signal.Signals | None:
        if threading.current_thread() is not threading.main_thread():
            return None
        if getattr(sys, "last_type", None) is KeyboardInterrupt:
            return signal.SIGINT  # MLflow の終了処理で 1 に変わる終了コードを 130 に戻す
        if self.received and not callable(self._previous.get(self.received)):
            return self.received
        return None

    def _before_fork(self) -> None:
        # キューに残りがあるまま fork すると、子の送信は永久に終わらない
        self._worker.wait(self.timeout_seconds)

    def _in_forked_child(self) -> None:
        self._start_over()
        _connect_celery()


def _is_uvicorn(handler: object) -> bool:
    return str(getattr(handler, "__module__", "")).startswith("uvicorn.")


_watched: set[GracefulShutdownHandler] = set()
_process_hooks_installed = False


def _watch_the_process(handler: GracefulShutdownHandler) -> None:
    """終わりと fork を見張る(どちらのフックも取り消せないので、1 回だけ登録する)。"""
    global _process_hooks_installed
    _watched.add(handler)
    # Pool を止めるシグナルは、multiprocessing の子では元に戻す
    multiprocessing.util.register_after_fork(handler, GracefulShutdownHandler._restore_signals)
    _connect_celery()
    if _process_hooks_installed:
        return
    _process_hooks_installed = True
    before_threads_are_joined(_deliver_all)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_child=_in_forked_child)


def _deliver_all(**_: object) -> None:
    for handler in _watched:
        handler._deliver_before_the_end()


def _connect_celery() -> None:
    """Celery の prefork の子は atexit を通らず ``os._exit`` で終わるので、その直前に送る。"""
    if "celery" in sys.modules:
        from celery import signals  # pyright: ignore

        signals.worker_process_shutdown.connect(_deliver_all, weak=False, dispatch_uid=__name__)


def _before_fork() -> None:
    for handler in _watched:
        handler._before_fork()


def _in_forked_child() -> None:
    if not _watched:
        return
    reset_but_keep_settings()
    keep_counting()
    for handler in _watched:
        handler._in_forked_child()


_installed: GracefulShutdownHandler | None = None


def install_handler(
    timeout_seconds: float, *, signals: Iterable[int], spool: Drainable | None
) -> GracefulShutdownHandler:
    """プロセスに 1 つのハンドラーを登録する。同じ設定での 2 回目は、登録済みのものを返す。

    Raises:
        ValueError: ``timeout_seconds`` が 0 以下、または登録済みのものと違う設定。
    """
    global _installed
    if _installed is None or not _installed._registered:
        handler = GracefulShutdownHandler(timeout_seconds, signals=signals, spool=spool)
        _installed = handler.register()
        return _installed
    wanted = (timeout_seconds, tuple(signals), spool)
    if wanted != (_installed.timeout_seconds, _installed.signals, _installed._spool):
        raise ValueError("graceful shutdown is already set up differently; unregister() it first")
    return _installed.register()  # 1 回目がほかのスレッドだったときの、シグナルの登録
