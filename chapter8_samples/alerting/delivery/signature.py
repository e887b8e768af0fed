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
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import Any, Literal

from .alert import Alert, NotificationConfigError
from .posting import HttpHandler, HttpPoster

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
    """済んだ配送 ID を、許す時刻のずれの分だけ覚えておく。

    ID は、処理が済んで初めて「済んだ」ことになる。処理に失敗したら、相手の送り直しを受け付ける::

        message_id = verify_signature(secret, headers, body)
        with guard.once(message_id):
            handle(body)

    Args:
        path: SQLite のファイル。ワーカーの間で分け合い、再起動しても残る。
    """

    def __init__(
        self, path: str | os.PathLike[str], clock: Callable[[], float] = time.time
    ) -> None:
        self._path, self._clock = path, clock

    @contextmanager
    def once(self, message_id: str, *, lease_seconds: float = 60.0) -> Generator[None]:
        """この ID の処理を一度だけ行う。例外ならすぐに、落ちたら ``lease_seconds`` 秒で忘れる。

        Raises:
            WebhookRefusedError: 理由は replay(済んだ、またはほかの誰かが処理している)。
        """
        now = self._clock()
        lease_until = now + lease_seconds
        self._run("DELETE FROM seen WHERE until < ?", now)
        if not self._run("INSERT OR IGNORE INTO seen VALUES (?, ?)", message_id, lease_until):
            raise WebhookRefusedError("replay")
        try:
            yield
        except BaseException:  # 期限が過ぎて、ほかの誰かが始めた(済ませた)分は消さない
            self._run("DELETE FROM seen WHERE id = ? AND until = ?", message_id, lease_until)
            raise
        until = self._clock() + 2 * TOLERANCE_SECONDS
        self._run("INSERT OR REPLACE INTO seen VALUES (?, ?)", message_id, until)

    def _run(self, statement: str, *values: object) -> int:
        """実行し、変わった行の数を返す。毎回つなぐので、どのスレッドや fork した先からでもよい。"""
        with closing(sqlite3.connect(self._path, timeout=30)) as database, database:
            database.execute("CREATE TABLE IF NOT EXISTS seen (id TEXT PRIMARY KEY, until REAL)")
            return database.execute(statement, values).rowcount


def verify_signature(
    secret: str,
    headers: Mapping[str, str],
    body: bytes,
    *,
    scheme: Scheme = "standard",
    now: float | None = None,
) -> str:
    """確かめて、配送 ID を返す。再送は ``ReplayGuard`` で拒否する。

    Args:
        body: 受け取ったままのバイト列。JSON に直してから戻したものでは署名が合わない。

    Raises:
        NotificationConfigError: ``secret`` が空、または ``whsec_`` の後が base64 でない。
        WebhookRefusedError: 理由は missing_header、bad_timestamp、stale、bad_signature。
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
    return message_id


class SignedWebhookNotificationHandler(HttpHandler):
    """アラートを、Standard Webhooks の署名を付けて送る。受け手は ID で重複を捨てられる。"""

    name = "webhook"

    def __init__(
        self, url: str, secret: str, *, clock: Callable[[], float] = time.time, **http: Any
    ) -> None:
        self._secret = secret
        self._clock = clock
        _key(secret, "standard")  # 空の秘密や読めない秘密は、送るときではなく作るときに拒否する
        self.poster = HttpPoster(url, idempotent=True, secrets=[secret], **http)

    def payload(self, alert: Alert) -> dict[str, Any]:
        """アラートの全項目。"""
        return {"type": f"alert.{alert.status.value}", "data": asdict(alert)}

    def headers(self, alert: Alert, body: bytes) -> Mapping[str, str]:
        """署名のヘッダー。ID は本文から決まるので、再起動の後に送り直しても変わらない。"""
        message_id = f"msg_{hashlib.sha256(body).hexdigest()[:32]}"
        timestamp = str(int(self._clock()))
        return {
            "webhook-id": message_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": sign(self._secret, message_id, timestamp, body),
        }
