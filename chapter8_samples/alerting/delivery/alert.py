"""8.4.2 アラートの型、配送の結果、通知先の基底クラス。"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any, final

logger = logging.getLogger(__name__)


class NotificationConfigError(ValueError):
    """通知先の設定(URL、キー、経路)に誤りがある。"""


class AlertSeverity(str, Enum):
    """重大度。PagerDuty Events API v2 の 4 段階と同じ名前。"""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"
    CRITICAL = "critical"

    @property
    def rank(self) -> int:
        """0(info)から 3(critical)までの順位。"""
        return list(AlertSeverity).index(self)


class AlertStatus(str, Enum):
    """発報中か、解消したか。"""

    FIRING = "firing"
    RESOLVED = "resolved"


def fingerprint(name: str, labels: Mapping[str, str]) -> str:
    """同じアラートを見分ける 32 文字。PagerDuty の dedup_key にもなる。"""
    text = json.dumps([name, sorted(labels.items())], ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Alert:
    """一つのアラート。発報と解消は ``fingerprint`` と ``starts_at`` が同じになる。"""

    name: str
    summary: str = ""
    severity: AlertSeverity = AlertSeverity.WARNING
    status: AlertStatus = AlertStatus.FIRING
    metric: str = ""
    value: float | None = None
    threshold: float | None = None
    n: int | None = None
    """値を求めた標本の数(トレースや評価の件数)。"""
    window_seconds: float | None = None
    starts_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    ends_at: datetime | None = None
    notified_at: datetime | None = None
    """知らせると決めた時刻。値の同じ繰り返しを、送り直しと区別する。"""
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    examples: tuple[str, ...] = ()
    """例となるトレースの ID。"""
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    """表示名 -> URL。"""
    runbook_url: str | None = None
    action: str | None = None
    fingerprint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "severity", AlertSeverity(self.severity))
        object.__setattr__(self, "status", AlertStatus(self.status))
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", fingerprint(self.name, self.labels))

    def matches(self, selector: Mapping[str, str]) -> bool:
        """ラベル、または ``name``、``severity``、``metric`` がすべて一致するか。"""
        own = {"name": self.name, "severity": self.severity.value, "metric": self.metric}
        return all({**self.labels, **own}.get(k) == v for k, v in selector.items())


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """一つのアラートを一つの通知先へ送った結果。"""

    handler: str
    fingerprint: str
    ok: bool
    attempts: int = 1
    error: str = ""
    retryable: bool = False
    """後で送り直してよい失敗か(届いたかもしれない失敗は False)。"""
    skipped: str = ""
    """送らなかった理由。送ったときは空。"""
    pending: bool = False
    """待つのをやめたが、まだ送っている。"""


class NotificationHandler(ABC):
    """通知先の基底クラス。``deliver`` を書けば、``send`` は例外を出さずに ``Delivery`` を返す。"""

    name: str = "handler"
    min_severity: AlertSeverity = AlertSeverity.INFO
    """これより低い重大度は送らない(結果の ``skipped`` に理由が入る)。"""
    send_resolved: bool = True
    wants_every_cycle: bool = False
    """発報中のアラートを評価のたびに送り直す必要があるか(Alertmanager)。"""

    @abstractmethod
    def deliver(self, alert: Alert) -> Delivery:
        """実際に送る。"""

    @final
    def send(self, alert: Alert) -> Delivery:
        """送るべきアラートなら送る。届かなければ、理由をログにも残す。"""
        if alert.severity.rank < self.min_severity.rank:
            reason = f"severity {alert.severity.value} is below {self.min_severity.value}"
            return self.result(alert, ok=True, attempts=0, skipped=reason)
        if alert.status is AlertStatus.RESOLVED and not self.send_resolved:
            return self.result(alert, ok=True, attempts=0, skipped="send_resolved is off")
        try:
            delivery = self.deliver(alert)
            problem = delivery.error  # 届いても、一部の宛先に拒否されていることがある
        except (Exception, SystemExit) as error:
            # 例外の文には URL やキーが入りうるので、型だけを残す
            problem = f"raised {type(error).__name__}"
            delivery = self.result(alert, ok=False, error=problem)
        if problem:
            logger.warning("alert %s not sent by %s: %s", alert.name, self.name, problem)
        return delivery

    def result(self, alert: Alert, **fields: Any) -> Delivery:
        """この通知先の ``Delivery``。"""
        return Delivery(handler=self.name, fingerprint=alert.fingerprint, **fields)
