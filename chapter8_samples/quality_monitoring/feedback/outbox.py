"""8.3.3 届かなかったフィードバックを手元に残し、後で送り直す。

先に送り、届かなかったものだけを SQLite に残すので、サーバーが動いていれば、ディスクが満杯でも記録
できる。いくつのプロセスから使ってもよい。送り直しは、cron などから ``replay()`` を呼ぶだけでよい。
Databricks でも同じコードで動く。
"""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from mlflow.entities import Assessment

from .delivery import is_superseded, store_feedback
from .kinds import FeedbackDeliveryError, FeedbackError, FeedbackRequest, TraceNotFoundError

logger = logging.getLogger(__name__)

_TABLE = """CREATE TABLE IF NOT EXISTS feedback (
    id TEXT PRIMARY KEY, subject TEXT, body TEXT, kept_at REAL, retry_at REAL, reason TEXT)"""
# 1 時間より先の予定は、時計が進んでいた間に書かれたもの
_NEXT = """SELECT id, body, kept_at FROM feedback
    WHERE reason IS NULL AND (retry_at <= ? OR retry_at > ?) ORDER BY retry_at LIMIT 1"""
_RETRY_AT = "UPDATE feedback SET retry_at = ? WHERE id = ?"
# 送っている間に同じ ID で書き直されたものには、触らない
_SENT = "DELETE FROM feedback WHERE id = ? AND body = ?"
_ASIDE = "UPDATE feedback SET reason = ? WHERE id = ? AND body = ?"
_TRY_SECONDS = 5.0
_CLAIM_SECONDS = 60.0  # 送る間、ほかのプロセスに送らせない。落ちたら、この後で引き継がれる
_UNREACHED = 3  # 続けてこの件数が届かなければ、サーバーは止まっているとみなす


class ReplayReport(NamedTuple):
    """再送 1 回の結果(件)。``rejected`` は、送っても無駄なので分けたもの。"""

    sent: int
    rejected: int
    remaining: int


class OutboxStatus(NamedTuple):
    """送信箱のいま。``error`` は書けない理由(届く評価は、それでも記録できる)。"""

    pending: int | None  # 読めなければ None
    rejected: int | None
    error: str | None = None


