"""受信側に共通の、ループバックの HTTP サーバー。届いたものへの答えは、渡された関数が決める。"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..environment import bypass_proxy

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Received:
    """届いたリクエスト 1 件。`headers` は大文字小文字を区別せずに引ける。"""

    path: str
    headers: Message[str, str]
    body: bytes
    at: datetime

    @property
    def json(self) -> Any:
        """本文を JSON として読んだ値。JSON でなければ `json.JSONDecodeError`。"""
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """1 件への答え。`reset=True` なら何も返さずに接続を切る(RST)。"""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes = b"ok"
    delay_seconds: float = 0.0
    reset: bool = False


class LoopbackServer(ThreadingHTTPServer):
    """空いているポートで、すぐに待ち受けを始める。`tls` は証明書と秘密鍵の PEM ファイル。"""

    daemon_threads = True
    request_queue_size = 128  # 既定の 5 では、同時につなぐ相手を 1 秒待たせる

    def __init__(
        self, respond: Callable[[Received], Answer], tls: tuple[Path, Path] | None = None
    ) -> None:
        bypass_proxy()
        self.respond = respond
        self._connections: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(*tls)
            # ハンドシェイクは接続ごとのスレッドで行い、次の接続を待たせない
            self.socket = context.wrap_socket(
                self.socket, server_side=True, do_handshake_on_connect=False
            )
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """ポートと、開いている接続(keep-alive)を閉じる。接続が残ると、まだ答え続ける。"""
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # 相手が切った、TLS が合わない、は受信側の誤りではない
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # ヘッダーと本文を別に書くので、なければ 1 往復に 40 ms かかる
    server: LoopbackServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = Received(self.path, self.headers, body, datetime.now(timezone.utc))
        answer = self.server.respond(request)
        if answer.reset:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            self.connection.close()
        else:
            self._send(answer)

    do_GET = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """標準エラーには何も書かない。"""

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)
