"""8.4.2 アラートの通知(Slack、PagerDuty、複数チャネル)。

通知は、届くこと、一度だけ届くこと、秘密を漏らさないことを同時に守る。一つの通知先が壊れても他は届き、
すべてが壊れたらログに残る。経路を書き忘れた重大度は、捨てずに全部の通知先へ送る。

実行::

    $ python chapter8_samples/04_alerting/notification_handlers.py
    slack    試行 2 回 届いた
    oncall   試行 1 回 届いた
    retired  試行 1 回 失敗: HTTP 404 from 127.0.0.1: no_service
    slack    試行 1 回 届いた
    oncall   試行 1 回 届いた
    retired  試行 1 回 失敗: HTTP 404 from 127.0.0.1: no_service
    Slack: [解消] CRITICAL high_error_rate 発報時の内容: 直近 5 分のエラー率が 21% です
    PagerDuty: trigger 6af2895aba1e043ee1500c50bddab5e3
    PagerDuty: resolve 6af2895aba1e043ee1500c50bddab5e3

Databricks でもそのまま使う。URL とキーはシークレットから環境変数に入れて渡す。
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice
from typing import Any

from chapter8_samples.alerting.delivery import (
    Alert,
    AlertSeverity,
    AlertStatus,
    Delivery,
    HttpHandler,
    HttpPoster,
    NotificationConfigError,
    NotificationHandler,
    encodable,
    handlers_from_config,
    json_bytes,
)
from chapter8_samples.alerting.rules import AlertConfig

logger = logging.getLogger(__name__)

PAGERDUTY_URLS = {
    "us": "https://events.pagerduty.com",
    "eu": "https://events.eu.pagerduty.com",
}
PAGERDUTY_MAX_BYTES = 500_000
"""イベントの上限は 512 KB。"""
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def slack_escape(text: str, limit: int) -> str:
    """Slack の制御文字を無害にし、エスケープ後の長さを ``limit`` 文字以内にする。

    >>> slack_escape("<!channel> a & b", 100)
    '&lt;!channel&gt; a &amp; b'
    >>> slack_escape("<<<<", 9)
    '&lt;&lt;…'
    """
    pieces = [_ENTITIES.get(ch, ch) for ch in text[: limit + 1]]
    if sum(map(len, pieces)) <= limit:
        return "".join(pieces)
    kept, room = list[str](), limit - 1
    for piece in pieces:
        if (room := room - len(piece)) < 0:
            break
        kept.append(piece)
    return "".join(kept) + "…"


def clip(text: str, limit: int) -> str:
    """``limit`` 文字を超えたら切って「…」を付ける。"""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def headline(alert: Alert) -> str:
    """1 行の見出し。

    >>> headline(Alert(name="slow_p95", severity=AlertSeverity.CRITICAL))
    '[発報] CRITICAL slow_p95'
    """
    word = "発報" if alert.status is AlertStatus.FIRING else "解消"
    return f"[{word}] {alert.severity.value.upper()} {alert.name}"


def summary(alert: Alert) -> str:
    """本文の 1 文。解消では、書かれているのが発報したときの内容だと分かるようにする。"""
    resolved = alert.status is AlertStatus.RESOLVED and alert.summary
    return f"発報時の内容: {alert.summary}" if resolved else alert.summary


def facts(alert: Alert) -> Iterator[tuple[str, str]]:
    """表示する(見出し, 値)の列。値のない項目は省く。"""
    if alert.value is not None:
        yield alert.metric or "value", f"{alert.value:.6g}"
    if alert.threshold is not None:
        yield "しきい値", f"{alert.threshold:.6g}"
    if alert.n is not None:
        yield "標本数", str(alert.n)
    if alert.window_seconds is not None:
        yield "窓", f"{alert.window_seconds:g} 秒"
    yield "開始", alert.starts_at.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    yield from alert.labels.items()


def links(alert: Alert) -> list[tuple[str, str]]:
    """手順書とトレースへのリンク(表示名, URL)。"""
    runbook = [("runbook", alert.runbook_url)] if alert.runbook_url else []
    return runbook + list(alert.links.items())


def slack_message(alert: Alert) -> dict[str, Any]:
    """Incoming Webhook の本文。Slack の文字数とブロック数の上限を守る。"""
    fields = [
        {"type": "mrkdwn", "verbatim": True, "text": slack_escape(f"*{k}*\n{v}", 2000)}
        for k, v in facts(alert)
    ]
    notes = [_slack_link(name, url) for name, url in links(alert)[:5]]
    notes += ["トレース " + slack_escape(trace, 60) for trace in alert.examples[:5]]
    blocks: list[dict[str, Any]] = [
        {"type": "header", "text": {"type": "plain_text", "text": clip(headline(alert), 150)}},
        {"type": "section", "fields": fields[:10]},
    ]
    if alert.summary:
        text = {"type": "mrkdwn", "verbatim": True, "text": slack_escape(summary(alert), 3000)}
        blocks.insert(1, {"type": "section", "text": text})
    if notes:
        elements = [{"type": "mrkdwn", "verbatim": True, "text": note} for note in notes]
        blocks.append({"type": "context", "elements": elements})
    text = slack_escape(f"{headline(alert)} {summary(alert)}".strip(), 3000)
    return {"text": text, "blocks": blocks}


def _slack_link(name: str, url: str) -> str:
    """リンク。長すぎる URL は、切ると別の場所を指すので、名前だけにする。"""
    target, label = slack_escape(url.replace("|", "%7C"), 900), slack_escape(name, 60)
    return f"<{target}|{label}>" if target and not target.endswith("…") else label


class SlackNotificationHandler(HttpHandler):
    """Slack の Incoming Webhook に送る。

    Slack には重複を捨てる鍵がないので、届いたかもしれない失敗(読み取りタイムアウト)は再送しない。
    """

    name = "slack"

    def __init__(self, webhook_url: str, *, send_resolved: bool = True, **http: Any) -> None:
        self.send_resolved = send_resolved
        self.poster = HttpPoster(webhook_url, idempotent=False, **http)

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Block Kit の本文。"""
        return slack_message(alert)


