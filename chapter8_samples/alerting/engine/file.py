"""8.4.1 状態ファイル: アラートの状態と、まだ届いていない通知を SQLite に残す。

一度に使えるのは一つのエンジンだけで、二つ目は、誰が使っているかを言って拒否する。持ち主が落ちたら、同じ
マシンならすぐに、ほかのマシンなら期限の後に引き継ぐ。

Databricks の Volume は、ロックも途中への書き込みもできない。そこでは手元のコピーを使い、丸ごと
書き戻す。排他は、書いてから読み直し、まだ自分のものなら取れたとする(書き込みが 1 秒より速いと
仮定する)。完全な排他には、ジョブの同時実行を 1 にする。
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter

from ..processes import is_gone, machine
from .state import RuleState, Unsent

logger = logging.getLogger(__name__)

LEASE = timedelta(minutes=5)
"""持ち主がこれだけの間何も書かなければ、ほかのエンジンが引き継ぐ。"""
SETTLE_SECONDS = 1.0


class StateHeldError(RuntimeError):
    """状態ファイルを、ほかのエンジンが使っている。"""


class _BrokenError(OSError):
    """状態ファイルとして読めない。"""


@dataclass(frozen=True)
class Holder:
    """状態ファイルを使っている(または、最後に使った)エンジン。"""

    id: str
    host: str
    machine: str
    pid: int
    until: datetime
    """この後は、ほかのエンジンが使ってよい。"""


@dataclass
class Saved:
    """状態ファイルの中身。キーは ``fingerprint``。"""

    rules: dict[str, RuleState] = field(default_factory=dict[str, RuleState])
    outbox: dict[str, Unsent] = field(default_factory=dict[str, Unsent])
    holder: Holder | None = None


_SAVED = TypeAdapter(Saved)


class StateFile:
    """一つのエンジンから見た状態ファイル。"""

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path, self.lease = Path(path), LEASE
        self._clock, self._sleep = clock, sleep
        self._token, self._in_place = uuid.uuid4().hex, False

    def hold(self) -> Saved | None:
        """使い始めて(使っている間なら、期限を延ばして)、中身を返す。壊れていれば脇に退ける。

        ほかのエンジンが書いたものがなければ(最後に使ったのも自分か、使っている間に消されたか
        壊された)``None``: 手元のもののほうが新しい(書けなかった変更もある)。

        Raises:
            StateHeldError: ほかのエンジンが使っている。
            OSError: 読み書きできない。
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._in_place = self._in_place or _takes_sqlite(self.path.parent)
        try:
            return self._hold()
        except _BrokenError as error:
            self._set_aside(error)
            return self._hold()

    def save(self, rules: dict[str, RuleState], outbox: dict[str, Unsent]) -> None:
        """全部を一度に書き換え、期限を延ばす。

        Raises:
            StateHeldError: 期限が過ぎて、ほかのエンジンに引き継がれていた。
            OSError: 書けない。
        """
        with self._open() as saved:
            self._extend(saved)
            saved.rules, saved.outbox = rules, outbox

    def release(self) -> None:
        """手放す。ほかのエンジンが使っていれば、何もしない。"""
        with suppress(StateHeldError), self._open() as saved:
            # 「いま」では、時計の遅れたマシンが、その時刻まで使えない
            self._extend(saved, datetime(1970, 1, 1, tzinfo=timezone.utc))

    def _hold(self) -> Saved | None:
        with self._open() as saved:
            last = saved.holder
            if last and (last.until <= self._clock() or is_gone(last.machine, last.pid)):
                saved.holder = None
            begins = saved.holder is None
            self._extend(saved)
        if begins and not self._in_place:
            self._sleep(SETTLE_SECONDS)
            with self._open() as seen:
                self._extend(seen)
        return saved if last and last.id != self._me else None

    @property
    def _me(self) -> str:
        return f"{self._token}-{os.getpid()}"  # fork した先は、別のエンジン

    def _extend(self, saved: Saved, until: datetime | None = None) -> None:
        """ほかのエンジンのものでないことを確かめて、期限を変える。"""
        last = saved.holder
        if last and last.id != self._me:
            raise StateHeldError(
                f"alert state {self.path} is held by pid {last.pid} on {last.host}; "
                f"its lease ends at {last.until:%Y-%m-%d %H:%M:%S} UTC unless it is renewed"
            )
        until = until or self._clock() + self.lease
        saved.holder = Holder(self._me, socket.gethostname(), machine(), os.getpid(), until)

    @contextmanager
    def _open(self) -> Generator[Saved]:
        """読み、変えられたものを書き戻す。その間、ほかは待つ。"""
        try:
            with self._workplace() as place, closing(_connect(place)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.execute("CREATE TABLE IF NOT EXISTS alert_state (body TEXT)")
                saved = _read(database)
                yield saved
                body = json.dumps(_SAVED.dump_python(saved, mode="json"))
                database.execute("DELETE FROM alert_state")
                database.execute("INSERT INTO alert_state VALUES (?)", [body])
                database.execute("COMMIT")
        except sqlite3.OperationalError as error:
            raise OSError(f"alert state {self.path} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            raise _BrokenError(str(error)) from error

    @contextmanager
    def _workplace(self) -> Generator[Path]:
        """SQLite で開くファイル。Volume では手元のコピーで、済んだら丸ごと書き戻す。"""
        if self._in_place:
            yield self.path
            return
        with TemporaryDirectory() as folder:
            copy = Path(folder) / "state.db"
            if self.path.exists():
                copy.write_bytes(self.path.read_bytes())
            yield copy
            written = self.path.with_name(f"{self.path.name}.{self._me}.tmp")
            try:
                written.write_bytes(copy.read_bytes())
                written.replace(self.path)
            finally:
                written.unlink(missing_ok=True)

    def _set_aside(self, error: Exception) -> None:
        aside = f"{self.path}.bad"
        logger.warning("alert state %s is unreadable (%s); moved to %s", self.path, error, aside)
        self.path.replace(aside)
        journal = Path(f"{self.path}-journal")
        if journal.exists():  # 残すと、新しいファイルに古い書きかけが混ざる
            journal.replace(f"{aside}-journal")


def _read(database: sqlite3.Connection) -> Saved:
    row = database.execute("SELECT body FROM alert_state").fetchone()
    try:
        return _SAVED.validate_python(json.loads(row[0])) if row else Saved()
    except (ValueError, TypeError, RecursionError) as error:
        raise _BrokenError(str(error)) from error


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=10, isolation_level=None)


def _takes_sqlite(folder: Path) -> bool:
    """この場所のファイルを、SQLite で書き換えられるか。"""
    probe = folder / f".{uuid.uuid4().hex}.probe"
    try:
        with closing(_connect(probe)) as database:
            database.execute("PRAGMA journal_mode = MEMORY")
            database.execute("CREATE TABLE probe (id)")
        return True
    except sqlite3.Error:
        return False
    finally:
        probe.unlink(missing_ok=True)
