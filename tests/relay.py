"""止めたり戻したりできる中継。閉じると、送信先が落ちたのと同じになる。"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit


@contextlib.contextmanager
def relay(port: int, target: str, delay_seconds: float = 0.0) -> Iterator[None]:
    """``port`` で受けて ``target`` へつなぐ。出るときに、ポートと全部の接続を切る。

    ``delay_seconds`` は、返事を返す前に待つ時間(遅いサーバーのまね)。
    """
    goal = urlsplit(target)
    server, open_sockets = socket.create_server(("127.0.0.1", port)), list[socket.socket]()

    def pump(source: socket.socket, sink: socket.socket, delay: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                time.sleep(delay)
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                upstream = socket.create_connection((goal.hostname or "", goal.port or 0))
                open_sockets.extend([client, upstream])
                for way in ((client, upstream, 0.0), (upstream, client, delay_seconds)):
                    threading.Thread(target=pump, args=way, daemon=True).start()

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield
    finally:
        for item in [server, *open_sockets]:
            with contextlib.suppress(OSError):
                item.shutdown(socket.SHUT_RDWR)  # close だけでは、待っている accept が起きない
            item.close()
        acceptor.join()
