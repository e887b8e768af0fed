"""8.4 プロセス: 排他の持ち主が落ちたことに期限を待たずに気づき、fork した先で作り直す。"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from weakref import WeakMethod


def machine() -> str:
    """プロセス番号が通じる範囲。Linux では起動ごと、PID 名前空間(コンテナー)ごとに違う。"""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def renew_after_fork(renew: Callable[[], None]) -> None:
    """fork した先で ``renew``(メソッド)を呼ぶ。親のロックや接続は、そこでは使えない。"""
    if hasattr(os, "register_at_fork"):
        kept = WeakMethod(renew)
        os.register_at_fork(after_in_child=lambda: (method := kept()) and method())


def is_gone(where: str, pid: int) -> bool:
    """``machine()`` が ``where`` だったプロセス ``pid`` が、もういないと分かるか。"""
    if where != machine() or pid <= 0 or sys.platform == "win32":
        return False  # Windows の os.kill(pid, 0) は、確かめるのではなくシグナルを送る
    try:
        os.kill(pid, 0)
        # 落ちても、親(コンテナーの PID 1 など)が片付けるまでは、番号が残る
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2][:1]
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # ほかの利用者のプロセス、/proc のない OS など
        return False
    return state == b"Z"
