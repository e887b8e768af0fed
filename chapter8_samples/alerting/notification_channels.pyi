"""8.4.2 そのほかの通知先(Teams、メール、Alertmanager)と、設定からの組み立て。"""

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from email.message import EmailMessage
from typing import Any
from .alert_delivery import Alert, Delivery, HttpHandler, HttpPoster, NotificationHandler
from .alert_config import AlertConfig
from .notification_handlers import MultiChannelNotifier
TEAMS_MAX_BYTES = 21000

def details(alert: Alert) -> list[tuple[str, str]]:
    """表示する(見出し, 値)の列。"""

def title(alert: Alert) -> str:
    """1 行の見出し。"""

class TeamsNotificationHandler(HttpHandler):
    """Teams のワークフロー(Webhook のリクエストを受信したとき)に Adaptive Card を送る。"""
    name = 'teams'

    def __init__(self, workflow_url: str, *, send_resolved: bool=True, **http: Any) -> None:
        self.send_resolved = send_resolved
        self.poster = HttpPoster(workflow_url, idempotent=False, **http)

    def payload(self, alert: Alert) -> dict[str, Any]:
        """カードの JSON。大きすぎるときは、表と説明を削る。"""

    def _card(self, alert: Alert, limit: int) -> dict[str, Any]:
        ...

class AlertmanagerNotificationHandler(HttpHandler):
    """Prometheus Alertmanager の API v2 に送る。

    発報中は評価のたびに送り直し、``endsAt`` を ``hold`` だけ延ばす。評価が止まれば自然に解消する。
    """
    name = 'alertmanager'
    wants_every_cycle = True

    def __init__(self, url: str, *, hold: timedelta=timedelta(minutes=5), clock: Callable[[], datetime]=lambda: datetime.now(timezone.utc), **http: Any) -> None:
        self.hold, self._now = (hold, clock)
        self.poster = HttpPoster(f"{url.rstrip('/')}/api/v2/alerts", idempotent=True, **options)

    def payload(self, alert: Alert) -> Any:
        """API v2 のアラートの列(1 件)。"""

class EmailNotificationHandler(NotificationHandler):
    """SMTP で送る。``tls=True``(既定)なら STARTTLS で証明書も確かめる。"""
    name = 'email'

    def __init__(self, host: str, *, sender: str, to: Sequence[str], port: int=587, user: str='', password: str='', tls: bool=True, timeout_seconds: float=10.0, clock: Callable[[], float]=time.monotonic) -> None:
        self.host, self.port, self.sender, self.to = (host, port, sender, tuple(to))
        self._user, self._password, self._tls = (user, password, tls)
        self._timeout, self._clock = (timeout_seconds, clock)

    def __repr__(self) -> str:
        ...

    def message(self, alert: Alert) -> EmailMessage:
        """送る文面。同じアラートのメールは一つのスレッドにまとまる。"""

    def deliver(self, alert: Alert) -> Delivery:
        """送る。接続できないときは、後で送り直せる失敗になる。"""

def notifier_from_config(config: AlertConfig, environ: Mapping[str, str] | None=None) -> MultiChannelNotifier:
    """設定の ``receivers`` と ``routes`` から組み立てる。

    Args:
        environ: 秘密を読む環境変数。省略すると ``os.environ``。

    Raises:
        NotificationConfigError: 通知先か経路の誤り、または環境変数がない。すべてを挙げる。
    """

def main() -> None:
    """設定から通知先を組み立て、一つのアラートを Teams と Alertmanager に送る。"""
