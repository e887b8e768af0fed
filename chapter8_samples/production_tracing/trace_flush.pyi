"""8.1.4 送信待ちのトレースを、期限つきで送り終える(graceful_shutdown.py の土台)。"""

import logging
import os
import queue
from collections.abc import Callable
from dataclasses import dataclass
logger = logging.getLogger(__name__)

@dataclass(frozen=True)
class FlushResult:
    """``flush_traces`` の結果。"""
    ok: bool
    '時間内に終わり、送信の失敗も記録されなかった。'
    seconds: float
    error: str | None = None

def flush_everything() -> str | None:
    """MLflow の 2 つのキューと OTLP のキューを空にする。失敗があればその説明を返す。

    ``flush_trace_async_logging()`` は OTLP を含まない。``terminate=True`` は使わない(その後の
    トレースがすべて消える)。まだ何も記録していなければ、接続もしない。
    """

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

    def start(self) -> None:
        """結果を待たずに送信を始める。"""

    def wait(self, timeout_seconds: float) -> FlushResult:
        """送信を頼み、最大 ``timeout_seconds`` 秒待つ。"""

    def _run(self) -> None:
        ...

def flush_traces(timeout_seconds: float=10.0) -> FlushResult:
    """送信待ちのトレースを送り終えるまで、最大 ``timeout_seconds`` 秒待つ。

    ``mlflow.flush_trace_async_logging()`` は期限がなく(サーバーが止まると数分から 30 分)、失敗を
    知らせず、OTLP を含まない。これはその 3 つを補い、送った後もトレーシングは動き続ける。

    Raises:
        ValueError: ``timeout_seconds`` が 0 以下、または無限大。
    """

def main() -> None:
    """送れたときと、サーバーが止まっているときの結果を見る。"""
