"""8.4.5 エイリアスの付け替えを、レジストリ自身のタグに記録する。

ロールバックの履歴をメモリーに持つと、再起動で「元に戻す」先を失う。ここでは登録済みモデル(プロンプト)の
タグだけに、直近の変更を置く。別の保存先は要らず、途中で落ちても記録から立て直せる。

次の番号の記録を書けた人だけが切り替えるので、記録がそのまま排他ロックになる。

Databricks の Unity Catalog でも動くように、タグは 1,000 文字と使える記号の制限を守る。
"""

from __future__ import annotations

import getpass
import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone

from pydantic import AwareDatetime, TypeAdapter

from ..processes import is_gone, machine
from .errors import ConcurrentChangeError
from .targets import AliasTarget

logger = logging.getLogger(__name__)

SLOTS = 8
"""残す記録の数。Unity Catalog のタグは 50 個まで。"""
MAX_TAG_CHARS = 1000
"""Unity Catalog のタグの値の上限(OSS の MLflow は 100,000 文字)。"""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """変更の途中のプロセスと、その期限。"""

    id: str
    until: AwareDatetime
    machine: str
    pid: int


@dataclass(frozen=True, kw_only=True)
class Change:
    """エイリアスの変更の記録。"""

    id: str
    seq: int
    action: str
    """promote、rollback、undo。"""
    to_version: str
    at: AwareDatetime
    by: str
    from_version: str | None = None
    reason: str = ""
    state: str = "prepared"
    """prepared、done、aborted(切り替わる前に落ちた)、restored(確認に失敗して戻した)、
    superseded(ほかの誰かが動かした)、dry-run。"""
    request_id: str | None = None
    lease: Lease | None = None
    """prepared の間だけ。"""

    def to_json(self) -> str:
        """タグの値(1,000 文字以内)。長すぎる理由は切る。"""
        text = _dump(self)
        kept = max(0, len(self.reason) - max(0, len(text) - MAX_TAG_CHARS))
        return _dump(replace(self, reason=self.reason[:kept]))

    @classmethod
    def from_json(cls, text: str) -> Change:
        """``to_json`` の逆。読めなければ ``ValueError``。"""
        return _CHANGE.validate_json(text)


_CHANGE = TypeAdapter(Change)


def _dump(change: Change) -> str:
    return _CHANGE.dump_json(change, exclude_defaults=True).decode()


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


class Journal:
    """一つのエイリアスの記録。

    Fischer の方式: 次の番号で自分の記録を書き、``settle_seconds`` 待ち、まだ自分のものなら取れた。
    タグの書き込みがそれより速いと仮定する。完全な排他には、変更を一つのジョブに集める。
    落ちた持ち主の変更は、同じマシンならすぐに、ほかのマシンなら ``lease_seconds`` の後に片付く。
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
        # Unity Catalog のタグのキーは . , - = / : を含めない。a-b と a_b の記録は混ぜない
        alias = re.sub(r"[^A-Za-z0-9_]", lambda found: f"_{ord(found[0]):x}_", target.alias)
        self._prefix = f"rollback_{alias}_"

    def history(self) -> list[Change]:
        """残っている記録を、古い順に。手で書き換えられて読めないものは、ないものとする。"""
        slot = re.compile(re.escape(self._prefix) + r"\d+")
        found: list[Change] = []
        for key, text in self.target.tags().items():
            if slot.fullmatch(key):
                try:
                    found.append(Change.from_json(text))
                except ValueError as error:
                    logger.warning("tag %s of %s is unreadable: %s", key, self.target.uri(), error)
        return sorted(found, key=lambda change: change.seq)

    def interrupted(self, history: list[Change]) -> Change | None:
        """途中で落ちた変更。なければ ``None``。

        Raises:
            ConcurrentChangeError: 落ちたのではなく、まだ変更中。
        """
        if not history or history[-1].state != "prepared":
            return None
        change, now = history[-1], self.clock()
        lease = change.lease
        # 遠すぎる期限は、時計の進んだ持ち主が残したもの
        live = lease is not None and now < lease.until < now + 10 * self._lease
        if lease and live and not is_gone(lease.machine, lease.pid):
            until = f"{lease.until.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S} UTC"
            raise ConcurrentChangeError(
                f"{self.target.uri()} is being changed by {change.by}; its lock expires at {until}"
            )
        return change

    @contextmanager
    def claimed(self, change: Change, seen: list[Change]) -> Generator[Change]:
        """``change`` を prepared と記録し、変更してよいのが自分だけになるのを待つ。

        Args:
            seen: ``change`` を決めたときに読んだ記録。

        Raises:
            ConcurrentChangeError: ほかの誰かが先に変更した、または変更中。
        """
        until = self.clock() + self._lease
        lease = Lease(id=uuid.uuid4().hex, until=until, machine=machine(), pid=os.getpid())
        change = replace(change, state="prepared", lease=lease)
        try:
            if self.history() == seen:
                self._write(change)
                self._sleep(self._settle)
            if all(written.lease != lease for written in self.history()):
                raise ConcurrentChangeError(f"another process changed {self.target.uri()} first")
            yield change
        except BaseException:  # Ctrl+C の後も、このプロセスは生きている
            self._let_go(lease)
            raise

    def _let_go(self, lease: Lease) -> None:
        """閉じられなかった変更を、期限を待たずに片付けられるようにする。"""
        with suppress(Exception):  # 変更の結果を、後始末の失敗で隠さない
            for change in self.history():
                if change.lease == lease:
                    self._write(replace(change, lease=None))

    def close(self, change: Change, state: str) -> Change:
        """変更の結果を記録する。"""
        return self._write(replace(change, state=state, lease=None))

    def _write(self, change: Change) -> Change:
        self.target.put_tag(f"{self._prefix}{change.seq % SLOTS}", change.to_json())
        return change
