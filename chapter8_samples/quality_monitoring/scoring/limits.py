"""8.3.5 採点の速さと費用の上限。"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from decimal import Decimal


class Throttle:
    """呼び出しの間隔を空ける(スレッド間で共有する)。"""

    def __init__(
        self,
        calls_per_second: float | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._clock, self._sleep, self._lock = clock, sleep, threading.Lock()
        self._interval = 1 / calls_per_second if calls_per_second else 0.0
        self._next = 0.0

    def wait(self) -> None:
        """次に呼んでよい時刻まで待つ。"""
        if self._interval:
            with self._lock:
                at = max(self._next, self._clock())
                self._next = at + self._interval
            self._sleep(max(0.0, at - self._clock()))


class Budget:
    """並列に呼んでも予算を超えないように、呼ぶ前に見込みのコスト(これまでの最大)を確保する。"""

    def __init__(self, limit_usd: float | None) -> None:
        self._limit = Decimal(str(limit_usd)) if limit_usd is not None else None
        self._committed = Decimal(0)
        self._largest: dict[str, Decimal] = {}
        self._probing: set[str] = set()
        self._changed = threading.Condition()

    def reserve(self, name: str) -> Decimal | None:
        """確保した額(USD)。足りなければ ``None``。コストの分からない最初の 1 回は 1 件ずつ。"""
        if self._limit is None:
            return Decimal(0)
        with self._changed:
            self._changed.wait_for(lambda: name not in self._probing)
            expected = self._largest.get(name, Decimal(0))
            if self._committed >= self._limit or self._committed + expected > self._limit:
                return None
            if name not in self._largest:
                self._probing.add(name)
            self._committed += expected
            return expected

    def settle(self, name: str, expected: Decimal, cost: Decimal) -> None:
        """確保した額を、実際のコストに直す。"""
        with self._changed:
            self._committed += cost - expected
            self._largest[name] = max(self._largest.get(name, Decimal(0)), cost)
            self._probing.discard(name)
            self._changed.notify_all()
