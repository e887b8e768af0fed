"""8.4.2 複数の通知先へ並行して送る。通知先ごとの順序は守り、遅い通知先は他を待たせない。"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from datetime import datetime

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
    """一つの通知先の列。送るスレッドは、列が空になれば終わる(プロセスは、送り終えてから終わる)。

    ``ThreadPoolExecutor`` は使わない: 終了の途中では送れない。fork した子では、空の列から始まる
    (残りは親が送る)。
    """

    def __init__(self, handler: NotificationHandler) -> None:
        self.handler = handler
        self._empty()
        renew_after_fork(self._empty)

    def _empty(self) -> None:
        self._waiting: deque[tuple[Alert, Future[Delivery]]] = deque()
        self._jobs: dict[Key, Future[Delivery]] = {}
        self._lock = threading.Lock()
        self._running = False

    @property
    def busy(self) -> bool:
        """前に渡されたものを、まだ送っているか。"""
        return self._running

    def put(self, alert: Alert, *, again: bool = False) -> Future[Delivery]:
        """列に加える。同じ通知がまだ列にあれば加えない(二重に届く)。

        Args:
            again: 送り直しか。待つのをやめた間に済んでいれば、送らずにその結果を返す。
        """
        key = _key(alert)
        with self._lock:
            job = self._jobs.get(key)
            if not job or (job.done() and not again):
                if len(self._jobs) >= MAX_UNCLAIMED:
                    self._jobs = {k: kept for k, kept in self._jobs.items() if not kept.done()}
                job = self._jobs[key] = Future[Delivery]()
                self._waiting.append((alert, job))
            if self._waiting and not self._running:
                self._start()
            return job

    def _start(self) -> None:
        try:
            threading.Thread(target=self._work, name=f"notify-{self.handler.name}").start()
            self._running = True
        except RuntimeError as error:  # スレッドの数の上限など。次に渡されたときに、また始める
            logger.warning("%s does not send yet: %s", self.handler.name, error)

    def take(self, alert: Alert, job: Future[Delivery]) -> Delivery:
        """結果。まだなら ``pending`` で、後で ``put(again=True)`` から受け取れる。"""
        if not job.done():
            return self._unsent(alert, "still being sent; the channel is slow", pending=True)
        with self._lock:
            self._jobs.pop(_key(alert), None)
        return job.result()

    def stop(self) -> None:
        """待っているものは送らずに(後で送り直せる失敗にして)、送っている途中の 1 件を待つ。"""
        with self._lock:
            dropped = self._waiting
            self._waiting = deque()
            unfinished = [job for job in self._jobs.values() if not job.done()]
        for alert, job in dropped:
            job.set_result(self._unsent(alert, "not sent: the process is ending"))
        wait(unfinished)

    def _unsent(self, alert: Alert, note: str, *, pending: bool = False) -> Delivery:
        return self.handler.result(
            alert, ok=False, attempts=0, error=note, retryable=True, pending=pending
        )

    def send(self, alert: Alert) -> Delivery:
        """列を通さずに送る。"""
        try:
            delivery = self.handler.send(alert)
            if not delivery.ok:
                problem = f"{self.handler.name}: {delivery.error}"
                logger.warning("alert %s not sent by %s", alert.name, problem)
            return delivery
        except Exception as error:  # 一つの誤りで他を止めない。例外の文には URL やキーが入りうる
            reason = f"raised {type(error).__name__}"
            logger.warning("alert %s not sent by %s: %s", alert.name, self.handler.name, reason)
            return self.handler.result(alert, ok=False, error=reason)

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._running = False
                    return
                alert, job = self._waiting.popleft()
            job.set_result(self.send(alert))


class Fanout:
    """名前の付いた通知先と、どのアラートをどこへ送るかの経路。"""

    def __init__(self, fallback: NotificationHandler) -> None:
        self.fallback = ChannelQueue(fallback)
        self.queues: dict[str, ChannelQueue] = {}
        self._routes: list[Route] = []

    def add(self, name: str, handler: NotificationHandler) -> None:
        """通知先を加える。"""
        if name in self.queues:
            raise NotificationConfigError(f"handler {name!r} is already registered")
        handler.name = name
        handler.min_severity = AlertSeverity(handler.min_severity)
        self.queues[name] = ChannelQueue(handler)

    def set_routes(self, routes: Iterable[Route]) -> None:
        """(条件, 通知先の名前) の列。どれにも合わないアラートは、全部の通知先へ送る。"""
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
        again: bool = False,
    ) -> list[Delivery]:
        """(アラート, 通知先の名前) を送り、``wait_seconds`` 秒までの結果を返す。

        前の分をまだ送っている通知先は待たない。
        """
        jobs: list[tuple[ChannelQueue, Alert, Future[Delivery]]] = []
        awaited: list[Future[Delivery]] = []
        for name, queue in self.queues.items():
            behind = queue.busy
            for alert in [alert for alert, names in targets if name in names]:
                job = queue.put(alert, again=again)
                jobs.append((queue, alert, job))
                if not (behind or job.done()):
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
