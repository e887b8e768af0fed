"""親がどう終わっても子のプロセスグループを残さないための監視プロセス(標準ライブラリーだけで動く)。

親はこのスクリプトを新しいセッションで起動し、標準入力のパイプを握っておく。親が終われば
(SIGKILL でも)OS がパイプを閉じるので、読み取りの終わり(EOF)が「止めよ」の合図になる。
パイプを引き継いだプロセス(親が fork した子)が残っても気づけるように、親が替わったかも見る。
正常な停止も同じ道を通る::

    python process_guard.py GRACE_SECONDS COMMAND [ARG ...]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

PARENT_POLL_SECONDS = 0.5


def kill_group(child_pid: int) -> None:
    """自分を含むグループ(Windows では子の木)を残らず終わらせる。"""
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(child_pid)], check=False)
    else:
        os.killpg(0, signal.SIGKILL)


def end_of_input() -> None:
    """標準入力が閉じるまで待つ。"""
    sys.stdin.buffer.read()


def end_of_parent() -> None:
    """親のプロセスが終わるまで待つ(Windows では、親が終わっても番号は変わらない)。"""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(PARENT_POLL_SECONDS)


def stop_after(
    signal_to_stop: Callable[[], None], child: subprocess.Popen[bytes], grace_seconds: float
) -> None:
    """合図を待って SIGTERM、`grace_seconds` 秒後にもまだいれば強制終了。"""
    signal_to_stop()
    child.terminate()
    time.sleep(grace_seconds)
    kill_group(child.pid)


def main() -> None:
    """コマンドを起動して監視し、終わったら残りのプロセスを片付ける。"""
    grace_seconds, command = float(sys.argv[1]), sys.argv[2:]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    for wait in (end_of_input, end_of_parent):
        threading.Thread(target=stop_after, args=(wait, child, grace_seconds), daemon=True).start()
    status = child.wait()
    sys.stderr.write(f"process_guard: command exited with status {status}\n")
    sys.stderr.flush()
    kill_group(child.pid)


if __name__ == "__main__":
    main()
