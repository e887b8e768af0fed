"""8.4.2 そのほかの通知先(Teams、メール、Alertmanager)と、設定からの組み立て。

Teams の O365 コネクターは廃止されたので、ワークフローの URL に Adaptive Card を送る。
Alertmanager に渡せば、グループ化、抑制、サイレンスの運用を任せられる。秘密は環境変数からだけ読む。

Databricks では、シークレットを環境変数に入れてジョブを動かす。
"""

from __future__ import annotations

import os
import re
import smtplib
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from datetime import datetime, timedelta, timezone
from email.message import EmailMessage
from email.utils import make_msgid, parseaddr
from itertools import islice
from typing import Any

from ..rules import AlertConfig
from .alert import (
    Alert,
    AlertStatus,
    Delivery,
    NotificationConfigError,
    NotificationHandler,
)
from .posting import HttpHandler, HttpPoster
from .signature import SignedWebhookNotificationHandler
from .texts import encodable, facts, headline, json_bytes, links

TEAMS_MAX_BYTES = 21_000
"""Teams の上限は 28 KB だが、実際にはこのあたりから拒否される。"""


class TeamsNotificationHandler(HttpHandler):
    """Teams のワークフロー(Webhook のリクエストを受信したとき)に Adaptive Card を送る。"""

    name = "teams"

    def __init__(self, workflow_url: str, **http: Any) -> None:
        self.poster = HttpPoster(workflow_url, idempotent=False, **http)

    def payload(self, alert: Alert) -> dict[str, Any]:
        """カードの JSON。大きすぎるときは、表と説明を削る。"""
        for limit in (2000, 200):
            card = self._card(alert, limit)
            if len(json_bytes(card)) <= TEAMS_MAX_BYTES:
                return card
        return self._card(alert, 20)

    def _card(self, alert: Alert, limit: int) -> dict[str, Any]:
        table = [{"title": k[:100], "value": v[:limit]} for k, v in islice(facts(alert), 20)]
        body: list[dict[str, Any]] = [
            {"type": "TextBlock", "text": headline(alert)[:200], "weight": "Bolder", "wrap": True},
            {"type": "TextBlock", "text": alert.summary[:limit] or "-", "wrap": True},
            {"type": "FactSet", "facts": table},
        ]
        if (notes := _markdown_links(alert)) and limit > 20:
            body.append({"type": "TextBlock", "text": notes, "wrap": True})
        card = {
            "$schema": "http://adaptivecards.io/schemas/adaptive-card.json",
            "type": "AdaptiveCard",
            "version": "1.4",
            "body": body,
        }
        kind = "application/vnd.microsoft.card.adaptive"
        attachment = {"contentType": kind, "contentUrl": None, "content": card}
        return {"type": "message", "attachments": [attachment]}


def _markdown_links(alert: Alert) -> str:
    notes: list[str] = []
    for name, url in links(alert)[:6]:
        short = name[:100]
        notes.append(f"[{short}]({url})" if 0 < len(url) <= 900 else short)
    return " / ".join(notes)


class AlertmanagerNotificationHandler(HttpHandler):
    """Prometheus Alertmanager の API v2 に送る。

    発報中は評価のたびに送り直し、``endsAt`` を ``hold`` だけ延ばす。評価が止まれば自然に解消する。
    """

    name = "alertmanager"
    wants_every_cycle = True

    def __init__(
        self,
        url: str,
        *,
        hold: timedelta = timedelta(minutes=5),
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        **http: Any,
    ) -> None:
        self.hold = hold
        self._clock = clock
        self.poster = HttpPoster(f"{url.rstrip('/')}/api/v2/alerts", idempotent=True, **http)

    def payload(self, alert: Alert) -> Any:
        """API v2 のアラートの列(1 件)。"""
        now = self._clock()
        ends_at = now + self.hold
        if alert.status is AlertStatus.RESOLVED:
            ends_at = min(alert.ends_at or now, now)  # 進んでいた時計の時刻では、終わらない
        labels = {label_name(key): value for key, value in alert.labels.items()}
        labels |= {"alertname": alert.name, "severity": alert.severity.value}
        annotations = {"summary": alert.summary, "examples": " ".join(alert.examples)}
        if alert.value is not None:
            annotations["value"] = f"{alert.value:.6g}"
        if alert.runbook_url:
            annotations["runbook_url"] = alert.runbook_url
        return [
            {
                "labels": labels,
                "annotations": {k: v for k, v in annotations.items() if v},
                "startsAt": min(alert.starts_at, now).isoformat(),
                "endsAt": ends_at.isoformat(),
                "generatorURL": next(iter(alert.links.values()), ""),
            }
        ]


def label_name(key: str) -> str:
    """Prometheus のラベルの名前(英数字と ``_``)にする。ほかの文字があると、400 で拒否される。

    >>> label_name("team-name")
    'team_name'
    """
    return re.sub(r"\W|^(?=\d)", "_", key, flags=re.ASCII)