class PagerDutyNotificationHandler(HttpHandler):
    """PagerDuty Events API v2 に送る。発報は trigger、解消は同じ dedup_key の resolve。

    Args:
        routing_key: 32 文字の Integration Key。
        region: ``us`` または ``eu``。``base_url`` を渡すとそちらを使う。
        min_severity: これより低い重大度では人を呼ばない。
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
        options: dict[str, Any] = {"secrets": [routing_key], "per_second": 2.0, **http}
        self._routing_key, self.source = routing_key, source
        self.min_severity = AlertSeverity(min_severity)
        self.poster = HttpPoster(f"{base}/v2/enqueue", idempotent=True, **options)
        self._changes = HttpPoster(f"{base}/v2/change/enqueue", idempotent=False, **options)

    def payload(self, alert: Alert) -> dict[str, Any]:
        """Events API v2 の本文。項目ごとの上限と、全体の 512 KB を守る。"""
        event = self._event(alert, 1024)
        too_large = len(json.dumps(event)) > PAGERDUTY_MAX_BYTES
        return self._event(alert, 100) if too_large else event

    def _event(self, alert: Alert, limit: int) -> dict[str, Any]:
        event: dict[str, Any] = {
            "routing_key": self._routing_key,
            "event_action": "trigger" if alert.status is AlertStatus.FIRING else "resolve",
            "dedup_key": alert.fingerprint[:255],
        }
        if alert.status is AlertStatus.RESOLVED:
            return event
        event["payload"] = {
            "summary": clip(f"{alert.name}: {alert.summary or alert.metric}", 1024),
            "source": clip(alert.labels.get("service") or self.source, 255),
            "severity": alert.severity.value,
            "timestamp": alert.starts_at.isoformat(),
            "custom_details": {
                clip(k, min(limit, 255)): clip(v, limit) for k, v in islice(facts(alert), 50)
            }
            | {"examples": [clip(trace, 255) for trace in alert.examples[:10]]},
        }
        event["links"] = [
            {"text": clip(k, 255), "href": url} for k, url in links(alert)[:10] if len(url) <= 2000
        ]
        return event

    def change_event(
        self, summary: str, *, details: Mapping[str, Any] | None = None, at: datetime | None = None
    ) -> Delivery:
        """リリースやロールバックを変更イベントとして記録する(人は呼ばれない)。"""
        payload = {
            "summary": clip(summary, 1024),
            "source": self.source,
            "timestamp": (at or datetime.now(timezone.utc)).isoformat(),
            "custom_details": json.loads(json.dumps(dict(details or {}), default=str)),
        }
        event = {"routing_key": self._routing_key, "payload": payload}
        body = json_bytes(event)
        return Delivery(handler=self.name, fingerprint="", **self._changes.post(body))


class ConsoleNotificationHandler(NotificationHandler):
    """1 行の文にして渡す(既定は標準出力)。開発用であり、最後の頼みの綱でもある。

    端末の文字コードで書けない文字は「?」になる(書けないからといって、アラートを失わない)。
    """

    name = "console"

    def __init__(self, write: Callable[[str], object] | None = None) -> None:
        self._write = write

    def deliver(self, alert: Alert) -> Delivery:
        """書き出す。"""
        parts = ", ".join(f"{key} {value}" for key, value in list(facts(alert))[:3])
        text = " ".join(filter(None, [headline(alert), summary(alert), f"({parts})"]))
        line = encodable(" ".join(text.split()))
        if self._write:
            self._write(line)
        else:
            sys.stdout.write(encodable(line, sys.stdout.encoding or "utf-8") + "\n")
        return self.result(alert, ok=True)


Route = tuple[Mapping[str, str], Sequence[str]]
"""(条件, 通知先の名前)。"""


class MultiChannelNotifier:
    """重大度ごとの経路に従い、複数の通知先へ並行して送る。

    >>> notifier = MultiChannelNotifier().add_handler("console", ConsoleNotificationHandler())
    >>> notifier.set_severity_routing({"critical": ["console"]})
    >>> [d.ok for d in notifier.notify([])]
    []
    """

    def __init__(self, *, fallback: NotificationHandler | None = None) -> None:
        self._handlers: dict[str, NotificationHandler] = {}
        self._routes: list[tuple[dict[str, str], tuple[str, ...]]] = []
        self._fallback = fallback or ConsoleNotificationHandler(logger.error)
        self._lock = threading.Lock()
        self.failures = 0
        """これまでに失敗した配送の数。"""

    def add_handler(self, name: str, handler: NotificationHandler) -> MultiChannelNotifier:
        """通知先を加える。"""
        if name in self._handlers:
            raise NotificationConfigError(f"handler {name!r} is already registered")
        handler.name = name
        self._handlers[name] = handler
        return self

    def set_severity_routing(self, routing: Mapping[AlertSeverity | str, Sequence[str]]) -> None:
        """重大度 -> 通知先の名前。書かなかった重大度は全部の通知先へ送る。"""
        by_severity = [({"severity": AlertSeverity(k).value}, n) for k, n in routing.items()]
        self._routes = self._checked(by_severity)

    def set_routes(self, routes: Iterable[Route]) -> None:
        """(条件, 通知先の名前) の列。上から見て、最初に合ったものだけを使う。

        Raises:
            NotificationConfigError: 知らない通知先がある、または最後が無条件(``{}``)でない。
        """
        table = self._checked(routes)
        if not table or table[-1][0]:
            raise NotificationConfigError("the last route must match everything: ({}, [...])")
        self._routes = table

    def _checked(self, routes: Iterable[Route]) -> list[tuple[dict[str, str], tuple[str, ...]]]:
        table = [(dict(match), tuple(names)) for match, names in routes]
        unknown = sorted({n for _, names in table for n in names} - self._handlers.keys())
        if unknown:
            known = ", ".join(sorted(self._handlers)) or "none"
            raise NotificationConfigError(f"unknown handlers {unknown}; registered: {known}")
        return table

    def route(self, alert: Alert) -> tuple[str, ...]:
        """このアラートの通知先の名前。"""
        matching = (names for match, names in self._routes if alert.matches(match))
        return next(matching, tuple(self._handlers))

    def notify(
        self, alerts: Alert | Iterable[Alert], *, only: Iterable[str] | None = None
    ) -> list[Delivery]:
        """送って、通知先ごとの結果を返す。どの通知先にも届かなければ fallback に渡す。

        通知先ごとに一つのスレッドで、渡された順に送る。遅い通知先が他を待たせることはない。
        """
        alerts = [alerts] if isinstance(alerts, Alert) else list(alerts)
        names = set(self._handlers if only is None else only)
        jobs = {n: [a for a in alerts if n in self.route(a)] for n in self._handlers if n in names}
        jobs = {name: batch for name, batch in jobs.items() if batch}
        with ThreadPoolExecutor(max_workers=max(1, len(jobs))) as pool:
            batches = pool.map(self._send_all, jobs.keys(), jobs.values())
            deliveries = [delivery for batch in batches for delivery in batch]
        wanted = [a for a in alerts if only is None or names & set(self.route(a))]
        return deliveries + self._rescue(wanted, deliveries)

    def keep_alive(self, alerts: Sequence[Alert]) -> list[Delivery]:
        """発報中のアラートを、毎回の送り直しが必要な通知先(Alertmanager)へ送る。"""
        names = [n for n, h in self._handlers.items() if h.wants_every_cycle]
        return self.notify(alerts, only=names) if names and alerts else []

    def _send_all(self, name: str, alerts: Sequence[Alert]) -> list[Delivery]:
        return [self._send(self._handlers[name], alert) for alert in alerts]

    def _send(self, handler: NotificationHandler, alert: Alert) -> Delivery:
        try:
            delivery = handler.send(alert)
        except Exception as error:  # 一つのハンドラーの誤りで他を止めない
            logger.error("handler %s raised %s", handler.name, type(error).__name__)
            delivery = handler.result(alert, ok=False, error=f"raised {type(error).__name__}")
        if not delivery.ok:
            with self._lock:
                self.failures += 1
            logger.warning("alert %s not sent by %s: %s", alert.name, handler.name, delivery.error)
        return delivery

    def _rescue(self, alerts: Sequence[Alert], deliveries: Sequence[Delivery]) -> list[Delivery]:
        """誰にも届かなかったものを fallback へ。解消を送らない設定の通知先は、届いたとみなす。"""
        reached = {d.fingerprint for d in deliveries if d.ok and not d.skipped}
        skipped = {d.fingerprint for d in deliveries if d.skipped}
        lost = [
            alert
            for alert in alerts
            if alert.fingerprint not in reached
            and (alert.status is AlertStatus.FIRING or alert.fingerprint not in skipped)
        ]
        return [self._send(self._fallback, alert) for alert in lost]


def notifier_from_config(
    config: AlertConfig, environ: Mapping[str, str] | None = None
) -> MultiChannelNotifier:
    """設定の ``receivers`` と ``routes`` から組み立てる。

    Args:
        environ: 秘密を読む環境変数。省略すると ``os.environ``。

    Raises:
        NotificationConfigError: 通知先か経路の誤り、または環境変数がない。すべてを挙げる。
    """
    makers: dict[str, Callable[..., NotificationHandler]] = {
        "console": ConsoleNotificationHandler,
        "pagerduty": PagerDutyNotificationHandler,
        "slack": lambda url: SlackNotificationHandler(url),
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
        threshold=0.05,
        n=70,
        labels={"service": "support-bot"},
        examples=("tr-5f2c",),
    )
    with WebhookReceiver() as slack, WebhookReceiver() as pagerduty, WebhookReceiver() as broken:
        slack.script(Answer(429, {"Retry-After": "1"}))
        broken.script(Answer(404, body=b"no_service"), Answer(404, body=b"no_service"))
        notifier = MultiChannelNotifier()
        notifier.add_handler("slack", SlackNotificationHandler(f"{slack.url}/services/T/B/X"))
        notifier.add_handler(
            "oncall", PagerDutyNotificationHandler("R" * 32, base_url=pagerduty.url)
        )
        notifier.add_handler("retired", SlackNotificationHandler(f"{broken.url}/services/T/B/Y"))
        resolved = replace(alert, status=AlertStatus.RESOLVED, value=0.01)
        for delivery in [*notifier.notify(alert), *notifier.notify(resolved)]:
            result = "届いた" if delivery.ok else f"失敗: {delivery.error}"
            print(f"{delivery.handler:8} 試行 {delivery.attempts} 回 {result}")
        print("Slack:", slack.received[-1].json["text"])
        for request in pagerduty.received:
            print("PagerDuty:", request.json["event_action"], request.json["dedup_key"])


if __name__ == "__main__":
    main()
