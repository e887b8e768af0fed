"""8.4.2 アラートの型と確実な配送。

urllib3 の自動再試行は Webhook の URL をログに書き、読み取りタイムアウトで二重投稿し、Retry-After に
従って 6 時間まで待つ。そこで、有限で、秘密を漏らさず、二重にならない再試行を自前で行う。

Databricks でもそのまま使う(MLflow にも Databricks にも依存しない)。
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from itertools import islice
from typing import Any, cast
from urllib.parse import SplitResult, urlsplit

import requests

logger = logging.getLogger(__name__)


class NotificationConfigError(ValueError):
    """ハンドラーの設定(URL、キー、経路)に誤りがある。"""


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

    def to_dict(self) -> dict[str, Any]:
        """JSON にできる辞書(日時は ISO 8601)。"""
        dates = {k: v.isoformat() for k in ("starts_at", "ends_at") if (v := getattr(self, k))}
        enums = {"severity": self.severity.value, "status": self.status.value}
        return {**asdict(self), **dates, **enums, "examples": list(self.examples)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Alert:
        """``to_dict`` の逆。"""
        fields: dict[str, Any] = {**data, "examples": tuple(data["examples"])}
        for key in ("starts_at", "ends_at"):
            fields[key] = datetime.fromisoformat(data[key]) if data[key] else None
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """一つのアラートを一つのハンドラーへ送った結果。"""

    handler: str
    fingerprint: str
    ok: bool
    attempts: int = 1
    http_status: int | None = None
    error: str = ""
    retryable: bool = False
    """後で送り直してよい失敗か(届いたかもしれない失敗は False)。"""
    skipped: str = ""
    """送らなかった理由。送ったときは空。"""
    elapsed_seconds: float = 0.0
    pending: bool = False
    """待つのをやめたが、まだ送っている。"""


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
        """次の試行までの秒数。``retry_after`` は秒数か HTTP 日付。"""
        if (wanted := retry_after_seconds(retry_after)) is not None:
            return min(wanted, self.cap_seconds)
        return min(self.base_seconds * 2 ** (attempt - 1), self.cap_seconds) * (0.5 + jitter / 2)


def retry_after_seconds(header: str | None) -> float | None:
    """Retry-After ヘッダー(秒数または HTTP 日付)を秒に直す。読めなければ ``None``。

    >>> retry_after_seconds("7"), retry_after_seconds("soon"), retry_after_seconds(None)
    (7.0, None, None)
    """
    text = (header or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - datetime.now(timezone.utc)).total_seconds())


class _SecretFilter(logging.Filter):
    """urllib3 が DEBUG で書く「POST /services/...」からパスを消す。"""

    secrets: frozenset[str] = frozenset()

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage(), self.secrets), ()
        return True

    def protect(self, secrets: Iterable[str]) -> None:
        self.secrets |= frozenset(secrets)
        logging.getLogger("urllib3.connectionpool").addFilter(self)


_log_filter = _SecretFilter()


def redact(text: str, secrets: Iterable[str]) -> str:
    """``text`` の中の秘密を ``***`` に替える。"""
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text


@dataclass(frozen=True)
class _Try:
    kind: str
    """ok、permanent、retry(届いていない)、reset・timeout(届いたかもしれない)。"""
    error: str
    status: int | None = None
    retry_after: str | None = None

    @property
    def uncertain(self) -> bool:
        return self.kind in ("reset", "timeout")


class HttpPoster:
    """JSON を POST する。回数も時間も有限の再試行を行い、URL とキーを外に漏らさない。

    Args:
        idempotent: 受け手が重複を捨てるか(PagerDuty の dedup_key など)。False のときは、
            届いたかもしれない失敗のうち、読み取りタイムアウトは再試行せず、切断は一度だけ再試行する。
        per_second: 1 秒あたりの送信数の上限。短い集中は ``burst`` 件まで許す。

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
        per_second: float = 1.0,
        burst: int = 5,
        session: requests.Session | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts, wire = _http_url(url)
        self._url, self.host, self.idempotent = url, parts.hostname or "", idempotent
        target = url.partition(parts.netloc)[2]
        hidden = [*secrets, target, *_revealing(parts), *_revealing(wire)]
        _log_filter.protect(secret for secret in hidden if len(secret) > 3)
        self.policy, self._session = policy or RetryPolicy(), session or requests.Session()
        self._clock, self._sleep, self._rate, self._burst = clock, sleep, per_second, burst
        self._tokens, self._filled_at, self._lock = float(burst), clock(), threading.Lock()

    def __repr__(self) -> str:
        return f"HttpPoster(host={self.host!r})"

    def post(self, body: bytes, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
        """送って、``Delivery`` の欄(ok、attempts、http_status、error、...)を返す。"""
        started, tries = self._clock(), list[_Try]()
        while True:
            self._wait_for_turn()
            left = self.policy.deadline_seconds - (self._clock() - started if tries else 0)
            tries.append(self._once(body, headers or {}, max(0.1, left)))
            pause = self._pause_before_retry(tries, self._clock() - started)
            if pause is None:
                return self._summary(tries, self._clock() - started)
            self._sleep(pause)

    def _once(self, body: bytes, headers: Mapping[str, str], seconds_left: float) -> _Try:
        try:
            with self._session.post(
                self._url,
                data=body,
                headers={"Content-Type": "application/json", **headers},
                timeout=min(self.policy.timeout_seconds, seconds_left),
                allow_redirects=False,
                stream=True,
            ) as answer:
                return self._judge(answer)
        except requests.RequestException as error:  # 例外の文には URL が入っているので使わない
            return _Try(_failure_kind(error), f"{type(error).__name__} from {self.host}")

    def _judge(self, answer: requests.Response) -> _Try:
        code = answer.status_code
        # 隠してから切る: 先に切ると、途中で切れた秘密の前半が残る
        reply = redact(_first_words(answer), _log_filter.secrets)[:200]
        if 200 <= code < 300:
            return _Try("ok", "", code)
        kind = "retry" if code in (408, 425, 429) or code >= 500 else "permanent"
        error = f"HTTP {code} from {self.host}: {reply}"
        return _Try(kind, error, code, answer.headers.get("Retry-After"))

    def _pause_before_retry(self, tries: list[_Try], elapsed_seconds: float) -> float | None:
        last = tries[-1]
        again = last.kind == "retry" or (last.uncertain and self.idempotent)
        again = again or (last.kind == "reset" and sum(t.kind == "reset" for t in tries) == 1)
        if not again or len(tries) == self.policy.attempts:
            return None
        pause = self.policy.pause_seconds(len(tries), last.retry_after, random.random())
        return pause if elapsed_seconds + pause <= self.policy.deadline_seconds else None

    def _summary(self, tries: list[_Try], elapsed_seconds: float) -> dict[str, Any]:
        last = tries[-1]
        return {
            "ok": last.kind == "ok",
            "attempts": len(tries),
            "http_status": last.status,
            "error": last.error,
            "retryable": last.kind == "retry" or (last.uncertain and self.idempotent),
            "elapsed_seconds": elapsed_seconds,
        }

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
            self._tokens -= 1
            debt = -self._tokens / self._rate
        if debt > 0:
            self._sleep(debt)


def _http_url(url: str) -> tuple[SplitResult, SplitResult]:
    """書かれたままの URL と、実際に送られる(エンコードし直された)URL。"""
    try:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return parts, urlsplit(requests.Request("POST", url).prepare().url or url)
    except (ValueError, requests.RequestException):  # 例外の文に URL が入りうるので、つなげない
        pass
    raise NotificationConfigError(
        f"expected an http(s) URL, got a value of {len(url or '')} characters without one"
    )


def _revealing(url: SplitResult) -> list[str]:
    """URL のうち隠す部分。相手が一部だけを答えに書き写すこともあるので、鍵らしい語も含める。"""
    whole = f"{url.path}?{url.query}" if url.query else url.path
    words = re.split(r"[/?&=;,]", whole)
    keys = [w for w in words if len(w) >= 8 and any(c.isdigit() or c.isupper() for c in w)]
    return [whole, url.path, url.query, *keys]


def _first_words(answer: requests.Response) -> str:
    """答えの本文の始まり。本文が途中で切れても、届いたかどうかは状態コードで決まっている。"""
    try:
        return next(answer.iter_content(2048), b"").decode("utf-8", "replace").strip()
    except requests.RequestException:
        return ""


def _failure_kind(error: requests.RequestException) -> str:
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    unreachable = type(reason).__name__ in ("NewConnectionError", "NameResolutionError")
    if unreachable or isinstance(error, requests.ConnectTimeout):
        return "retry"
    if isinstance(error, requests.Timeout):
        return "timeout"
    tls = isinstance(error, requests.exceptions.SSLError)
    return "reset" if isinstance(error, requests.ConnectionError) and not tls else "permanent"


class NotificationHandler(ABC):
    """通知先の基底クラス。``send`` は例外を出さずに ``Delivery`` を返す。"""

    name: str = "handler"
    min_severity: AlertSeverity = AlertSeverity.INFO
    """これより低い重大度は送らない(結果の ``skipped`` に理由が入る)。"""
    send_resolved: bool = True
    wants_every_cycle: bool = False
    """発報中のアラートを評価のたびに送り直す必要があるか(Alertmanager)。"""

    @abstractmethod
    def deliver(self, alert: Alert) -> Delivery:
        """実際に送る。"""

    def send(self, alert: Alert) -> Delivery:
        """送るべきアラートなら送る。"""
        if alert.severity.rank < self.min_severity.rank:
            reason = f"severity {alert.severity.value} is below {self.min_severity.value}"
        elif alert.status is AlertStatus.RESOLVED and not self.send_resolved:
            reason = "send_resolved is off"
        else:
            return self._deliver_safely(alert)
        return self.result(alert, ok=True, attempts=0, skipped=reason)

    def _deliver_safely(self, alert: Alert) -> Delivery:
        try:
            return self.deliver(alert)
        except Exception as error:  # 例外の文には URL やキーが入りうるので、型だけを残す
            logger.error("handler %s raised %s", self.name, type(error).__name__)
            return self.result(alert, ok=False, error=f"raised {type(error).__name__}")

    def result(self, alert: Alert, **fields: Any) -> Delivery:
        """このハンドラーの ``Delivery``。"""
        return Delivery(handler=self.name, fingerprint=alert.fingerprint, **fields)


def encodable(text: str, encoding: str = "utf-8") -> str:
    """``encoding`` で書けない文字(対になっていないサロゲートなど)を「?」にする。

    >>> encodable("broken \\ud800 text"), encodable("発報 \\U0001f600", "cp932")
    ('broken ? text', '発報 ?')
    """
    return text.encode(encoding, "replace").decode(encoding)


def json_bytes(data: Any, *, ascii_only: bool = False) -> bytes:
    """UTF-8 の JSON。JSON や UTF-8 にできない値も、失敗させずに近い文字列にする。

    >>> json_bytes({1: float("nan")})
    b'{"1": "nan"}'
    """
    return json.dumps(json_ready(data), ensure_ascii=ascii_only).encode("utf-8", "replace")


def json_ready(
    value: Any, chars: int | None = None, items: int | None = None, depth: int = 20
) -> Any:
    """必ず JSON になる値。``chars`` は文字列の、``items`` は列の長さの上限。"""
    value = value.value if isinstance(value, Enum) else value
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float) and abs(value) < 1e300:  # nan と inf は、比べると偽になる
        return value
    if depth and isinstance(value, Mapping):
        pairs = islice(cast("Mapping[Any, Any]", value).items(), items)
        return {_text(k, chars): json_ready(v, chars, items, depth - 1) for k, v in pairs}
    if depth and isinstance(value, list | tuple | set | frozenset):
        found = islice(cast("Iterable[Any]", value), items)
        return [json_ready(item, chars, items, depth - 1) for item in found]
    return _text(value, chars)


def _text(value: Any, chars: int | None) -> str:
    try:
        text = str(value)
    except Exception:  # 桁の多すぎる整数、壊れた __str__
        text = f"<{type(value).__name__}>"
    return text if chars is None or len(text) <= chars else text[: chars - 1] + "…"


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