@dataclass(eq=False)
class EmailNotificationHandler(NotificationHandler):
    """SMTP で送る。

    Args:
        tls: ``starttls``(証明書も確かめる)、``implicit``(始めから TLS)、``none``。省略すると、
            ポート 465 は ``implicit``、ほかは ``starttls``。
    """

    name = "email"
    host: str
    _: KW_ONLY
    sender: str
    to: Sequence[str]
    port: int = 587
    user: str = ""
    password: str = field(default="", repr=False)
    tls: str = ""
    timeout_seconds: float = 10.0
    clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc)

    def __post_init__(self) -> None:
        self.tls = self.tls or ("implicit" if self.port == 465 else "starttls")
        if self.tls not in ("starttls", "implicit", "none"):
            raise NotificationConfigError(
                f"tls must be starttls, implicit or none, got {self.tls!r}"
            )
        if isinstance(self.to, str) or not self.to:
            raise NotificationConfigError(f"to must be a list of addresses, got {self.to!r}")
        if broken := [one for one in (self.sender, *self.to) if one.splitlines() != [one]]:
            raise NotificationConfigError(f"an address must be one line, got {broken[0]!r}")

    def message(self, alert: Alert) -> EmailMessage:
        """送る文面。同じアラートのメールは一つのスレッドにまとまる。"""
        mail = EmailMessage()
        mail["Subject"] = encodable(" ".join(f"{headline(alert)} {alert.summary}".split())[:200])
        mail["From"] = self.sender
        mail["To"] = ", ".join(self.to)
        mail["Date"] = self.clock()
        domain = parseaddr(self.sender)[1].rpartition("@")[2]
        mail["Message-ID"] = make_msgid(domain=domain or "alerts.invalid")
        mail["References"] = f"<{alert.fingerprint}@alerts.invalid>"
        rows = list(facts(alert))
        rows += [(name, url) if url else ("トレース", name) for name, url in links(alert)]
        lines = [f"{key}: {value}" for key, value in rows]
        mail.set_content(encodable("\n".join([alert.summary, "", *lines])))
        return mail

    def deliver(self, alert: Alert) -> Delivery:
        """送る。接続できないときは、後で送り直せる失敗になる。"""
        refused: dict[str, Any] | None = None
        try:
            with self._connect() as server:
                if self.tls == "starttls":
                    server.starttls(context=ssl.create_default_context())
                if self.user:
                    server.login(self.user, self.password)
                refused = server.send_message(self.message(alert))
        except (OSError, smtplib.SMTPException) as error:
            if refused is None:  # 受け取られた後の失敗(QUIT への答えなど)では、送り直さない
                reason = f"{type(error).__name__} from {self.host}"
                return self.result(alert, ok=False, error=reason, retryable=_may_retry(error))
        # 一部の宛先だけが拒否された: 送り直すと、届いた宛先に二重に届く
        note = f"refused: {', '.join(sorted(refused))}" if refused else ""
        return self.result(alert, ok=True, error=note)

    def _connect(self) -> smtplib.SMTP:
        if self.tls == "implicit":
            context = ssl.create_default_context()
            return smtplib.SMTP_SSL(
                self.host, self.port, timeout=self.timeout_seconds, context=context
            )
        return smtplib.SMTP(self.host, self.port, timeout=self.timeout_seconds)


def _may_retry(error: Exception) -> bool:
    """SMTP の 4xx と、つながらない失敗は送り直せる。5xx と証明書の誤りは直らない。"""
    codes: list[int] = [getattr(error, "smtp_code", 0)]
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        codes = [code for code, _ in error.recipients.values()]
    lasting = (smtplib.SMTPNotSupportedError, ssl.SSLCertVerificationError)
    return not isinstance(error, lasting) and any(code < 500 for code in codes)


Makers = Mapping[str, Callable[..., NotificationHandler]]
"""設定の ``type`` -> 通知先を作る関数。引数は、設定の項目(``url_env`` は ``url``)。"""
MAKERS: Makers = {
    "alertmanager": AlertmanagerNotificationHandler,
    "email": EmailNotificationHandler,
    "teams": lambda url: TeamsNotificationHandler(url),
    "webhook": SignedWebhookNotificationHandler,
}
SHARED = {"min_severity", "send_resolved"}
"""どの通知先にもある設定。"""


def handlers_from_config(
    config: AlertConfig, makers: Makers, environ: Mapping[str, str] | None = None
) -> dict[str, NotificationHandler]:
    """設定の ``receivers`` から、名前 -> 通知先を作る。なければ ``console`` だけ。

    Args:
        makers: ``MAKERS`` にない種類(``slack``、``pagerduty``、``console``)の作り方。
        environ: 秘密を読む環境変数。省略すると ``os.environ``。

    Raises:
        NotificationConfigError: 通知先か経路の誤り、または環境変数がない。すべてを挙げる。
    """
    environ = os.environ if environ is None else environ
    found: dict[str, NotificationHandler] = {}
    unset: list[str] = []
    for name, settings in (config.receivers or {"console": {"type": "console"}}).items():
        missing = [v for k, v in settings.items() if k.endswith("_env") and not environ.get(str(v))]
        unset += [f"{variable} (receiver {name})" for variable in missing]
        if not missing:
            make = {**MAKERS, **makers}[settings["type"]]
            found[name] = _handler(make, settings, environ, config)
    if unset:
        raise NotificationConfigError(f"environment variables are not set: {', '.join(unset)}")
    return found


def _handler(
    make: Callable[..., NotificationHandler],
    settings: Mapping[str, Any],
    environ: Mapping[str, str],
    config: AlertConfig,
) -> NotificationHandler:
    arguments: dict[str, Any] = {}
    for key, value in settings.items():
        if key.endswith("_env"):
            arguments[key.removesuffix("_env")] = environ[value]
        elif key != "type" and key not in SHARED:
            arguments[key] = value
    if settings["type"] == "alertmanager":
        arguments["hold"] = config.hold
    handler = make(**arguments)
    for key in SHARED.intersection(settings):
        setattr(handler, key, settings[key])
    return handler
