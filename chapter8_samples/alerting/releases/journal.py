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
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

SLOTS = 8
"""残す記録の数。Unity Catalog のタグは 50 個まで。"""
MAX_TAG_CHARS = 1000
"""Unity Catalog のタグの値の上限(OSS の MLflow は 100,000 文字)。"""


class RollbackError(RuntimeError):
    """ロールバックまわりの失敗の親。"""


class UnknownVersionError(RollbackError):
    """そのバージョンがない、または使える状態でない。"""


class SameVersionError(RollbackError):
    """エイリアスはすでにそのバージョンを指している。"""


class NoHistoryError(RollbackError):
    """戻る先、または取り消す対象の記録がない。"""


class CooldownError(RollbackError):
    """前のロールバックから間がない。"""


class KnownBadVersionError(RollbackError):
    """一度ロールバックで退けたバージョンに切り替えようとした。"""


class ConcurrentChangeError(RollbackError):
    """ほかの誰かが同時に変更している、または変更した。"""


class GateRefusedError(RollbackError):
    """昇格前の検査が、いまのバージョンより悪くないと認めなかった。"""


class VerificationError(RollbackError):
    """確認に失敗した。``restored`` は、エイリアスが元のバージョンを指しているか。"""

    def __init__(self, message: str, *, restored: bool) -> None:
        super().__init__(message)
        self.restored = restored


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
    verified: bool = False
    """切り替えた後の確認まで済んだか。"""
    request_id: str | None = None
    undoes: str | None = None

    def to_json(self) -> str:
        """タグの値(1,000 文字以内)。長すぎる理由は切る。"""
        data = {**asdict(self), "at": self.at.timestamp()}
        text = _compact(data)
        if (extra := len(text) - MAX_TAG_CHARS) > 0:
            text = _compact({**data, "reason": self.reason[: max(0, len(self.reason) - extra - 8)]})
        return text

    @classmethod
    def from_json(cls, text: str) -> Change:
        """``to_json`` の逆。"""
        data: dict[str, Any] = json.loads(text)
        data["seq"] = int(data["seq"])
        data["at"] = datetime.fromtimestamp(data["at"], timezone.utc)
        return cls(**data)


def _compact(data: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in data.items() if value not in (None, "", False)}
    return json.dumps(kept, ensure_ascii=False, separators=(",", ":"))


def _read_lock(text: str) -> dict[str, Any]:
    lock: dict[str, Any] = json.loads(text)
    return {"id": str(lock["id"]), "until": float(lock["until"]), "by": lock["by"]}


