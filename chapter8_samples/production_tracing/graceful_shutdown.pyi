"""8.1.4 グレースフルシャットダウン(リスト8.6)。"""

import contextlib
import signal
from collections.abc import AsyncGenerator, Iterable
from .delivery.shutdown import GracefulShutdownHandler
from .delivery.spool import TraceSpool

def setup_graceful_shutdown(timeout_seconds: float=30.0, *, signals: Iterable[int]=(signal.SIGTERM, signal.SIGINT), spool: TraceSpool | None=None) -> GracefulShutdownHandler:
    """終了時にトレースを送り終えるようにする。起動時にメインスレッドで一度呼ぶ。

    2 回目以降は、登録済みのものを返す。設定を変えるときは、先に ``unregister()`` する。
    gunicorn の ``--preload`` の親で呼んでもよい(fork の前に送り終える)。``UvicornWorker`` は
    fork の後でシグナルを既定に戻すので、ワーカーでも呼ぶ(ほかのワーカーでも、この方法でよい)::

        # gunicorn.conf.py
        def post_worker_init(worker):
            mlflow.set_experiment("/production/my-llm-app")
            setup_graceful_shutdown(timeout_seconds=20)

    ``signals`` は、受けたら送り終えてから終わるシグナル(端末が閉じる ``SIGHUP`` なども足せる)。

    Raises:
        ValueError: ``timeout_seconds`` が 0 以下、または登録済みのものと違う設定。
    """

@contextlib.asynccontextmanager
def tracing_lifespan(app: object, timeout_seconds: float=10.0) -> AsyncGenerator[None, None]:
    """FastAPI の lifespan: ワーカーの停止時に送り終える。シグナルの設定には触れない。

    ``FastAPI(lifespan=tracing_lifespan)``。自分の lifespan がある場合は、その中で
    ``async with tracing_lifespan(app): yield`` と書く。
    """

def main() -> None:
    """未送信のトレースを抱えたプロセスに SIGTERM を送り、保存された件数を比べる。"""
