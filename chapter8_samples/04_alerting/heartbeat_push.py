"""8.4.4 監視の監視: 評価のたびに、生きていることを外へ知らせる。

評価するプロセスが止まれば、アラートも止まり、静かなまま障害が進む。途絶えたら知らせてくれる外の
サービス(Healthchecks など)の URL を、評価のたびに呼び出す。相手が断っても黙っても、評価は妨げない。

実行::

    $ python chapter8_samples/04_alerting/heartbeat_push.py
    1 回目: 届いた {'status': 'ok'}
    相手が黙っていても、評価は待たされない: True
    前の回がまだ終わらなければ、その回は送らない: 見送り 1 回
    相手が断っても、例外にならない: HTTP 404 from 127.0.0.1: not found
    表示: HeartbeatPush(host='127.0.0.1')

Databricks でもそのまま使う。URL はそれ自体が秘密なので、シークレットから環境変数に入れる。
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or __package__:
    from .alert_delivery import HttpPoster, NotificationConfigError, RetryPolicy, json_bytes
else:  # alert_delivery.py と 2 枚だけ写したとき、またはパスで実行したとき
    from alert_delivery import HttpPoster, NotificationConfigError, RetryPolicy, json_bytes

logger = logging.getLogger(__name__)

POLICY = RetryPolicy(attempts=2, base_seconds=1.0, cap_seconds=2.0, deadline_seconds=10.0)
"""一回の知らせに使う上限。届かなくても、次の評価でまた送る。"""


class HeartbeatPush:
    """``run_forever(heartbeat=...)`` に渡す。呼ぶとすぐに戻り、別のスレッドが一度だけ送る。

    Args:
        url: 途絶えたら知らせてくれるサービスの URL。ログにも表示にも出さない。
        http: ``HttpPoster`` の引数(``policy`` など)。

    Raises:
        NotificationConfigError: URL が http(s) でない(URL 自体はメッセージに出さない)。
    """

    def __init__(self, url: str, **http: Any) -> None:
        # 二重に届いても同じ意味なので、届いたか分からない失敗も送り直してよい
        options: dict[str, Any] = {"policy": POLICY, "idempotent": True, **http}
        self._poster = HttpPoster(url, **options)
        self._sending = threading.Lock()
        self.sent, self.failed, self.skipped = 0, 0, 0
        """届いた、届かなかった、前の回が終わらず見送った回数。"""
        self.last_error = ""
        self.last_ok_at: datetime | None = None

    def __repr__(self) -> str:
        return f"HeartbeatPush(host={self._poster.host!r})"

    def __call__(self, status: Mapping[str, Any] | None = None) -> None:
        """生きていることを知らせる。待たず、例外も出さない。

        Args:
            status: 本文に添える JSON。省略すると ``{"status": "ok"}``。
        """
        if not self._sending.acquire(blocking=False):
            self.skipped += 1
            return
        try:
            body = json_bytes(dict(status or {"status": "ok"}))
            threading.Thread(target=self._send, args=(body,), daemon=True).start()
        except Exception as error:  # スレッドを作れない、JSON にできない
            self._note_failure(f"{type(error).__name__} before sending")
            self._sending.release()

    def wait(self, timeout_seconds: float = 12.0) -> bool:
        """送信中なら、終わるまで待つ(1 回だけ評価するプロセスが、終了の前に呼ぶ)。"""
        if not self._sending.acquire(timeout=timeout_seconds):
            return False
        self._sending.release()
        return True

    def _send(self, body: bytes) -> None:
        try:
            result = self._poster.post(body)
            if result["ok"]:
                self.sent, self.last_error = self.sent + 1, ""
                self.last_ok_at = datetime.now(timezone.utc)
            else:
                self._note_failure(result["error"])
        except Exception as error:  # 例外の文には URL が入りうるので、型だけを残す
            self._note_failure(f"{type(error).__name__} from {self._poster.host}")
        finally:
            self._sending.release()

    def _note_failure(self, error: str) -> None:
        self.failed, self.last_error = self.failed + 1, error
        logger.warning("heartbeat was not delivered: %s", error)


def heartbeat_from_env(variable: str, environ: Mapping[str, str]) -> HeartbeatPush:
    """環境変数から作る。

    Raises:
        NotificationConfigError: 環境変数がない、または URL でない。
    """
    if not environ.get(variable):
        raise NotificationConfigError(
            f"environment variable {variable} is not set; put the heartbeat URL in it"
        )
    return HeartbeatPush(environ[variable])


def main() -> None:
    """届く、黙られる、断られる相手に、評価と同じように知らせる。"""
    from chapter8_samples._lab.receivers import Answer, WebhookReceiver

    logging.getLogger(__name__).setLevel(logging.ERROR)
    with WebhookReceiver() as hooks:
        push = HeartbeatPush(f"{hooks.url}/ping/SECRET")
        push()
        push.wait()
        print("1 回目:", "届いた" if push.sent else push.last_error, hooks.received[0].json)
        hooks.script(Answer(200, delay_seconds=1.5), Answer(404, body=b"not found"))
        began = time.monotonic()
        push()
        push()
        print("相手が黙っていても、評価は待たされない:", time.monotonic() - began < 1.0)
        print(f"前の回がまだ終わらなければ、その回は送らない: 見送り {push.skipped} 回")
        push.wait()
        push()
        push.wait()
        print("相手が断っても、例外にならない:", push.last_error)
        print("表示:", push)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # インストールなしでも動くように
    main()