class FeedbackOutbox:
    """届くまで SQLite に残す送信箱。複数のスレッド、複数のプロセスから使える。"""

    def __init__(
        self,
        path: str | Path,
        *,
        send: Callable[..., Assessment | None] = store_feedback,
        expire_hours: float = 24.0,
    ) -> None:
        """``expire_hours`` を過ぎても、トレースが現れないか許されない評価は、あきらめて分ける。"""
        self._path = Path(path)
        self._send = send
        self._expire_seconds = expire_hours * 3600

    def __len__(self) -> int:
        """まだ届いていない件数。"""
        return self._run("SELECT count(*) FROM feedback WHERE reason IS NULL")[0][0]

    def status(self) -> OutboxStatus:
        """件数と、書けるかどうか。"""
        counts = None, None
        try:
            counts = len(self), len(self.rejected())
            self._run("PRAGMA user_version = 1")  # 本当に書いてみる
            return OutboxStatus(*counts)
        except OSError as error:
            return OutboxStatus(*counts, str(error))

    def submit(
        self, request: FeedbackRequest, *, timeout_seconds: float = 3.0
    ) -> Assessment | None:
        """送る。届かなければ残して ``None`` を返す。残すこともできなければ ``OSError``。"""
        if request.withdraws:
            self.drop(request)
        try:
            return self._send(request, timeout_seconds=timeout_seconds)
        except FeedbackDeliveryError as error:
            logger.warning("feedback %s is kept: %s", request.feedback_id, error)
            self.keep(request)
            return None

    def keep(self, request: FeedbackRequest) -> None:
        """送らずに残す。戻ったときには、電源が落ちても消えない。"""
        subject = _subject(request)
        now = time.time()
        values = (subject + request.feedback_id, subject, json.dumps(asdict(request)), now, now)
        self._run("INSERT OR REPLACE INTO feedback VALUES (?, ?, ?, ?, ?, NULL)", *values)

    def drop(self, request: FeedbackRequest) -> None:
        """同じ人の同じ評価が残っていれば捨てる(取り下げた評価を、後から送らない)。"""
        self._run("DELETE FROM feedback WHERE subject = ?", _subject(request))

    def rejected(self) -> list[tuple[dict[str, Any], str]]:
        """送っても無駄だった評価(``FeedbackRequest`` の項目)と、その理由。

        読めない行は、``{"unreadable": ...}`` になる。
        """
        found = self._run("SELECT body, reason FROM feedback WHERE reason IS NOT NULL")
        return [(_readable(body), reason) for body, reason in found]

    def clear_rejected(self) -> None:
        """確かめ終わった ``rejected()`` を消す。"""
        self._run("DELETE FROM feedback WHERE reason IS NOT NULL")

    def replay(self, *, timeout_seconds: float = 15.0) -> ReplayReport:
        """残りを 1 回ずつ、全部で ``timeout_seconds`` 秒まで送る。届かないものは後ろに回す。"""
        started = time.time()
        deadline = time.monotonic() + timeout_seconds
        sent = rejected = unreached = 0
        while unreached < _UNREACHED and (left := deadline - time.monotonic()) > 0:
            kept = self._claim(started)
            if kept is None:
                break
            key, body, kept_at = kept
            try:
                self._send_again(body, min(left, _TRY_SECONDS))
                self._run(_SENT, key, body)
                sent += 1
                unreached = 0
            except FeedbackError as error:
                absent = isinstance(error, TraceNotFoundError)
                down = isinstance(error, FeedbackDeliveryError) and not absent
                unreached = unreached + 1 if down else 0
                young = kept_at + self._expire_seconds >= started
                if down or (young and (absent or _is_denied(error))):
                    self._run(_RETRY_AT, time.time(), key)
                    continue
                logger.warning("feedback is set aside: %s", error)
                self._run(_ASIDE, str(error), key, body)
                rejected += 1
        return ReplayReport(sent, rejected, len(self))

    def _claim(self, before: float) -> tuple[str, str, float] | None:
        with self._transaction() as database:
            kept = database.execute(_NEXT, [before, before + 3600]).fetchone()
            if kept:
                database.execute(_RETRY_AT, [time.time() + _CLAIM_SECONDS, kept[0]])
        return kept

    def _send_again(self, body: str, timeout_seconds: float) -> None:
        try:
            request = FeedbackRequest(**json.loads(body))
            stored = self._send(request, timeout_seconds=timeout_seconds)
        except (FeedbackError, OSError):
            raise
        except Exception as error:  # 別の版が残した、壊れている: 残りの評価を止めない
            raise FeedbackError(f"it cannot be read or sent: {error!r}") from error
        if is_superseded(request, stored):
            raise FeedbackError("a newer vote of this user is stored")

    def _run(self, statement: str, *values: object) -> list[Any]:
        with self._transaction() as database:
            return database.execute(statement, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._path, 30, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute(_TABLE)
                yield database
                database.execute("COMMIT")
        except sqlite3.Error as error:
            raise OSError(f"the outbox {self._path} cannot be used: {error}") from error


def _is_denied(error: FeedbackError) -> bool:
    """403 か。プロキシーや権限の設定が直れば、同じ内容で届く。"""
    return getattr(error.__cause__, "error_code", None) == "PERMISSION_DENIED"


def _subject(request: FeedbackRequest) -> str:
    return json.dumps([request.trace_id, request.user_id, request.name])


def _readable(body: str) -> dict[str, Any]:
    try:
        return dict(json.loads(body))
    except (TypeError, ValueError):
        return {"unreadable": body}
