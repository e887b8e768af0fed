"""読者として実行している間の見張り(テスト用)。見つけたものをファイルに書き残す。"""

import atexit
import logging
import os
import sys
from collections.abc import Iterator
from types import ModuleType

LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0", "::")
DEFINITIONS = (type, type(lambda: 0), ModuleType, logging.Logger)


def note_connection(event: str, arguments: tuple[object, ...]) -> None:
    """手元の外へ出ようとした接続。"""
    if event == "socket.getaddrinfo":
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else str(host or "127.0.0.1")
    if not name.startswith(LOOPBACK) and name != os.uname().nodename:
        write("CHAPTER8_OUTSIDE_LOG", f"{event} {name}")


def note_second_selves() -> None:
    """``python ページ.py`` のページが公開名でも読み込まれ、2 つの状態が食い違ったもの。"""
    page = sys.modules["__main__"]
    source = os.path.abspath(sys.argv[0])  # noqa: PTH100 (終了のときには __main__.__file__ がない)
    for name, twin in list(sys.modules.items()):
        if name == "__main__" or getattr(twin, "__file__", None) != source:
            continue
        for differing in differences(page, twin):
            write("CHAPTER8_TWIN_LOG", f"{name}.{differing}")


def differences(page: ModuleType, twin: ModuleType) -> Iterator[str]:
    """モジュールの変数のうち、値が違うもの(定義とロガーと __名前__ は除く)。"""
    for name, value in vars(twin).items():
        if name.startswith("__") or isinstance(value, DEFINITIONS):
            continue
        mine = vars(page).get(name)
        if mine is not value and repr(mine).replace("__main__", twin.__name__) != repr(value):
            yield name


def write(variable: str, line: str) -> None:
    with open(os.environ[variable], "a", encoding="utf-8") as log:  # noqa: PTH123
        log.write(f"{line}\n")


if "CHAPTER8_OUTSIDE_LOG" in os.environ:
    sys.addaudithook(note_connection)
if "CHAPTER8_TWIN_LOG" in os.environ:
    atexit.register(note_second_selves)
