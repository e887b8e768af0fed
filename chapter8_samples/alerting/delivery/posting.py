"""8.4.2 確実な配送: JSON を POST し、秘密を漏らさず、二重にならないように再試行する。

urllib3 の自動再試行は Webhook の URL をログに書き、読み取りタイムアウトで二重投稿し、Retry-After に
従って 6 時間まで待つ。そこで、有限の再試行を自前で行う。

Databricks でもそのまま使う(MLflow にも Databricks にも依存しない)。
"""

from __future__ import annotations

import copy
import logging
import random
import re
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import requests
from urllib3.exceptions import InvalidHeader, NewConnectionError
from urllib3.util import Retry

from ..processes import renew_after_fork
from .alert import Alert, Delivery, NotificationConfigError, NotificationHandler
from .texts import json_bytes


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """再試行の上限。``deadline_seconds`` は待ち時間も含めた合計。"""

    attempts: int = 4
    base_seconds: float = 0.5
    cap_seconds: float = 30.0
    """指数バックオフと Retry-After の両方の上限。"""
    deadline_seconds: float = 60.0
    timeout_seconds: float = 5.0

    def pause_seconds(self, attempt: int, retry_after: str | None, jitter: float) -> float:
        """次の試行までの秒数。``retry_after`` は秒数か HTTP 日付で、読めなければ使わない。"""
        try:
            return min(Retry().parse_retry_after(retry_after or ""), self.cap_seconds)
        except (InvalidHeader, ValueError, OverflowError):
            backoff = min(self.base_seconds * 2 ** (attempt - 1), self.cap_seconds)
            return backoff * (0.5 + jitter / 2)


