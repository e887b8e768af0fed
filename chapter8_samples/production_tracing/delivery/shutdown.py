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

from .._internals import reset_but_keep_settings
from .flush import FlushResult, FlushWorker, flush_everything

logger = logging.getLogger(__name__)


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
            timeout_seconds: シグナルから強制終了までの上限。
            signals: 対象のシグナル。SIGHUP などを足せる。
            spool: 送れなかった分をディスクに残すもの(``TraceSpool``)。
            flush: 送信の関数。失敗の説明か ``None`` を返す。
        """
        if not 0 < timeout_seconds <= threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_seconds={timeout_seconds!r} must be > 0 and finite")
        self.timeout_seconds = timeout_seconds
        self.signals = tuple(signal.Signals(number) for number in signals)
        self.received: signal.Signals | None = None
        self._spool = spool
        self._flush = flush
        self._previous: dict[int, Any] = {}
        self._leaving = False  # シグナルで終わると決まった(次のシグナルは待たない)
        self._exiting = False
        self._registered = False
        self._has_signals = False
        self._start_threads()

    def register(self) -> GracefulShutdownHandler:
        """終了処理とシグナルを登録する(2 回目は何もしない)。メインスレッドで呼ぶ。

        ほかのスレッドで呼んだときは、シグナルだけ、次にメインスレッドで呼ぶまで登録されない。
        """
        if not self._registered:
            self._registered = True
            atexit.register(self._at_exit)
            _watch_forks(self)
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

    def flush(self, timeout_seconds: float | None = None) -> FlushResult:
        """送信待ちを送り終える。既定の上限はコンストラクターの ``timeout_seconds``。"""
        limit = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        result = self._worker.wait(limit)
        left = self._spool.drain(max(0.0, limit - result.seconds)) if self._spool else 0
        if left:
            error = f"{left} traces are kept on disk for replay ({result.error or 'undelivered'})"
            result = FlushResult(False, result.seconds, error)
        if not result.ok:
            logger.warning("trace flush at shutdown: %s", result.error)
        return result

    def _start_threads(self) -> None:
        self._pid = os.getpid()
        self._worker = FlushWorker(self._flush)
        self._deadline: queue.SimpleQueue[int] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="trace-flush-deadline", daemon=True).start()

    def _watch(self) -> None:
        number = self._deadline.get()
        time.sleep(self.timeout_seconds)
        logger.error("shutdown took over %gs; exiting now", self.timeout_seconds)
        os._exit(128 + number)

    def _install_signals(self) -> None:
        self._has_signals = True
        for number in self.signals:
            self._previous[number] = signal.getsignal(number)
            if self._previous[number] is not signal.SIG_IGN:  # nohup などの指定はそのまま
                signal.signal(number, self._on_signal)

    def _restore_signals(self) -> None:
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._on_signal and previous is not None:
                signal.signal(number, previous)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._leaving:
            os._exit(128 + number)
        self.received = signal.Signals(number)
        previous = self._previous.get(number)
        if callable(previous) and not self._exiting:  # アプリやサーバーのハンドラーが決める
            previous(number, frame)
            return
        self._leaving = True
        self._deadline.put(number)
        if not self._exiting:  # 終了処理の送信は中断せず、期限だけ付ける
            self._worker.start()
            raise SystemExit(128 + number)

    def _at_exit(self) -> None:
        if self._pid != os.getpid():
            return
        self._exiting = True
        self._leaving |= self._signal_to_repeat() is not None
        # 期限で強制終了される前に、結果をログに残す余裕を取る
        self.flush(max(0.1, self.timeout_seconds - 0.5))
        if number := self._signal_to_repeat():
            logging.shutdown()
            with contextlib.suppress(AttributeError, OSError, ValueError):  # 閉じた標準出力
                sys.stdout.flush()
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

    def _after_fork(self) -> None:
        self.received = None
        self._leaving = self._exiting = False
        self._start_threads()

    def _in_multiprocessing_child(self) -> None:
        """``multiprocessing`` の子は atexit を通らない。Pool を止めるシグナルは元に戻す。"""
        multiprocessing.util.Finalize(self, self._at_exit, exitpriority=100)
        self._restore_signals()


_watched: set[GracefulShutdownHandler] = set()
_fork_hooks_installed = False


def _watch_forks(handler: GracefulShutdownHandler) -> None:
    """fork の前に送り終え、子では作り直す(フックは取り消せないので 1 回だけ登録する)。"""
    global _fork_hooks_installed
    _watched.add(handler)
    multiprocessing.util.register_after_fork(handler, _multiprocessing_child)
    if _fork_hooks_installed or not hasattr(os, "register_at_fork"):
        return
    _fork_hooks_installed = True
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)


def _multiprocessing_child(handler: GracefulShutdownHandler) -> None:
    if handler in _watched:
        handler._in_multiprocessing_child()


def _before_fork() -> None:
    for handler in _watched:
        handler._before_fork()


def _after_fork() -> None:
    if not _watched:
        return
    reset_but_keep_settings()
    for handler in _watched:
        handler._after_fork()


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
