"""8.4.5 エイリアスの付け替えを、レジストリ自身のタグに記録する。"""

import logging
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Protocol, TypeVar
logger = logging.getLogger(__name__)
T = TypeVar('T')
SLOTS = 8
MAX_TAG_CHARS = 1000

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

class VerificationError(RollbackError):
    """確認に失敗した。``restored`` は、エイリアスが元のバージョンを指しているか。"""

    def __init__(self, message: str, *, restored: bool) -> None:
        self.restored = restored

@dataclass(frozen=True, kw_only=True)
class Change:
    """エイリアスの変更の記録。"""
    id: str
    seq: int
    action: str
    'promote、rollback、undo。'
    to_version: str
    at: datetime
    by: str
    from_version: str | None = None
    reason: str = ''
    state: str = 'prepared'
    'prepared、done、aborted(切り替わる前に落ちた)、restored(確認に失敗して戻した)、\n    superseded(ほかの誰かが動かした)、dry-run。'
    verified: bool = False
    '切り替えた後の確認まで済んだか。'
    request_id: str | None = None
    undoes: str | None = None

    def to_json(self) -> str:
        """タグの値(1,000 文字以内)。長すぎる理由は切る。"""

    @classmethod
    def from_json(cls, text: str) -> Change:
        """``to_json`` の逆。"""

def default_actor() -> str:
    """誰が変えたか(ユーザー@ホスト:プロセス番号)。"""

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

def done_changes(history: list[Change]) -> list[Change]:
    """済んだ変更だけ。"""

def find_request(history: list[Change], request_id: str | None) -> Change | None:
    """同じ ``request_id`` の済んだ変更。なければ ``None``。"""

class AliasTarget(Protocol):
    """エイリアスとタグを持つもの。モデルとプロンプトの違いはここだけに閉じ込める。"""
    name: str
    alias: str

    def current(self) -> str | None:
        """エイリアスの指すバージョン。なければ ``None``。"""

    def check(self, version: str) -> None:
        """使えるバージョンでなければ ``UnknownVersionError``。"""

    def point(self, version: str | None) -> None:
        """エイリアスを付け替える。``None`` は外す。"""

    def tags(self) -> Mapping[str, str]:
        """登録済みモデル(プロンプト)のタグ。"""

    def put_tag(self, key: str, value: str) -> None:
        """タグを書く。"""

    def drop_tag(self, key: str) -> None:
        """タグを消す。なくてもよい。"""

    def uri(self, version: str | None=None) -> str:
        """確認に使う URI。省略するとエイリアスの URI。"""

class Journal:
    """一つのエイリアスの記録と排他ロック。

    Fischer の方式: 自分のロックを書き、``settle_seconds`` 待ち、まだ自分のものなら取れた。タグの
    書き込みが ``settle_seconds`` より速いと仮定する。完全な排他には、変更を一つのジョブに集める。
    """

    def __init__(self, target: AliasTarget, *, lease_seconds: float=60.0, settle_seconds: float=0.25, clock: Callable[[], datetime]=lambda: datetime.now(timezone.utc), sleep: Callable[[float], None]=time.sleep, actor: str='') -> None:
        self.target, self.lease, self.settle = (target, timedelta(seconds=lease_seconds), settle_seconds)
        self.clock, self._sleep, self.actor = (clock, sleep, actor or default_actor())
        self._prefix = f'rollback_{alias}_'
        self._lock_key = f'{self._prefix}lock'

    def history(self) -> list[Change]:
        """残っている記録を、古い順に。"""

    def _read(self, key: str, text: str, parse: Callable[[str], T]) -> T | None:
        """タグを読む。手で書き換えられて読めないものは、ないものとする。"""

    def write(self, change: Change) -> Change:
        """記録を書く(同じ ``seq`` なら置き換える)。"""

    def next(self, history: list[Change], **fields: Any) -> Change:
        """次の番号の記録を作る(まだ書かない)。"""

    @contextmanager
    def locked(self) -> Generator[Callable[[], None]]:
        """変更の間だけロックを持つ。渡す関数は、まだ自分のものかを確かめて期限を延ばす。

        Raises:
            ConcurrentChangeError: ほかの誰かが変更中。
        """

    def _release(self, me: str) -> None:
        ...

    @property
    def _label(self) -> str:
        ...

    def _holder(self) -> dict[str, Any] | None:
        ...

    def _write_lock(self, me: str) -> None:
        ...

    def _must_hold(self, me: str) -> None:
        ...

    def _renew(self, me: str) -> None:
        ...

def main() -> None:
    """プロンプトのエイリアスを動かし、タグに残った記録と、排他ロックを見る。"""