class _Secrets(logging.Filter):
    """URL とキー。相手の答えと、urllib3 が DEBUG で書く「POST /services/...」から消す。"""

    _known: frozenset[str] = frozenset()

    def protect(self, secrets: Iterable[str]) -> None:
        """隠すものを加える。"""
        self._known |= {secret for secret in secrets if len(secret) > 3}
        logging.getLogger("urllib3.connectionpool").addFilter(self)

    def redact(self, text: str) -> str:
        """``text`` の中の秘密を ``***`` に替える。"""
        for secret in sorted(self._known, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = self.redact(record.getMessage())
        record.args = ()
        return True


_secrets = _Secrets()


@dataclass(frozen=True)
class _Try:
    kind: str
    """ok、permanent、retry(届いていない)、reset・timeout(届いたかもしれない)。"""
    error: str = ""
    retry_after: str | None = None


class HttpPoster:
    """JSON を POST する。回数も時間も有限の再試行を行い、URL とキーを外に漏らさない。

    Args:
        idempotent: 受け手が重複を捨てるか(PagerDuty の dedup_key など)。False のときは、
            届いたかもしれない失敗のうち、読み取りタイムアウトは再試行せず、切断は一度だけ再試行する。

    Raises:
        NotificationConfigError: URL が http(s) でない(URL 自体はメッセージに出さない)。
    """

    def __init__(
        self,
        url: str,
        *,
        idempotent: bool,
        secrets: Iterable[str] = (),
        policy: RetryPolicy | None = None,
        session: requests.Session | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        sent = _as_sent(url)
        _secrets.protect([*secrets, *_revealing(url), *_revealing(sent)])
        self._url = url
        self._host = urlsplit(sent).hostname or ""
        self._idempotent = idempotent
        self._policy = policy or RetryPolicy()
        self._session = session or requests.Session()
        renew_after_fork(self._renew)
        self._clock = clock
        self._sleep = sleep

    def _renew(self) -> None:
        self._session = copy.deepcopy(self._session)  # 設定は同じで、接続は別になる

    def __repr__(self) -> str:
        return f"HttpPoster(host={self._host!r})"

    def post(self, body: bytes, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """送って、``Delivery`` の欄(ok、attempts、error、retryable)を返す。"""
        started = self._clock()
        tries: list[_Try] = []
        while True:
            left = self._policy.deadline_seconds - (self._clock() - started)
            tries.append(self._once(body, headers or {}, max(0.1, left)))
            pause = self._pause_before_retry(tries, self._clock() - started)
            if pause is None:
                break
            self._sleep(pause)
        last = tries[-1]
        return {
            "ok": last.kind == "ok",
            "attempts": len(tries),
            "error": last.error,
            "retryable": self._is_safe_to_repeat(last),
        }

    def _once(self, body: bytes, headers: Mapping[str, str], seconds_left: float) -> _Try:
        try:
            with self._session.post(
                self._url,
                data=body,
                headers={"Content-Type": "application/json", **headers},
                timeout=min(self._policy.timeout_seconds, seconds_left),
                allow_redirects=False,
                stream=True,
            ) as answer:
                return self._judge(answer)
        except requests.RequestException as error:  # 例外の文には URL が入っているので使わない
            return _Try(_failure_kind(error), f"{type(error).__name__} from {self._host}")

    def _judge(self, answer: requests.Response) -> _Try:
        code = answer.status_code
        # 隠してから切る: 先に切ると、途中で切れた秘密の前半が残る
        reply = _secrets.redact(_first_words(answer))[:200]
        if 200 <= code < 300:
            return _Try("ok")
        kind = "retry" if code in (408, 425, 429) or code >= 500 else "permanent"
        error = f"HTTP {code} from {self._host}: {reply}"
        return _Try(kind, error, answer.headers.get("Retry-After"))

    def _pause_before_retry(self, tries: list[_Try], elapsed_seconds: float) -> float | None:
        last = tries[-1]
        first_reset = [one.kind for one in tries].count("reset") == 1 and last.kind == "reset"
        if not (self._is_safe_to_repeat(last) or first_reset):
            return None
        if len(tries) == self._policy.attempts:
            return None
        pause = self._policy.pause_seconds(len(tries), last.retry_after, random.random())
        return pause if elapsed_seconds + pause <= self._policy.deadline_seconds else None

    def _is_safe_to_repeat(self, last: _Try) -> bool:
        return last.kind == "retry" or (self._idempotent and last.kind in ("reset", "timeout"))


def _as_sent(url: str) -> str:
    """実際に送られる(エンコードし直された)URL。"""
    try:
        sent = requests.Request("POST", url).prepare().url or ""
        if sent.startswith(("http://", "https://")):
            return sent
    except requests.RequestException:  # 例外の文に URL が入りうるので、つなげない
        pass
    raise NotificationConfigError(
        f"expected an http(s) URL, got a value of {len(url or '')} characters without one"
    )


def _revealing(url: str) -> list[str]:
    """URL のうち隠す部分。相手が一部だけを答えに書き写すこともあるので、鍵らしい語も含める。"""
    target = "/" + url.partition("#")[0].partition("://")[2].partition("/")[2]
    words = re.split(r"[/?&=;,]", target)
    keys = [w for w in words if len(w) >= 8 and any(c.isdigit() or c.isupper() for c in w)]
    return [target, *target.split("?"), *keys, *map(unquote, keys)]


def _first_words(answer: requests.Response) -> str:
    """応答の本文の先頭。本文が途中で切れても、届いたかどうかはステータスコードで決まる。"""
    try:
        return next(answer.iter_content(2048), b"").decode("utf-8", "replace").strip()
    except requests.RequestException:
        return ""


def _failure_kind(error: requests.RequestException) -> str:
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    cause = getattr(reason, "original_error", reason)  # ProxyError は、もとの誤りを包む
    early = isinstance(error, requests.ConnectTimeout | requests.exceptions.ProxyError)
    if isinstance(cause, NewConnectionError) or (early and not isinstance(cause, ConnectionError)):
        return "retry"
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return "retry"
    if isinstance(error, requests.Timeout):
        return "timeout"
    return "reset" if isinstance(error, requests.ConnectionError) else "permanent"


class HttpHandler(NotificationHandler):
    """JSON を POST する通知先の基底クラス。"""

    poster: HttpPoster

    @abstractmethod
    def payload(self, alert: Alert) -> dict[str, Any]:
        """送る JSON。"""

    def headers(self, alert: Alert, body: bytes) -> Mapping[str, str]:
        """追加の HTTP ヘッダー(署名など)。"""
        return {}

    def deliver(self, alert: Alert) -> Delivery:
        """JSON にして送る。"""
        body = json_bytes(self.payload(alert))
        return self.result(alert, **self.poster.post(body, self.headers(alert, body)))
