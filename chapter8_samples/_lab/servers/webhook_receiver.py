"""Slack や PagerDuty の代わりに通知を受け取る、ループバックの HTTP サーバー。

届いたものをそのまま記録し、返す答え(状態コード、遅い答え、切断)を前もって決められる。
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..environment import bypass_proxy

__all__ = ["Answer", "Received", "WebhookReceiver"]

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Received:
    """届いたリクエスト 1 件。`headers` は大文字小文字を区別せずに引ける。"""

    path: str
    headers: Message[str, str]
    body: bytes
    at: datetime
    method: str = "POST"

    @property
    def json(self) -> Any:
        """本文を JSON として読んだ値。JSON でなければ `json.JSONDecodeError`。"""
        return json.loads(self.body)


@dataclass(frozen=True)
class Answer:
    """次の 1 件への答え。`reset=True` なら何も返さずに接続を切る(RST)。"""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    body: bytes | str = b"ok"
    delay_seconds: float = 0.0
    reset: bool = False


class WebhookReceiver:
    """通知の受信側。`with WebhookReceiver() as hooks:` の間だけ `hooks.url` で待ち受ける。"""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self._script: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`(末尾に / は付かない)。起動前は RuntimeError。"""
        if self._server is None:
            raise RuntimeError("WebhookReceiver is not running; use it in a with statement")
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> WebhookReceiver:
        """空いているポートで待ち受けを始める。"""
        if self._server is None:
            self._stopping.clear()
            bypass_proxy()
            self._server = _Server(self)
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def stop(self) -> None:
        """ポートを閉じる。記録は残る。何度呼んでもよい。"""
        server, self._server = self._server, None
        if server is not None:
            self._stopping.set()
            server.shutdown()
            server.server_close()

    def __enter__(self) -> WebhookReceiver:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def script(self, *answers: int | Answer) -> None:
        """次に返す答えを順に積む。整数は状態コード。使い切ったあとは 200。"""
        with self._changed:
            self._script.extend(Answer(a) if isinstance(a, int) else a for a in answers)

    def wait_for(self, count: int, timeout_seconds: float = 5) -> list[Received]:
        """`count` 件以上届くまで待ち、届いた全件を返す。間に合わなければ TimeoutError。"""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.received) >= count, timeout_seconds):
                raise TimeoutError(
                    f"{len(self.received)} of {count} webhooks arrived in {timeout_seconds} s"
                )
            return list(self.received)

    def clear(self) -> None:
        """記録と、まだ使っていない答えを捨てる。"""
        with self._changed:
            self.received.clear()
            self._script.clear()

    def answer_to(self, request: Received) -> Answer:
        """1 件を記録し、返すべき答えを取り出す(HTTP の処理から呼ばれる)。"""
        with self._changed:
            self.received.append(request)
            self._changed.notify_all()
            answer = self._script.popleft() if self._script else Answer()
        self._stopping.wait(answer.delay_seconds)
        return answer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # 既定の 5 では、同時につなぐ相手を 1 秒待たせる

    def __init__(self, receiver: WebhookReceiver) -> None:
        self.receiver = receiver
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(
            sys.exc_info()[1], ConnectionError
        ):  # 待ちきれずに切った相手は異常ではない
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # ヘッダーと本文を別に書くので、なければ 1 往復に 40 ms かかる
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        now = datetime.now(timezone.utc)
        request = Received(self.path, self.headers, body, now, self.command)
        answer = self.server.receiver.answer_to(request)
        self._reset() if answer.reset else self._send(answer)

    do_GET = do_PUT = do_PATCH = do_DELETE = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """標準エラーには何も書かない。"""

    def _send(self, answer: Answer) -> None:
        body = answer.body.encode() if isinstance(answer.body, str) else answer.body
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.connection.close()
