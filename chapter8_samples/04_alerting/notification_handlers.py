"""8.4.2 アラートの通知(Slack、PagerDuty、複数チャネル)。

通知では、届くこと、一度だけ届くこと、秘密を漏らさないことを同時に満たす。一つの通知先が壊れても、
遅くても、他への通知は遅れない。すべてが壊れたらログに残す。経路を書き忘れた重大度は、捨てずに
全部の通知先へ送る。

実行::

    $ python chapter8_samples/04_alerting/notification_handlers.py
    発報 slack    試行 2 回 届いた
    発報 oncall   試行 1 回 届いた
    発報 retired  試行 1 回 失敗: HTTP 404 from 127.0.0.1: no_service
    解消 slack    試行 1 回 届いた
    解消 oncall   試行 1 回 届いた
    解消 retired  試行 1 回 失敗: HTTP 404 from 127.0.0.1: no_service
    Slack: [発報] CRITICAL high_error_rate 直近 5 分のエラー率が 21% です
    Slack: [解消] CRITICAL high_error_rate 発報時の内容: 直近 5 分のエラー率が 21% です
    PagerDuty: trigger 6af2895aba1e043ee1500c50bddab5e3
    PagerDuty: resolve 6af2895aba1e043ee1500c50bddab5e3

Databricks でもそのまま使う。URL とキーはシークレットから環境変数に入れて渡す。
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from typing import Any

from chapter8_samples.alerting.delivery import (
    Alert,
    AlertSeverity,
    AlertStatus,
    Delivery,
    Fanout,
    HttpHandler,
    HttpPoster,
    NotificationConfigError,
    NotificationHandler,
    encodable,
    handlers_from_config,
    json_bytes,
    one_line,
    pagerduty_event,
    pagerduty_payload,
    slack_message,
    unreached,
)
from chapter8_samples.alerting.rules import AlertConfig

logger = logging.getLogger(__name__)

PAGERDUTY_URLS = {"us": "https://events.pagerduty.com", "eu": "https://events.eu.pagerduty.com"}


class SlackNotificationHandler(HttpHandler):
    """Slack の Incoming Webhook に送る。

    Slack には重複を捨てる鍵がないので、届いたかもしれない失敗(読み取りタイムアウト)は再送しない。
    """

    name = "slack"

    def __init__(self, webhook_url: str, **http: Any) -> None:
        self.poster = HttpPoster(webhook_url, idempotent=False, **http)

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Block Kit の本文。"""
        return slack_message(alert)


