"""SIGTERM を、Ctrl-C と同じ片付けをして終わる合図にする。"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 128 + signal.SIGTERM


class Terminated(SystemExit):
    """SIGTERM が届いた。"""


@contextmanager
def terminable() -> Iterator[None]:
    """この中で SIGTERM が届くと ``Terminated`` になり、``with`` と ``finally`` が順に片付ける。

    メインスレッドの外や、SIGTERM を無視するように起動されたときは、何もしない。
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # 片付けの途中では、もう中断しない
        raise Terminated(STATUS)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
