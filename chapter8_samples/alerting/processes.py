"""8.4 排他の持ち主のプロセスが落ちたことに、期限を待たずに気づく。"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path


def machine() -> str:
    """プロセス番号が通じる範囲。Linux では起動ごと、PID 名前空間(コンテナー)ごとに違う。"""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def is_gone(where: str, pid: int) -> bool:
    """``machine()`` が ``where`` だったプロセス ``pid`` が、もういないと分かるか。"""
    if where != machine() or pid <= 0 or sys.platform == "win32":
        return False  # Windows の os.kill(pid, 0) は、確かめるのではなくシグナルを送る
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # ほかの利用者のプロセスなど
        return False
    return False
