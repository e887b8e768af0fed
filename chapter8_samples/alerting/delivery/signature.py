"""8.4.3 署名付き Webhook: 送る、確かめる。

誰でも呼べる Webhook をそのまま信じると、偽の通知でロールバックまで起こせる。署名と時刻と配送 ID を
確かめ、書き換え、古いもの、再送を拒否する。MLflow の Webhook の署名は Standard Webhooks と同じ。

Databricks の Webhook も同じ形なら使える。MLflow サーバーでは、再起動や複数ワーカーでも読めるように
``MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY`` を必ず固定する。
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Literal

from .alert import Alert, AlertStatus, Delivery, NotificationConfigError
from .posting import HttpHandler, HttpPoster

Event = tuple[datetime, AlertStatus]
Scheme = Literal["standard", "mlflow"]
HEADERS: Mapping[Scheme, tuple[str, str, str]] = {
    "standard": ("webhook-id", "webhook-timestamp", "webhook-signature"),
    "mlflow": ("x-mlflow-delivery-id", "x-mlflow-timestamp", "x-mlflow-signature"),
}
TOLERANCE_SECONDS = 300


class WebhookRefusedError(ValueError):
    """受け取った Webhook を信じられない。``reason`` に一語の理由が入る。"""

    def __init__(self, reason: str) -> None:
        super().__init__(f"webhook refused: {reason}")
        self.reason = reason


def _key(secret: str, scheme: Scheme) -> bytes:
    key = secret.encode()
    if scheme == "standard" and secret.startswith("whsec_"):
        try:
            key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
        except binascii.Error:
            raise NotificationConfigError("the part after whsec_ is not base64") from None
    if not key:
        raise NotificationConfigError("the webhook secret is empty; anyone could sign with it")
    return key


def sign(
    secret: str, message_id: str, timestamp: int | str, body: bytes, scheme: Scheme = "standard"
) -> str:
    """``id.timestamp.body`` の HMAC-SHA256(``v1,`` に続けて base64)。"""
    signed = f"{message_id}.{timestamp}.".encode("utf-8", "replace") + body
    digest = hmac.new(_key(secret, scheme), signed, hashlib.sha256).digest()
    return "v1," + base64.b64encode(digest).decode()


class ReplayGuard:
    """見た配送 ID を、許す時刻のずれの分だけ覚えておく。

    ID は、処理が済んで初めて「見た」ことになる。処理に失敗したら忘れ、相手の送り直しを受け付ける::

        message_id = verify_signature(secret, headers, body)
        with guard.once(message_id):
            handle(body)

    Args:
        path: SQLite のファイル。ワーカーの間で分け合い、再起動しても残る。省略すると、
            このプロセスの中だけで覚え、再起動で忘れる。
    """

    def __init__(
        self, path: str | os.PathLike[str] = ":memory:", clock: Callable[[], float] = time.time
    ) -> None:
        self._path, self._clock = path, clock
        self._lock = threading.Lock()
        self._connect()

    def _connect(self) -> None:
        self._db = sqlite3.connect(
            self._path, timeout=30, isolation_level=None, check_same_thread=False
        )
        self._db.execute("CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY, until REAL)")

    def first_time(
        self, message_id: str, now: float, keep_seconds: float = 2 * TOLERANCE_SECONDS
    ) -> bool:
        """初めて見た ID か(``keep_seconds`` 秒の間)。どのスレッドから呼んでもよい。"""
        self._run("DELETE FROM seen WHERE until < ?", now)
        return self._run("INSERT OR IGNORE INTO seen VALUES (?, ?)", message_id, now + keep_seconds)

    def forget(self, message_id: str) -> None:
        """処理に失敗した ID を、まだ見ていないことにする。"""
        self._run("DELETE FROM seen WHERE id = ?", message_id)

    @contextmanager
    def once(self, message_id: str, *, lease_seconds: float = 60.0) -> Generator[None]:
        """この ID の処理を一度だけ行う。例外ならすぐに、落ちたら ``lease_seconds`` 秒で忘れる。

        Raises:
            WebhookRefusedError: 理由は replay(済んだ、またはほかの誰かが処理している)。
        """
        if not self.first_time(message_id, self._clock(), lease_seconds):
            raise WebhookRefusedError("replay")
        try:
            yield
        except BaseException:
            self.forget(message_id)
            raise
        until = self._clock() + 2 * TOLERANCE_SECONDS
        self._run("INSERT OR REPLACE INTO seen VALUES (?, ?)", message_id, until)

    def _run(self, statement: str, *values: object) -> bool:
        with self._lock:
            try:
                return self._db.execute(statement, values).rowcount == 1
            except sqlite3.OperationalError:  # 開いている間に、ファイルを消された
                self._db.close()
                self._connect()
                return self._db.execute(statement, values).rowcount == 1


def verify_signature(
    secret: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    scheme: Scheme = "standard",
    seen: ReplayGuard | None = None,
    now: float | None = None,
) -> str:
    """確かめて、配送 ID を返す。

    Args:
        body: 受け取ったままのバイト列。JSON に直してから戻したものでは署名が合わない。
        seen: 渡すと、同じ配送 ID を二度目から拒否する。処理が失敗しうるなら、代わりに ``seen.once``
            を使うか、失敗したときに ``seen.forget`` を呼ぶ。

    Raises:
        NotificationConfigError: ``secret`` が空、または ``whsec_`` の後が base64 でない。
        WebhookRefusedError: 理由は missing_header、bad_timestamp、stale、bad_signature、replay。
    """
    lower = {key.lower(): value for key, value in headers.items()}
    message_id, timestamp, signatures = (lower.get(name, "") for name in HEADERS[scheme])
    if not (message_id and timestamp and signatures):
        raise WebhookRefusedError("missing_header")
    if not (timestamp.isascii() and timestamp.isdecimal() and len(timestamp) < 16):
        raise WebhookRefusedError("bad_timestamp")
    now = time.time() if now is None else now
    if abs(now - int(timestamp)) > TOLERANCE_SECONDS:
        raise WebhookRefusedError("stale")
    expected = sign(secret, message_id, timestamp, body, scheme).encode()
    # 鍵の交換中は、空白区切りで複数の署名が届く
    given = [text.encode("utf-8", "replace") for text in signatures.split()]
    if not any(hmac.compare_digest(expected, signature) for signature in given):
        raise WebhookRefusedError("bad_signature")
    if seen is not None and not seen.first_time(message_id, now):
        raise WebhookRefusedError("replay")
    return message_id


class SignedWebhookNotificationHandler(HttpHandler):
    """アラートを、Standard Webhooks の署名を付けて送る。受け手は ID で重複を捨てられる。"""

    name = "webhook"

    def __init__(
        self, url: str, secret: str, *, clock: Callable[[], float] = time.time, **http: Any
    ) -> None:
        self._secret = secret
        self._clock = clock
        self._unsettled: dict[str, tuple[Event, str]] = {}
        """``fingerprint`` -> 届いたか分からない通知と、その ID。"""
        _key(secret, "standard")  # 空の秘密や読めない秘密は、送るときではなく作るときに拒否する
        self.poster = HttpPoster(url, idempotent=True, secrets=[secret], **http)

    def payload(self, alert: Alert) -> dict[str, Any]:
        """アラートの全項目。"""
        return {"type": f"alert.{alert.status.value}", "data": alert.to_dict()}

    def headers(self, alert: Alert, body: bytes) -> Mapping[str, str]:
        """署名のヘッダー。届いたか分からない通知を後で送り直すときは、前と同じ ID を使う。"""
        event = (alert.starts_at, alert.status)
        before, message_id = self._unsettled.get(alert.fingerprint, (None, ""))
        if before != event:
            message_id = f"msg_{uuid.uuid4().hex}"
            self._unsettled[alert.fingerprint] = (event, message_id)
        timestamp = str(int(self._clock()))
        return {
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": sign(self._secret, message_id, timestamp, body),
        }

    def deliver(self, alert: Alert) -> Delivery:
        """署名を付けて送る。"""
        delivery = super().deliver(alert)
        if not delivery.retryable:
            self._unsettled.pop(alert.fingerprint, None)
        return delivery
