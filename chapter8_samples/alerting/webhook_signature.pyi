"""8.4.3 署名付き Webhook: 送る、確かめる、MLflow の Webhook をアラートにする。"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Literal
from .alert_delivery import Alert, Delivery, HttpHandler, HttpPoster
Scheme = Literal['standard', 'mlflow']
HEADERS: Mapping[Scheme, tuple[str, str, str]] = {'standard': ('webhook-id', 'webhook-timestamp', 'webhook-signature'), 'mlflow': ('x-mlflow-delivery-id', 'x-mlflow-timestamp', 'x-mlflow-signature')}
TOLERANCE_SECONDS = 300
MAX_UNSETTLED = 1000

class WebhookRefusedError(ValueError):
    """受け取った Webhook を信じられない。``reason`` に一語の理由が入る。"""

    def __init__(self, reason: str) -> None:
        self.reason = reason

def sign(secret: str, message_id: str, timestamp: int | str, body: bytes, scheme: Scheme='standard') -> str:
    """``id.timestamp.body`` の HMAC-SHA256(``v1,`` に続けて base64)。"""

class ReplayGuard:
    """見た配送 ID を、許す時刻のずれの分だけ覚えておく。"""

    def __init__(self, limit: int=100000) -> None:
        self._seen: OrderedDict[str, float] = OrderedDict()
        self._limit, self._lock = (limit, threading.Lock())

    def first_time(self, message_id: str, now: float) -> bool:
        """初めて見た ID か。どのスレッドから呼んでもよい。"""

    def _remember(self, message_id: str, now: float) -> bool:
        ...

def verify_signature(secret: str, headers: Mapping[str, str], body: bytes, *, scheme: Scheme='standard', seen: ReplayGuard | None=None, now: float | None=None) -> str:
    """確かめて、配送 ID を返す。

    Args:
        body: 受け取ったままのバイト列。JSON に直してから戻したものでは署名が合わない。
        seen: 渡すと、同じ配送 ID を二度目から断る。

    Raises:
        NotificationConfigError: ``secret`` が空、または ``whsec_`` の後が base64 でない。
        WebhookRefusedError: 理由は missing_header、bad_timestamp、stale、bad_signature、replay。
    """

class SignedWebhookNotificationHandler(HttpHandler):
    """アラートを、Standard Webhooks の署名を付けて送る。受け手は ID で重複を捨てられる。"""
    name = 'webhook'

    def __init__(self, url: str, secret: str, *, clock: Callable[[], float]=time.time, **http: Any) -> None:
        self._secret, self._now = (secret, clock)
        self._unsettled: OrderedDict[tuple[str, ...], str] = OrderedDict()
        self.poster = HttpPoster(url, idempotent=True, secrets=[secret], **http)

    def payload(self, alert: Alert) -> dict[str, Any]:
        """アラートの全項目。"""

    def headers(self, alert: Alert, body: bytes) -> Mapping[str, str]:
        """署名のヘッダー。届いたか分からない通知を後で送り直すときは、前と同じ ID を使う。"""

    def deliver(self, alert: Alert) -> Delivery:
        """署名を付けて送る。"""

def alert_from_mlflow_webhook(payload: Mapping[str, Any]) -> Alert:
    """MLflow の Webhook(予算の超過、エイリアスの変更など)をアラートにする。

    予算の超過は error、そのほかは info。知らない種類も、捨てずに info のアラートにする。
    """

def main() -> None:
    """署名付きで送り、受け手の側で確かめる。書き換えと再送は断られる。"""
