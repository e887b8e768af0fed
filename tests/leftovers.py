"""テストの実行がどう終わっても(SIGTERM、Ctrl-C、SIGKILL)、起動したプロセスを残さない見張り。

実行ごとの印を環境変数に入れておく。子も孫も受け継ぐので、新しいセッションで起動したものも、
親と離れたものも見分けられる。見張りは別のプロセスで、テストの側が終わるのを待ち、印の付いた
プロセスに SIGTERM を送り、まだいれば強制終了する。/proc を使うので、働くのは Linux だけ。
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
import uuid
from pathlib import Path

VARIABLE = "TESTS_STARTED_BY"
GRACE_SECONDS = 20.0
_POLL_SECONDS = 0.2


@functools.cache
def watch() -> str:
    """起動するものに印を付け、見張りを動かす。印を返す(2 度目からは同じもの)。"""
    mark = uuid.uuid4().hex
    inherited = os.environ.pop(VARIABLE, "")
    if sys.platform == "linux":
        command = [sys.executable, __file__, mark, str(os.getpid())]
        end_of_pipe, _ = os.pipe()  # 書く側は、このプロセスが終わるまで閉じない
        to_stdin = (os.POSIX_SPAWN_DUP2, end_of_pipe, 0)
        os.posix_spawn(command[0], command, os.environ, file_actions=[to_stdin], setsid=True)
        os.close(end_of_pipe)
    os.environ[VARIABLE] = f"{inherited} {mark}".strip()
    return mark


def marked(mark: str) -> dict[int, str]:
    """印の付いたプロセスの、番号とコマンド。"""
    found: dict[int, str] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace").strip()
    return found


def end(mark: str) -> None:
    """印の付いたプロセスを終わらせる。"""
    deadline = time.monotonic() + GRACE_SECONDS
    told: set[int] = set()
    while left := marked(mark):
        late = time.monotonic() > deadline
        for pid in left if late else left.keys() - told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGTERM)
            told.add(pid)
        time.sleep(_POLL_SECONDS)


def main() -> None:
    """標準入力が閉じるか、親が替わるまで待って、片付ける。"""
    mark, parent = sys.argv[1], int(sys.argv[2])
    closed = threading.Event()

    def read() -> None:
        sys.stdin.buffer.read()
        closed.set()

    threading.Thread(target=read, daemon=True).start()
    while os.getppid() == parent and not closed.wait(_POLL_SECONDS):
        pass
    end(mark)


if __name__ == "__main__":
    main()
