"""8.4.2 アラートの通知(Slack、PagerDuty、複数チャネル)。"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any
from .delivery import Alert, AlertSeverity, Delivery, Fanout, HttpHandler, HttpPoster, NotificationHandler
from .rules import AlertConfig
logger = logging.getLogger(__name__)
PAGERDUTY_URLS = {'us': 'https://events.pagerduty.com', 'eu': 'https://events.eu.pagerduty.com'}

class SlackNotificationHandler(HttpHandler):
    """Slack の Incoming Webhook に送る。

    Slack には重複を捨てる鍵がないので、届いたかもしれない失敗(読み取りタイムアウト)は再送しない。
    """
    name = 'slack'

    def __init__(self, webhook_url: str, **http: Any) -> None:
        self.poster: HttpPoster

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Block Kit の本文。"""

class PagerDutyNotificationHandler(HttpHandler):
    """PagerDuty Events API v2 に送る。発報は trigger、解消は同じ dedup_key の resolve。

    ``routing_key`` は 32 文字の Integration Key、``region`` は ``us`` か ``eu``。重大度が
    ``min_severity`` より低ければ、人を呼ばない。
    """
    name = 'pagerduty'

    def __init__(self, routing_key: str, *, source: str='llm-app', region: str='us', base_url: str | None=None, min_severity: AlertSeverity | str=AlertSeverity.ERROR, **http: Any) -> None:
        self._routing_key = routing_key
        self.source = source
        self.min_severity: AlertSeverity
        self.poster: HttpPoster
        self._changes: HttpPoster

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Events API v2 の本文。"""

    def change_event(self, summary: str, *, details: Mapping[Any, Any] | None=None, at: datetime | None=None) -> Delivery:
        """リリースやロールバックを変更イベントとして記録する(人は呼ばれない)。

        ``details`` は、上限に収まる長さに切り、JSON にならない値は文字列にして送る。
        """

class ConsoleNotificationHandler(NotificationHandler):
    """1 行の文にして渡す(既定は標準出力)。開発用と、どの通知先にも届かないときのためにある。

    端末の文字コードで書けない文字は「?」になる。
    """
    name = 'console'

    def __init__(self, write: Callable[[str], object] | None=None) -> None:
        self._write = write

    def deliver(self, alert: Alert) -> Delivery:
        """書き出す。"""

class MultiChannelNotifier(Fanout):
    """重大度ごとの経路に従い、複数の通知先へ並行して送る。

    Args:
        fallback: どの通知先にも届かなかったときの通知先(既定はログ)。
        wait_seconds: ``notify`` が待つ上限。済まないものは ``pending`` で返り、送信は続く。
    """

    def __init__(self, *, fallback: NotificationHandler | None=None, wait_seconds: float=5.0) -> None:
        self.wait_seconds = wait_seconds

    def set_severity_routing(self, routing: Mapping[AlertSeverity | str, Sequence[str]]) -> None:
        """重大度 -> 通知先の名前。書かなかった重大度は全部の通知先へ送る。"""

    def notify(self, alerts: Alert | Iterable[Alert], *, only: Mapping[str, Collection[str]] | None=None) -> list[Delivery]:
        """送って、通知先ごとの結果を返す。どの通知先にも届かなければ fallback に渡す。

        ``only`` は、送り直すものの ``fingerprint`` と、まだ受け取っていない通知先の名前
        (``pending`` だったものは、結果だけを返す)。
        """

    def keep_alive(self, alerts: Sequence[Alert]) -> list[Delivery]:
        """発報中のアラートを、毎回の送り直しが必要な通知先(Alertmanager)へ送る。"""

def notifier_from_config(config: AlertConfig, environ: Mapping[str, str] | None=None) -> MultiChannelNotifier:
    """設定の ``receivers`` と ``routes`` から組み立てる。秘密は ``environ``(環境変数)から読む。

    Raises:
        NotificationConfigError: 通知先か経路の誤り、または環境変数がない。すべてを挙げる。
    """

def main() -> None:
    """429 を返す Slack、PagerDuty の発報と解消、壊れた通知先を、手元の受信サーバーで試す。"""
