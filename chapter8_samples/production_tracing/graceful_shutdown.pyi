"""8.1.4 グレースフルシャットダウン(リスト8.6)。"""

import contextlib
import logging
import signal
from collections.abc import AsyncGenerator, Callable, Iterable
from types import FrameType
from typing import Any, Protocol
from .trace_flush import FlushResult, flush_everything
logger = logging.getLogger(__name__)

class Drainable(Protocol):
    """終了時に残りを配達できるもの(``trace_spool.TraceSpool``)。"""

    def drain(self, timeout_seconds: float) -> int:
        """配達し、ディスクに残った件数を返す。"""

class GracefulShutdownHandler:
    """終了のしかたを変えずに、終了の前にトレースを送り終える。

    シグナルハンドラーの中では送らない(ロックを持った処理に割り込んでいることがある)。
    ``SystemExit`` で実行中のスパンを閉じ、終了処理で送り、最後に元のシグナルで終わり直す。
    そのとき、これより先に登録された ``atexit`` の処理は動かない(既定の SIGTERM と同じ)。
    """

    def __init__(self, timeout_seconds: float=30.0, *, signals: Iterable[int]=(signal.SIGTERM, signal.SIGINT), spool: Drainable | None=None, flush: Callable[[], str | None]=flush_everything) -> None:
        """設定だけを行う。登録は ``register()``。

        Args:
            timeout_seconds: シグナルから強制終了までの上限。
            signals: 対象のシグナル。SIGHUP などを足せる。
            spool: 送れなかった分をディスクに残すもの(``TraceSpool``)。
            flush: 送信の関数。失敗の説明か ``None`` を返す。
        """
        self.timeout_seconds = timeout_seconds
        self.signals = tuple((signal.Signals(number) for number in signals))
        self.received: signal.Signals | None = None
        self._spool = spool
        self._flush = flush
        self._previous: dict[int, Any] = {}
        self._leaving = False
        self._exiting = False
        self._registered = False
        self._has_signals = False

    def register(self) -> GracefulShutdownHandler:
        """終了処理とシグナルを登録する(2 回目は何もしない)。メインスレッドで呼ぶ。

        ほかのスレッドで呼んだときは、シグナルだけ、次にメインスレッドで呼ぶまで登録されない。
        """

    def unregister(self) -> None:
        """登録を取り消し、前のシグナルハンドラーに戻す。"""

    def flush(self, timeout_seconds: float | None=None) -> FlushResult:
        """送信待ちを送り終える。既定の上限はコンストラクターの ``timeout_seconds``。"""

    def _start_threads(self) -> None:
        ...

    def _watch(self) -> None:
        ...

    def _install_signals(self) -> None:
        ...

    def _restore_signals(self) -> None:
        ...

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        ...

    def _at_exit(self) -> None:
        ...

    def _signal_to_repeat(self) -> signal.Signals | None:
        ...

    def _before_fork(self) -> None:
        ...

    def _after_fork(self) -> None:
        ...

    def _in_multiprocessing_child(self) -> None:
        """``multiprocessing`` の子は atexit を通らない。Pool を止めるシグナルは元に戻す。"""

def setup_graceful_shutdown(timeout_seconds: float=30.0, *, signals: Iterable[int]=(signal.SIGTERM, signal.SIGINT), spool: Drainable | None=None) -> GracefulShutdownHandler:
    """終了時にトレースを送り終えるようにする。起動時にメインスレッドで一度呼ぶ。

    2 回目以降は、登録済みのものを返す。設定を変えるときは、先に ``unregister()`` する。
    uvicorn では ``tracing_lifespan`` を使う。gunicorn では、アプリの起動時か、次のように
    ``post_fork`` で呼ぶ(``--preload`` の親で呼んでもよい。fork の前に送り終える)。
    ``multiprocessing`` の spawn の子では、子の中でも呼ぶ::

        # gunicorn.conf.py
        def post_fork(server, worker):
            mlflow.set_experiment("/production/my-llm-app")
            setup_graceful_shutdown(timeout_seconds=20)

    Raises:
        ValueError: ``timeout_seconds`` が 0 以下、または登録済みのものと違う設定。
    """

@contextlib.asynccontextmanager
def tracing_lifespan(app: object, timeout_seconds: float=10.0) -> AsyncGenerator[None, None]:
    """FastAPI の lifespan: ワーカーの停止時に送り終える。

    ``FastAPI(lifespan=tracing_lifespan)``。uvicorn の ``--workers`` では各ワーカーのシグナル設定が
    元に戻されるため、この方法が確実である。自分の lifespan がある場合は、その中で
    ``async with tracing_lifespan(app): yield`` と書く。
    """

def main() -> None:
    """未送信のトレースを抱えたプロセスに SIGTERM を送り、保存された件数を比べる。"""
