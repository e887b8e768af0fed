"""8.4.5 エイリアスの付け替えを、レジストリ自身のタグに記録する。

ロールバックの履歴をメモリーに持つと、再起動で「元に戻す」先を失う。ここでは登録済みモデル(プロンプト)の
タグだけに、直近の変更と排他ロックを置く。別の保存先は要らず、途中で落ちても記録から立て直せる。

Databricks の Unity Catalog でも動くように、タグは 1,000 文字と使える記号の制限を守る。
"""

from __future__ import annotations

import getpass
import json
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

from pydantic import TypeAdapter

from ..processes import is_gone, machine
from .errors import ConcurrentChangeError
from .targets import AliasTarget

logger = logging.getLogger(__name__)

T = TypeVar("T")

SLOTS = 8
"""残す記録の数。Unity Catalog のタグは 50 個まで。"""
MAX_TAG_CHARS = 1000
"""Unity Catalog のタグの値の上限(OSS の MLflow は 100,000 文字)。"""


@dataclass(frozen=True, kw_only=True)
class Change:
    """エイリアスの変更の記録。"""

    id: str
    seq: int
    action: str
    """promote、rollback、undo。"""
    to_version: str
    at: datetime
    by: str
    from_version: str | None = None
    reason: str = ""
    state: str = "prepared"
    """prepared、done、aborted(切り替わる前に落ちた)、restored(確認に失敗して戻した)、
    superseded(ほかの誰かが動かした)、dry-run。"""
    request_id: str | None = None
    undoes: str | None = None

    def to_json(self) -> str:
        """タグの値(1,000 文字以内)。長すぎる理由は切る。"""
        fields = _CHANGE.dump_python(self, mode="json", exclude_defaults=True)
        extra = len(_json(fields)) - MAX_TAG_CHARS
        if extra > 0:
            fields["reason"] = self.reason[: max(0, len(self.reason) - extra - 8)]
        return _json(fields)

    @classmethod
    def from_json(cls, text: str) -> Change:
        """``to_json`` の逆。読めなければ ``ValueError``。"""
        return _CHANGE.validate_json(text)


_CHANGE = TypeAdapter(Change)


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def done_changes(history: list[Change]) -> list[Change]:
    """済んだ変更だけ。"""
    return [change for change in history if change.state == "done"]


def known_bad(history: list[Change]) -> set[str]:
    """ロールバックで退けられ、その後で使うと決め直されていないバージョン。"""
    bad = set[str]()
    for change in done_changes(history):
        bad.discard(change.to_version)  # 取り消した、または force で使うと決め直した
        if change.action == "rollback" and change.from_version:
            bad.add(change.from_version)
    return bad


def find_request(history: list[Change], request_id: str | None) -> Change | None:
    """同じ ``request_id`` の済んだ変更。なければ ``None``。"""
    found = [c for c in done_changes(history) if request_id and c.request_id == request_id]
    return found[-1] if found else None


def _default_actor() -> str:
    """誰が変えたか(ユーザー@ホスト:プロセス番号)。"""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True)
class _Lock:
    id: str
    until: float
    by: str
    machine: str = ""
    pid: int = 0


_LOCK = TypeAdapter(_Lock)


class Journal:
    """一つのエイリアスの記録と排他ロック。

    Fischer の方式: 自分のロックを書き、``settle_seconds`` 待ち、まだ自分のものなら取れた。タグの
    書き込みが ``settle_seconds`` より速いと仮定する。完全な排他には、変更を一つのジョブに集める。
    落ちた持ち主のロックは、同じマシンならすぐに、ほかのマシンなら ``lease_seconds`` の後に外れる。
    """

    def __init__(
        self,
        target: AliasTarget,
        *,
        lease_seconds: float = 60.0,
        settle_seconds: float = 0.25,
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        sleep: Callable[[float], None] = time.sleep,
        actor: str = "",
    ) -> None:
        self.target = target
        self.clock = clock
        self.actor = actor or _default_actor()
        self._lease = timedelta(seconds=lease_seconds)
        self._settle = settle_seconds
        self._sleep = sleep
        self._label = f"{target.name}@{target.alias}"
        # Unity Catalog のタグのキーは . , - = / : を含めない。a-b と a_b の記録は混ぜない
        alias = re.sub(r"[^A-Za-z0-9_]", lambda found: f"_{ord(found[0]):x}_", target.alias)
        self._prefix = f"rollback_{alias}_"
        self._lock_key = f"{self._prefix}lock"

    def history(self) -> list[Change]:
        """残っている記録を、古い順に。"""
        slot = re.compile(re.escape(self._prefix) + r"\d+")
        tags = self.target.tags().items()
        found = [self._read(key, text, _CHANGE) for key, text in tags if slot.fullmatch(key)]
        return sorted(filter(None, found), key=lambda change: change.seq)

    def _read(self, key: str, text: str, kind: TypeAdapter[T]) -> T | None:
        """タグを読む。手で書き換えられて読めないものは、ないものとする。"""
        try:
            return kind.validate_json(text)
        except ValueError as error:
            logger.warning("tag %s of %s is unreadable: %s", key, self._label, error)
            return None

    def write(self, change: Change) -> Change:
        """記録を書く(同じ ``seq`` なら置き換える)。"""
        self.target.put_tag(f"{self._prefix}{change.seq % SLOTS}", change.to_json())
        return change

    @contextmanager
    def locked(self) -> Generator[Callable[[], None]]:
        """変更の間だけロックを持つ。渡す関数は、まだ自分のものかを確かめて期限を延ばす。

        Raises:
            ConcurrentChangeError: ほかの誰かが変更中。
        """
        held, now = self._lock(), self.clock()
        # 遠すぎる期限は、時計の進んだ持ち主が残したもの
        live = held and now.timestamp() < held.until < (now + 10 * self._lease).timestamp()
        if held and live and not is_gone(held.machine, held.pid):
            until = f"{datetime.fromtimestamp(held.until, timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
            raise ConcurrentChangeError(
                f"{self._label} is being changed by {held.by}; its lock expires at {until}"
            )
        me = uuid.uuid4().hex
        try:
            self._write_lock(me)
            self._sleep(self._settle)
            self._keep(me)
            yield lambda: self._keep(me)
        finally:
            self._release(me)

    def _lock(self) -> _Lock | None:
        text = self.target.tags().get(self._lock_key)
        return self._read(self._lock_key, text, _LOCK) if text else None

    def _write_lock(self, me: str) -> None:
        until = (self.clock() + self._lease).timestamp()
        lock = _Lock(me, until, self.actor, machine(), os.getpid())
        self.target.put_tag(self._lock_key, _json(asdict(lock)))

    def _keep(self, me: str) -> None:
        if (lock := self._lock()) is None or lock.id != me:
            raise ConcurrentChangeError(f"another process won the lock on {self._label}")
        self._write_lock(me)

    def _release(self, me: str) -> None:
        try:
            if (lock := self._lock()) and lock.id == me:
                self.target.drop_tag(self._lock_key)
        except Exception as error:  # 変更の結果(成功か失敗か)を、後始末の失敗で隠さない
            logger.warning("lock on %s is left to expire: %s", self._label, error)
