"""8.4.2 アラートの型と確実な配送。"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from typing import Any
import requests
logger = logging.getLogger(__name__)

class NotificationConfigError(ValueError):
    """ハンドラーの設定(URL、キー、経路)に誤りがある。"""

class AlertSeverity(str, Enum):
    """重大度。PagerDuty Events API v2 の 4 段階と同じ名前。"""
    INFO = 'info'
    WARNING = 'warning'
    ERROR = 'error'
    CRITICAL = 'critical'

    @property
    def rank(self) -> int:
        """0(info)から 3(critical)までの順位。"""

class AlertStatus(str, Enum):
    """発報中か、解消したか。"""
    FIRING = 'firing'
    RESOLVED = 'resolved'

def fingerprint(name: str, labels: Mapping[str, str]) -> str:
    """同じアラートを見分ける 32 文字。PagerDuty の dedup_key にもなる。"""

@dataclass(frozen=True, kw_only=True)
class Alert:
    """一つのアラート。発報と解消は ``fingerprint`` と ``starts_at`` が同じになる。"""
    name: str
    summary: str = ''
    severity: AlertSeverity = AlertSeverity.WARNING
    status: AlertStatus = AlertStatus.FIRING
    metric: str = ''
    value: float | None = None
    threshold: float | None = None
    n: int | None = None
    '値を求めた標本の数(トレースや評価の件数)。'
    window_seconds: float | None = None
    starts_at: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    ends_at: datetime | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    examples: tuple[str, ...] = ()
    '例となるトレースの ID。'
    links: Mapping[str, str] = field(default_factory=dict[str, str])
    '表示名 -> URL。'
    runbook_url: str | None = None
    action: str | None = None
    fingerprint: str = ''

    def __post_init__(self) -> None:
        ...

    def matches(self, selector: Mapping[str, str]) -> bool:
        """ラベル、または ``name``、``severity``、``metric`` がすべて一致するか。"""

    def to_dict(self) -> dict[str, Any]:
        """JSON にできる辞書(日時は ISO 8601)。"""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Alert:
        """``to_dict`` の逆。"""

@dataclass(frozen=True, kw_only=True)
class Delivery:
    """一つのアラートを一つのハンドラーへ送った結果。"""
    handler: str
    fingerprint: str
    ok: bool
    attempts: int = 1
    http_status: int | None = None
    error: str = ''
    retryable: bool = False
    '後で送り直してよい失敗か(届いたかもしれない失敗は False)。'
    skipped: str = ''
    '送らなかった理由。送ったときは空。'
    elapsed_seconds: float = 0.0

@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """再試行の上限。``deadline_seconds`` は待ち時間も含めた合計。"""
    attempts: int = 4
    base_seconds: float = 0.5
    cap_seconds: float = 30.0
    '指数バックオフと Retry-After の両方の上限。'
    deadline_seconds: float = 60.0
    timeout_seconds: float = 5.0

    def pause_seconds(self, attempt: int, retry_after: str | None, jitter: float) -> float:
        """次の試行までの秒数。``retry_after`` は秒数か HTTP 日付。"""

def retry_after_seconds(header: str | None) -> float | None:
    """Retry-After ヘッダー(秒数または HTTP 日付)を秒に直す。読めなければ ``None``。

    >>> retry_after_seconds("7"), retry_after_seconds("soon"), retry_after_seconds(None)
    (7.0, None, None)
    """

def redact(text: str, secrets: Iterable[str]) -> str:
    """``text`` の中の秘密を ``***`` に替える。"""

@dataclass(frozen=True)
class _Try:
    kind: str
    'ok、permanent、retry(届いていない)、reset・timeout(届いたかもしれない)。'
    error: str
    status: int | None = None
    retry_after: str | None = None

    @property
    def uncertain(self) -> bool:
        ...

class HttpPoster:
    """JSON を POST する。回数も時間も有限の再試行を行い、URL とキーを外に漏らさない。

    Args:
        idempotent: 受け手が重複を捨てるか(PagerDuty の dedup_key など)。False のときは、
            届いたかもしれない失敗のうち、読み取りタイムアウトは再試行せず、切断は一度だけ再試行する。
        per_second: 1 秒あたりの送信数の上限。短い集中は ``burst`` 件まで許す。

    Raises:
        NotificationConfigError: URL が http(s) でない(URL 自体はメッセージに出さない)。
    """

    def __init__(self, url: str, *, idempotent: bool, secrets: Iterable[str]=(), policy: RetryPolicy | None=None, per_second: float=1.0, burst: int=5, session: requests.Session | None=None, clock: Callable[[], float]=time.monotonic, sleep: Callable[[float], None]=time.sleep) -> None:
        self._url, self.host, self.idempotent = (url, parts.hostname or '', idempotent)
        self.policy, self._session = (policy or RetryPolicy(), session or requests.Session())
        self._clock, self._sleep, self._rate, self._burst = (clock, sleep, per_second, burst)
        self._tokens, self._filled_at, self._lock = (float(burst), clock(), threading.Lock())

    def __repr__(self) -> str:
        ...

    def post(self, body: bytes, headers: Mapping[str, str] | None=None) -> dict[str, Any]:
        """送って、``Delivery`` の欄(ok、attempts、http_status、error、...)を返す。"""

    def _once(self, body: bytes, headers: Mapping[str, str], seconds_left: float) -> _Try:
        ...

    def _judge(self, answer: requests.Response) -> _Try:
        ...

    def _pause_before_retry(self, tries: list[_Try], elapsed_seconds: float) -> float | None:
        ...

    def _summary(self, tries: list[_Try], elapsed_seconds: float) -> dict[str, Any]:
        ...

    def _wait_for_turn(self) -> None:
        ...

class NotificationHandler(ABC):
    """通知先の基底クラス。``send`` は例外を出さずに ``Delivery`` を返す。"""
    name: str = 'handler'
    min_severity: AlertSeverity = AlertSeverity.INFO
    'これより低い重大度は送らない(結果の ``skipped`` に理由が入る)。'
    send_resolved: bool = True
    wants_every_cycle: bool = False
    '発報中のアラートを評価のたびに送り直す必要があるか(Alertmanager)。'

    @abstractmethod
    def deliver(self, alert: Alert) -> Delivery:
        """実際に送る。"""

    def send(self, alert: Alert) -> Delivery:
        """送るべきアラートなら送る。"""

    def _deliver_safely(self, alert: Alert) -> Delivery:
        ...

    def result(self, alert: Alert, **fields: Any) -> Delivery:
        """このハンドラーの ``Delivery``。"""

def encodable(text: str, encoding: str='utf-8') -> str:
    """``encoding`` で書けない文字(対になっていないサロゲートなど)を「?」にする。

    >>> encodable("broken \\ud800 text"), encodable("発報 \\U0001f600", "cp932")
    ('broken ? text', '発報 ?')
    """

def json_bytes(data: Any) -> bytes:
    """UTF-8 の JSON。UTF-8 にできない文字(対になっていないサロゲート)は「?」になる。"""

class HttpHandler(NotificationHandler):
    """JSON を POST する通知先の基底クラス。"""
    poster: HttpPoster

    @abstractmethod
    def payload(self, alert: Alert) -> dict[str, Any]:
        """送る JSON。"""

    def headers(self, alert: Alert, body: bytes) -> Mapping[str, str]:
        """追加の HTTP ヘッダー(署名など)。"""

    def deliver(self, alert: Alert) -> Delivery:
        """JSON にして送る。"""

def main() -> None:
    """429 に一度断られる POST と、待っても直らない 404 を、手元の受信サーバーに送る。"""
