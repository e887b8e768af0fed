"""Slack や PagerDuty の代わりに通知を受け取るサーバー。

届いたものをそのまま記録し、返す答え(状態コード、遅い答え、切断)を前もって決められる。
"""

from __future__ import annotations

import threading
from collections import deque

from .http_server import Answer, LoopbackServer, Received


class WebhookReceiver:
    """通知の受信側。`with WebhookReceiver() as hooks:` の間だけ `hooks.url` で待ち受ける。"""

    def __init__(self) -> None:
        self.received: list[Received] = []
        self._script: deque[Answer] = deque()
        self._changed = threading.Condition()
        self._stopping = threading.Event()

    def __enter__(self) -> WebhookReceiver:
        self._server = LoopbackServer(self._respond)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.stop()

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

    def _respond(self, request: Received) -> Answer:
        with self._changed:
            self.received.append(request)
            self._changed.notify_all()
            answer = self._script.popleft() if self._script else Answer()
        self._stopping.wait(answer.delay_seconds)
        return answer
