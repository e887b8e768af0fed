"""8.4.2 アラートの通知(Slack、PagerDuty、複数チャネル)。"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any
from .delivery import Alert, AlertSeverity, Delivery, HttpHandler, HttpPoster, NotificationHandler
from .rules import AlertConfig
logger = logging.getLogger(__name__)
PAGERDUTY_URLS = {'us': 'https://events.pagerduty.com', 'eu': 'https://events.eu.pagerduty.com'}
PAGERDUTY_MAX_BYTES = 500000

def slack_escape(text: str, limit: int) -> str:
    """Slack の制御文字を無害にし、エスケープ後の長さを ``limit`` 文字以内にする。

    >>> slack_escape("<!channel> a & b", 100)
    '&lt;!channel&gt; a &amp; b'
    >>> slack_escape("<<<<", 9)
    '&lt;&lt;…'
    """

def clip(text: str, limit: int) -> str:
    """``limit`` 文字を超えたら切って「…」を付ける。"""

def headline(alert: Alert) -> str:
    """1 行の見出し。

    >>> headline(Alert(name="slow_p95", severity=AlertSeverity.CRITICAL))
    '[発報] CRITICAL slow_p95'
    """

def summary(alert: Alert) -> str:
    """本文の 1 文。解消では、書かれているのが発報したときの内容だと分かるようにする。"""

def facts(alert: Alert) -> Iterator[tuple[str, str]]:
    """表示する(見出し, 値)の列。値のない項目は省く。"""

def links(alert: Alert) -> list[tuple[str, str]]:
    """手順書とトレースへのリンク(表示名, URL)。"""

def slack_message(alert: Alert) -> dict[str, Any]:
    """Incoming Webhook の本文。Slack の文字数とブロック数の上限を守る。"""

class SlackNotificationHandler(HttpHandler):
    """Slack の Incoming Webhook に送る。

    Slack には重複を捨てる鍵がないので、届いたかもしれない失敗(読み取りタイムアウト)は再送しない。
    """
    name = 'slack'

    def __init__(self, webhook_url: str, *, send_resolved: bool=True, **http: Any) -> None:
        self.send_resolved = send_resolved
        self.poster: HttpPoster

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Block Kit の本文。"""

class PagerDutyNotificationHandler(HttpHandler):
    """PagerDuty Events API v2 に送る。発報は trigger、解消は同じ dedup_key の resolve。

    Args:
        routing_key: 32 文字の Integration Key。
        region: ``us`` または ``eu``。``base_url`` を渡すとそちらを使う。
        min_severity: これより低い重大度では人を呼ばない。
    """
    name = 'pagerduty'

    def __init__(self, routing_key: str, *, source: str='llm-app', region: str='us', base_url: str | None=None, min_severity: AlertSeverity | str=AlertSeverity.ERROR, **http: Any) -> None:
        self.min_severity: AlertSeverity
        self.poster: HttpPoster
        self._changes: HttpPoster

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Events API v2 の本文。項目ごとの上限と、全体の 512 KB を守る。"""

    def _event(self, alert: Alert, limit: int) -> dict[str, Any]:
        ...

    def change_event(self, summary: str, *, details: Mapping[str, Any] | None=None, at: datetime | None=None) -> Delivery:
        """リリースやロールバックを変更イベントとして記録する(人は呼ばれない)。"""

class ConsoleNotificationHandler(NotificationHandler):
    """1 行の文にして渡す(既定は標準出力)。開発用であり、最後の頼みの綱でもある。

    端末の文字コードで書けない文字は「?」になる(書けないからといって、アラートを失わない)。
    """
    name = 'console'

    def __init__(self, write: Callable[[str], object] | None=None) -> None:
        self._write = write

    def deliver(self, alert: Alert) -> Delivery:
        """書き出す。"""
Route = tuple[Mapping[str, str], Sequence[str]]

class MultiChannelNotifier:
    """重大度ごとの経路に従い、複数の通知先へ並行して送る。

    >>> notifier = MultiChannelNotifier().add_handler("console", ConsoleNotificationHandler())
    >>> notifier.set_severity_routing({"critical": ["console"]})
    >>> [d.ok for d in notifier.notify([])]
    []
    """

    def __init__(self, *, fallback: NotificationHandler | None=None) -> None:
        self._handlers: dict[str, NotificationHandler]
        self._routes: list[tuple[dict[str, str], tuple[str, ...]]]

    def add_handler(self, name: str, handler: NotificationHandler) -> MultiChannelNotifier:
        """通知先を加える。"""

    def set_severity_routing(self, routing: Mapping[AlertSeverity | str, Sequence[str]]) -> None:
        """重大度 -> 通知先の名前。書かなかった重大度は全部の通知先へ送る。"""

    def set_routes(self, routes: Iterable[Route]) -> None:
        """(条件, 通知先の名前) の列。上から見て、最初に合ったものだけを使う。

        Raises:
            NotificationConfigError: 知らない通知先がある、または最後が無条件(``{}``)でない。
        """

    def _checked(self, routes: Iterable[Route]) -> list[tuple[dict[str, str], tuple[str, ...]]]:
        ...

    def route(self, alert: Alert) -> tuple[str, ...]:
        """このアラートの通知先の名前。"""

    def notify(self, alerts: Alert | Iterable[Alert], *, only: Iterable[str] | None=None) -> list[Delivery]:
        """送って、通知先ごとの結果を返す。どの通知先にも届かなければ fallback に渡す。

        通知先ごとに一つのスレッドで、渡された順に送る。遅い通知先が他を待たせることはない。
        """

    def keep_alive(self, alerts: Sequence[Alert]) -> list[Delivery]:
        """発報中のアラートを、毎回の送り直しが必要な通知先(Alertmanager)へ送る。"""

    def _send_all(self, name: str, alerts: Sequence[Alert]) -> list[Delivery]:
        ...

    def _send(self, handler: NotificationHandler, alert: Alert) -> Delivery:
        ...

    def _rescue(self, alerts: Sequence[Alert], deliveries: Sequence[Delivery]) -> list[Delivery]:
        """誰にも届かなかったものを fallback へ。解消を送らない設定の通知先は、届いたとみなす。"""

def notifier_from_config(config: AlertConfig, environ: Mapping[str, str] | None=None) -> MultiChannelNotifier:
    """設定の ``receivers`` と ``routes`` から組み立てる。

    Args:
        environ: 秘密を読む環境変数。省略すると ``os.environ``。

    Raises:
        NotificationConfigError: 通知先か経路の誤り、または環境変数がない。すべてを挙げる。
    """

def main() -> None:
    """429 を返す Slack、PagerDuty の発報と解消、壊れた通知先を、手元の受信サーバーで試す。"""
