"""8.4.4 監視の監視: 評価のたびに、生きていることを外へ知らせる。"""

import logging
import threading
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from .alert_delivery import HttpPoster, RetryPolicy
logger = logging.getLogger(__name__)
POLICY = RetryPolicy(attempts=2, base_seconds=1.0, cap_seconds=2.0, deadline_seconds=10.0)

class HeartbeatPush:
    """``run_forever(heartbeat=...)`` に渡す。呼ぶとすぐに戻り、別のスレッドが一度だけ送る。

    Args:
        url: 途絶えたら知らせてくれるサービスの URL。ログにも表示にも出さない。
        http: ``HttpPoster`` の引数(``policy`` など)。

    Raises:
        NotificationConfigError: URL が http(s) でない(URL 自体はメッセージに出さない)。
    """

    def __init__(self, url: str, **http: Any) -> None:
        self._poster = HttpPoster(url, **options)
        self._sending = threading.Lock()
        self.sent, self.failed, self.skipped = (0, 0, 0)
        self.last_error = ''
        self.last_ok_at: datetime | None = None

    def __repr__(self) -> str:
        ...

    def __call__(self, status: Mapping[str, Any] | None=None) -> None:
        """生きていることを知らせる。待たず、例外も出さない。

        Args:
            status: 本文に添える JSON。省略すると ``{"status": "ok"}``。
        """

    def wait(self, timeout_seconds: float=12.0) -> bool:
        """送信中なら、終わるまで待つ(1 回だけ評価するプロセスが、終了の前に呼ぶ)。"""

    def _send(self, body: bytes) -> None:
        ...

    def _note_failure(self, error: str) -> None:
        ...

def heartbeat_from_env(variable: str, environ: Mapping[str, str]) -> HeartbeatPush:
    """環境変数から作る。

    Raises:
        NotificationConfigError: 環境変数がない、または URL でない。
    """

def main() -> None:
    """届く、黙られる、断られる相手に、評価と同じように知らせる。"""
