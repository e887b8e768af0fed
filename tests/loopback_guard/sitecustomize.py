"""サンプルの実行中に外へ出ようとした接続を、ファイルに書き残す(テスト用)。"""

import os
import sys

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0", "::")


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else str(host or "127.0.0.1")
    if not name.startswith(LOOPBACK) and name != os.uname().nodename:
        with open(os.environ["CHAPTER8_OUTSIDE_LOG"], "a", encoding="utf-8") as log:  # noqa: PTH123
            log.write(f"{event} {name}\n")


if "CHAPTER8_OUTSIDE_LOG" in os.environ:
    sys.addaudithook(_note)
