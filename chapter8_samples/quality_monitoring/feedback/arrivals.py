"""8.3.3 トレースが保存されるのを、何人が待っていても 1 本のスレッドで監視する。

でたらめなトレース ID が同時に何百件来ても、まとめて 1 回で尋ねるので、ほかの応答を待たせない。
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from .delivery import hurry_export, stored_among

_SECONDS_BETWEEN = 0.2
_SECONDS_TO_GATHER = 0.02  # 続けて来たものを、まとめる
_TRY_SECONDS = 5.0


class Arrivals:
    """保存されるのを待っているトレース。"""

    def __init__(self) -> None:
        self._waiting: dict[Future[None], str] = {}
        self._lock = threading.Lock()
        self._more = threading.Event()
        self._watching = False

    @contextmanager
    def of(self, trace_id: str) -> Iterator[Future[None]]:
        """保存されたら完了する Future。尋ねられない保存先では、すぐに完了する。"""
        arrival: Future[None] = Future()
        watcher = threading.Thread(target=self._watch, daemon=True, name="feedback-arrivals")
        try:
            with self._lock:
                self._waiting[arrival] = trace_id
                if not self._watching:
                    watcher.start()  # スレッドの上限なら例外になる。次の人が、また始める
                    self._watching = True
            self._more.set()
            yield arrival
        finally:
            with self._lock:
                self._waiting.pop(arrival, None)

    def _watch(self) -> None:
        while self._ask():
            hurry_export()
            time.sleep(_SECONDS_TO_GATHER)
            self._more.wait(_SECONDS_BETWEEN)

    def _ask(self) -> bool:
        """まだ待っているものがあるか。"""
        self._more.clear()
        asked = set(self._waiting.copy().values())
        try:
            stored = stored_among(asked, timeout_seconds=_TRY_SECONDS)
        except Exception:  # 監視が止まると、後から来た全員が待たされる
            stored = asked  # 1 件ずつ送ってみれば、理由が分かる
        with self._lock:
            arrived = [future for future, trace_id in self._waiting.items() if trace_id in stored]
            for future in arrived:
                del self._waiting[future]
            self._watching = bool(self._waiting)
        for future in arrived:
            if future.set_running_or_notify_cancel():
                future.set_result(None)
        return self._watching