def default_actor() -> str:
    """誰が変えたか(ユーザー@ホスト:プロセス番号)。"""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"{user}@{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """変更のしかた。

    Attributes:
        expected: いまのバージョンがこれでなければ ``ConcurrentChangeError``。
        dry_run: 検査だけして、何も変えない。
        force: 待ち時間と、退けたバージョンの拒否を無視する。
        request_id: 同じ ID の変更が済んでいれば、その記録を返すだけにする。
    """

    expected: str | int | None = None
    dry_run: bool = False
    force: bool = False
    request_id: str | None = None


def known_bad(history: list[Change]) -> set[str]:
    """ロールバックで退けられ、その後で使うと決め直されていないバージョン。"""
    bad = set[str]()
    for change in done_changes(history):
        bad.discard(change.to_version)  # 取り消した、または force で使うと決め直した
        if change.action == "rollback" and change.from_version:
            bad.add(change.from_version)
    return bad


def done_changes(history: list[Change]) -> list[Change]:
    """済んだ変更だけ。"""
    return [change for change in history if change.state == "done"]


def find_request(history: list[Change], request_id: str | None) -> Change | None:
    """同じ ``request_id`` の済んだ変更。なければ ``None``。"""
    found = [c for c in done_changes(history) if request_id and c.request_id == request_id]
    return found[-1] if found else None


class AliasTarget(Protocol):
    """エイリアスとタグを持つもの。モデルとプロンプトの違いはここだけに閉じ込める。"""

    name: str
    alias: str

    def current(self) -> str | None:
        """エイリアスの指すバージョン。なければ ``None``。"""
        ...

    def check(self, version: str) -> None:
        """使えるバージョンでなければ ``UnknownVersionError``。"""
        ...

    def point(self, version: str | None) -> None:
        """エイリアスを付け替える。``None`` は外す。"""
        ...

    def tags(self) -> Mapping[str, str]:
        """登録済みモデル(プロンプト)のタグ。"""
        ...

    def put_tag(self, key: str, value: str) -> None:
        """タグを書く。"""
        ...

    def drop_tag(self, key: str) -> None:
        """タグを消す。なくてもよい。"""
        ...

    def uri(self, version: str | None = None) -> str:
        """確認に使う URI。省略するとエイリアスの URI。"""
        ...


class Journal:
    """一つのエイリアスの記録と排他ロック。

    Fischer の方式: 自分のロックを書き、``settle_seconds`` 待ち、まだ自分のものなら取れた。タグの
    書き込みが ``settle_seconds`` より速いと仮定する。完全な排他には、変更を一つのジョブに集める。
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
        self.target, self.lease, self.settle = (
            target,
            timedelta(seconds=lease_seconds),
            settle_seconds,
        )
        self.clock, self._sleep, self.actor = clock, sleep, actor or default_actor()
        # Unity Catalog のタグのキーは . , - = / : を含めない。a-b と a_b の記録は混ぜない
        alias = re.sub(r"[^A-Za-z0-9_]", lambda found: f"_{ord(found[0]):x}_", target.alias)
        self._prefix = f"rollback_{alias}_"
        self._lock_key = f"{self._prefix}lock"

    def history(self) -> list[Change]:
        """残っている記録を、古い順に。"""
        tags = self.target.tags()
        slots = re.compile(re.escape(self._prefix) + r"\d+")
        changes = [
            self._read(k, v, Change.from_json) for k, v in tags.items() if slots.fullmatch(k)
        ]
        return sorted(filter(None, changes), key=lambda change: change.seq)

    def _read(self, key: str, text: str, parse: Callable[[str], T]) -> T | None:
        """タグを読む。手で書き換えられて読めないものは、ないものとする。"""
        try:
            return parse(text)
        except (ValueError, TypeError, KeyError, OverflowError, OSError) as error:
            logger.warning("tag %s of %s is unreadable: %s", key, self._label, error)
            return None

    def write(self, change: Change) -> Change:
        """記録を書く(同じ ``seq`` なら置き換える)。"""
        self.target.put_tag(f"{self._prefix}{change.seq % SLOTS}", change.to_json())
        return change

    def next(self, history: list[Change], **fields: Any) -> Change:
        """次の番号の記録を作る(まだ書かない)。"""
        seq = history[-1].seq + 1 if history else 1
        at, by = self.clock(), self.actor
        return Change(id=uuid.uuid4().hex[:8], seq=seq, at=at, by=by, **fields)

    @contextmanager
    def locked(self) -> Generator[Callable[[], None]]:
        """変更の間だけロックを持つ。渡す関数は、まだ自分のものかを確かめて期限を延ばす。

        Raises:
            ConcurrentChangeError: ほかの誰かが変更中。
        """
        me = uuid.uuid4().hex
        held = self._holder()
        if held and held["until"] > self.clock().timestamp():
            raise ConcurrentChangeError(f"{self._label} is being changed by {held['by']}")
        self._write_lock(me)
        self._sleep(self.settle)
        self._must_hold(me)
        try:
            yield lambda: self._renew(me)
        finally:
            self._release(me)

    def _release(self, me: str) -> None:
        try:
            if (self._holder() or {}).get("id") == me:
                self.target.drop_tag(self._lock_key)
        except Exception as error:  # 変更の結果(成功か失敗か)を、後始末の失敗で隠さない
            logger.warning("lock on %s is left to expire: %s", self._label, error)

    @property
    def _label(self) -> str:
        return f"{self.target.name}@{self.target.alias}"

    def _holder(self) -> dict[str, Any] | None:
        text = self.target.tags().get(self._lock_key)
        return self._read(self._lock_key, text, _read_lock) if text else None

    def _write_lock(self, me: str) -> None:
        until = (self.clock() + self.lease).timestamp()
        value = json.dumps({"id": me, "until": until, "by": self.actor})
        self.target.put_tag(self._lock_key, value)

    def _must_hold(self, me: str) -> None:
        if (self._holder() or {}).get("id") != me:
            raise ConcurrentChangeError(f"another process won the lock on {self._label}")

    def _renew(self, me: str) -> None:
        self._must_hold(me)
        self._write_lock(me)