class PagerDutyNotificationHandler(HttpHandler):
    """PagerDuty Events API v2 に送る。発報は trigger、解消は同じ dedup_key の resolve。

    ``routing_key`` は 32 文字の Integration Key、``region`` は ``us`` か ``eu``。重大度が
    ``min_severity`` より低ければ、人を呼ばない。
    """

    name = "pagerduty"

    def __init__(
        self,
        routing_key: str,
        *,
        source: str = "llm-app",
        region: str = "us",
        base_url: str | None = None,
        min_severity: AlertSeverity | str = AlertSeverity.ERROR,
        **http: Any,
    ) -> None:
        if not base_url and region not in PAGERDUTY_URLS:
            raise NotificationConfigError(f"region must be 'us' or 'eu', got {region!r}")
        base = (base_url or PAGERDUTY_URLS[region]).rstrip("/")
        options: dict[str, Any] = {"secrets": [routing_key], **http}
        self._routing_key = routing_key
        self.source = source
        self.min_severity = AlertSeverity(min_severity)
        self.poster = HttpPoster(f"{base}/v2/enqueue", idempotent=True, **options)
        self._changes = HttpPoster(f"{base}/v2/change/enqueue", idempotent=False, **options)

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Events API v2 の本文。"""
        return {"routing_key": self._routing_key, **pagerduty_event(alert, self.source)}

    def change_event(
        self, summary: str, *, details: Mapping[Any, Any] | None = None, at: datetime | None = None
    ) -> Delivery:
        """リリースやロールバックを変更イベントとして記録する(人は呼ばれない)。

        ``details`` は、上限に収まる長さに切り、JSON にならない値は文字列にして送る。
        """
        fields = {
            "source": self.source,
            "timestamp": (at or datetime.now(timezone.utc)).isoformat(),
        }
        payload = pagerduty_payload(summary, fields, details or {})
        body = json_bytes({"routing_key": self._routing_key, "payload": payload})
        return Delivery(handler=self.name, fingerprint="", **self._changes.post(body))


class ConsoleNotificationHandler(NotificationHandler):
    """1 行の文にして渡す(既定は標準出力)。開発用と、どの通知先にも届かないときのためにある。

    端末の文字コードで書けない文字は「?」になる。
    """

    name = "console"

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self._write = write

    def deliver(self, alert: Alert) -> Delivery:
        """書き出す。"""
        line = one_line(alert)
        if self._write:
            self._write(line)
        else:
            print(encodable(line, sys.stdout.encoding or "utf-8"))
        return self.result(alert, ok=True)


class MultiChannelNotifier(Fanout):
    """重大度ごとの経路に従い、複数の通知先へ並行して送る。

    Args:
        fallback: どの通知先にも届かなかったときの通知先(既定はログ)。
        wait_seconds: ``notify`` が待つ上限。済まないものは ``pending`` で返り、送信は続く。
    """

    def __init__(
        self, *, fallback: NotificationHandler | None = None, wait_seconds: float = 5.0
    ) -> None:
        super().__init__(fallback or ConsoleNotificationHandler(logger.error))
        self.wait_seconds = wait_seconds

    def set_severity_routing(self, routing: Mapping[AlertSeverity | str, Sequence[str]]) -> None:
        """重大度 -> 通知先の名前。書かなかった重大度は全部の通知先へ送る。"""
        routes = [({"severity": AlertSeverity(k).value}, names) for k, names in routing.items()]
        self.set_routes(routes)

    def notify(
        self,
        alerts: Alert | Iterable[Alert],
        *,
        only: Mapping[str, Collection[str]] | None = None,
    ) -> list[Delivery]:
        """送って、通知先ごとの結果を返す。どの通知先にも届かなければ fallback に渡す。

        ``only`` は、送り直すものの ``fingerprint`` と、まだ受け取っていない通知先の名前
        (``pending`` だったものは、結果だけを返す)。
        """
        alerts = [alerts] if isinstance(alerts, Alert) else list(alerts)
        owed = only or {}
        targets = [(alert, self.targets(alert, owed.get(alert.fingerprint))) for alert in alerts]
        deliveries = self.send_to(targets, self.wait_seconds, again=owed)
        return deliveries + [self.fallback.send(a) for a in unreached(alerts, deliveries)]

    def keep_alive(self, alerts: Sequence[Alert]) -> list[Delivery]:
        """発報中のアラートを、毎回の送り直しが必要な通知先(Alertmanager)へ送る。"""
        ready = {
            name
            for name, queue in self.queues.items()
            if queue.handler.wants_every_cycle and not queue.busy
        }
        targets = [(alert, ready & set(self.route(alert))) for alert in alerts]
        return self.send_to(targets, self.wait_seconds)


def notifier_from_config(
    config: AlertConfig, environ: Mapping[str, str] | None = None
) -> MultiChannelNotifier:
    """設定の ``receivers`` と ``routes`` から組み立てる。秘密は ``environ``(環境変数)から読む。

    Raises:
        NotificationConfigError: 通知先か経路の誤り、または環境変数がない。すべてを挙げる。
    """
    makers: dict[str, Callable[..., NotificationHandler]] = {
        "console": ConsoleNotificationHandler,
        "pagerduty": PagerDutyNotificationHandler,
        "slack": lambda url: SlackNotificationHandler(url),  # YAML の項目名は url
    }
    notifier = MultiChannelNotifier()
    for name, handler in handlers_from_config(config, makers, environ).items():
        notifier.add_handler(name, handler)
    if config.routes:
        notifier.set_routes([(dict(r.get("match", {})), r["to"]) for r in config.routes])
    return notifier


def main() -> None:
    """429 を返す Slack、PagerDuty の発報と解消、壊れた通知先を、手元の受信サーバーで試す。"""
    from chapter8_samples._lab.servers.receivers import Answer, WebhookReceiver

    alert = Alert(
        name="high_error_rate",
        summary="直近 5 分のエラー率が 21% です",
        severity=AlertSeverity.CRITICAL,
        metric="error_rate",
        value=0.21,
        labels={"service": "support-bot"},
    )
    with WebhookReceiver() as slack, WebhookReceiver() as pagerduty, WebhookReceiver() as broken:
        slack.script(Answer(429, {"Retry-After": "1"}))
        broken.script(Answer(404, body=b"no_service"), Answer(404, body=b"no_service"))
        notifier = MultiChannelNotifier(wait_seconds=30)
        notifier.add_handler("slack", SlackNotificationHandler(f"{slack.url}/services/T/B/X"))
        oncall = PagerDutyNotificationHandler("R" * 32, base_url=pagerduty.url)
        notifier.add_handler("oncall", oncall)
        notifier.add_handler("retired", SlackNotificationHandler(f"{broken.url}/services/T/B/Y"))
        resolved = replace(alert, status=AlertStatus.RESOLVED, value=0.01)
        for label, event in (("発報", alert), ("解消", resolved)):
            for delivery in notifier.notify(event):
                result = "届いた" if delivery.ok else f"失敗: {delivery.error}"
                print(f"{label} {delivery.handler:8} 試行 {delivery.attempts} 回 {result}")
        for request in slack.received[1:]:  # 最初の 1 回は、429 で拒否された
            print("Slack:", request.json["text"])
        for request in pagerduty.received:
            print("PagerDuty:", request.json["event_action"], request.json["dedup_key"])


if __name__ == "__main__":
    main()
