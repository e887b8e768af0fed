"""別のプロセスが後で開くポートを選ぶ。

OS に選ばせた番号(``bind(0)``)は、手放した直後に、よその送信用として使われることがある。
OS が自動では割り当てない範囲から選べば、先に開くのは、この番号を渡した相手だけになる。
"""

from __future__ import annotations

import contextlib
import random
import socket

EPHEMERAL_FROM = 32_768  # Linux の既定。Windows と macOS は 49152 から
_given: set[int] = set()


def free_port() -> int:
    """いまは誰も待っていないポート。このプロセスでは同じものを 2 度渡さない。"""
    for port in random.sample(range(20_000, EPHEMERAL_FROM), 500):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
    raise AssertionError("no free port below the ephemeral range")
