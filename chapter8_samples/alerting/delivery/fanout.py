"""8.4.2 複数の通知先へ並行して送る。通知先ごとの順序は守り、遅い通知先は他を待たせない。"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import datetime

from typing_extensions import Self

from ..processes import renew_after_fork
from .alert import (
    Alert,
    AlertSeverity,
    AlertStatus,
    Delivery,
    NotificationConfigError,
    NotificationHandler,
)

logger = logging.getLogger(__name__)

MAX_UNCLAIMED = 1000
"""受け取られるのを待つ、結果の数の上限。"""

Key = tuple[str, AlertStatus, AlertSeverity, datetime]
Route = tuple[Mapping[str, str], Sequence[str]]
"""(条件, 通知先の名前)。"""


def _key(alert: Alert) -> Key:
    """同じ通知か。値だけが違う繰り返しは、まだ列にあるなら一つにまとめる。"""
    return (alert.fingerprint, alert.status, alert.severity, alert.starts_at)


class ChannelQueue:
    """一つの通知先の列。渡した順に一つずつ送る(プロセスは、送り終えてから終わる)。

    fork した子では、空の列から始まる(残りは親が送る)。
    """

    def __init__(self, handler: NotificationHandler) -> None:
        self.handler = handler
        self._empty()
        renew_after_fork(self._empty)

    def _empty(self) -> None:
        self._worker = ThreadPoolExecutor(1)
        self._jobs: dict[Key, Future[Delivery]] = {}
        self._lock = threading.Lock()

    @property
    def busy(self) -> bool:
        """前に渡されたものを、まだ送っているか。"""
        return not all(job.done() for job in list(self._jobs.values()))

    def put(self, alert: Alert, *, again: bool = False) -> Future[Delivery]:
        """列に加える。同じ通知がまだ列にあれば加えない(二重に届く)。

        Args:
            again: 送り直しか。待つのをやめた間に済んでいれば、送らずにその結果を返す。
        """
        with self._lock:
            job = self._jobs.get(_key(alert))
            if not job or (job.done() and not again):
                if len(self._jobs) >= MAX_UNCLAIMED:
                    self._jobs = {k: kept for k, kept in self._jobs.items() if not kept.done()}
                job = self._jobs[_key(alert)] = self._submit(alert)
            return job

    def _submit(self, alert: Alert) -> Future[Delivery]:
        try:
            return self._worker.submit(self.handler.send, alert)
        except RuntimeError:  # スレッドの数の上限、またはプロセスの終わり。その場で送る
            self._worker = ThreadPoolExecutor(1)  # 加えかけたものが残り、二重に届くのを防ぐ
            sent = Future[Delivery]()
            sent.set_result(self.handler.send(alert))
            return sent

    def take(self, alert: Alert, job: Future[Delivery]) -> Delivery:
        """結果。まだなら ``pending`` で、後で ``put(again=True)`` から受け取れる。"""
        if not job.done():
            return self._unsent(alert, "still being sent; the channel is slow", pending=True)
        with self._lock:
            self._jobs.pop(_key(alert), None)
        if job.cancelled():
            return self._unsent(alert, "not sent: the process is ending")
        return job.result()

    def _unsent(self, alert: Alert, note: str, *, pending: bool = False) -> Delivery:
        return self.handler.result(
            alert, ok=False, attempts=0, error=note, retryable=True, pending=pending
        )

    def stop(self) -> None:
        """待っているものは送らずに(後で送り直せる失敗にして)、送っている途中の 1 件を待つ。"""
        ending, self._worker = self._worker, ThreadPoolExecutor(1)
        ending.shutdown(cancel_futures=True)


class Fanout:
    """名前の付いた通知先と、どのアラートをどこへ送るかの経路。"""

    def __init__(self, fallback: NotificationHandler) -> None:
        self.fallback = fallback
        self.queues: dict[str, ChannelQueue] = {}
        self._routes: list[Route] = []

    def add_handler(self, name: str, handler: NotificationHandler) -> Self:
        """通知先を加える。"""
        if name in self.queues:
            raise NotificationConfigError(f"handler {name!r} is already registered")
        handler.name = name
        handler.min_severity = AlertSeverity(handler.min_severity)
        self.queues[name] = ChannelQueue(handler)
        return self

    def set_routes(self, routes: Iterable[Route]) -> None:
        """(条件, 通知先の名前) の列。どれにも合わないアラートは、全部の通知先へ送る。"""
        routes = list(routes)
        if lone := next((names for _, names in routes if isinstance(names, str)), None):
            raise NotificationConfigError(f"names must be a list, got {lone!r}; write [{lone!r}]")
        table = [(dict(match), tuple(names)) for match, names in routes]
        if unknown := sorted({n for _, names in table for n in names} - self.queues.keys()):
            known = ", ".join(sorted(self.queues)) or "none"
            raise NotificationConfigError(f"unknown handlers {unknown}; registered: {known}")
        self._routes = [*table]

    def route(self, alert: Alert) -> Sequence[str]:
        """最初に合った経路の、通知先の名前。どれにも合わなければ全部。"""
        matching = (names for match, names in self._routes if alert.matches(match))
        return next(matching, tuple(self.queues))

    def targets(self, alert: Alert, owed: Collection[str] | None = None) -> Collection[str]:
        """送る相手。送り直し(``owed``)でも、経路から外れたものがあれば、いまの経路の全部。"""
        route = self.route(alert)
        gone = ", ".join(sorted(set(owed or ()) - set(route)))
        if gone:  # 設定で名前が変わった、または消えた
            now = ", ".join(route) or "the fallback"
            logger.warning("alert %s is no longer routed to %s; using %s", alert.name, gone, now)
        return route if owed is None or gone else owed

    def send_to(
        self,
        targets: Sequence[tuple[Alert, Collection[str]]],
        wait_seconds: float,
        *,
        again: Collection[str] = (),
    ) -> list[Delivery]:
        """(アラート, 通知先の名前) を送り、``wait_seconds`` 秒までの結果を返す。

        前の分をまだ送っている通知先は待たない。``again`` は、送り直すものの ``fingerprint``。
        """
        jobs: list[tuple[ChannelQueue, Alert, Future[Delivery]]] = []
        awaited: list[Future[Delivery]] = []
        for name, queue in self.queues.items():
            behind = queue.busy
            for alert in [alert for alert, names in targets if name in names]:
                job = queue.put(alert, again=alert.fingerprint in again)
                jobs.append((queue, alert, job))
                if not (behind or job.done()):  # stop() が取り消したものは、待つと時間切れになる
                    awaited.append(job)
        wait(awaited, timeout=wait_seconds)
        return [queue.take(alert, job) for queue, alert, job in jobs]

    def stop(self) -> None:
        """プロセスを終える前に呼ぶ。送っている途中のものだけを待ち、残りは次の回に任せる。"""
        for queue in self.queues.values():
            queue.stop()


def unreached(alerts: Sequence[Alert], deliveries: Sequence[Delivery]) -> list[Alert]:
    """どの通知先にも届かず、送っている途中でもないもの。

    解消を送らない設定の通知先は、解消が届いたとみなす。
    """
    reached = {d.fingerprint for d in deliveries if d.pending or (d.ok and not d.skipped)}
    skipped = {d.fingerprint for d in deliveries if d.skipped}
    return [
        alert
        for alert in alerts
        if alert.fingerprint not in reached
        and (alert.status is AlertStatus.FIRING or alert.fingerprint not in skipped)
    ]
