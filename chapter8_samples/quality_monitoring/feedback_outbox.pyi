"""8.3.3 届かなかったフィードバックを手元に残し、後で送り直す。"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from mlflow.entities import Assessment
from .feedback_delivery import FeedbackRequest, send_feedback
logger = logging.getLogger(__name__)
Send = Callable[..., Assessment]

@dataclass(frozen=True)
class ReplayReport:
    """再送 1 回の結果(件)。"""
    sent: int
    rejected: int
    'サーバーが内容を拒否したので、``*.rejected`` に移した(読めない行も、起動時にそこへ移る)。'
    remaining: int

class FeedbackOutbox:
    """届くまでファイルに残す送信箱。1 つのプロセスの複数のスレッドから使える。"""

    def __init__(self, path: str | Path, *, send: Send=send_feedback) -> None:
        """``path`` は追記していくファイル。前回の残りがあれば引き継ぐ。"""
        self._path = path = Path(path)
        self._rejected = path.with_name(path.name.removesuffix('.jsonl') + '.rejected')
        self._send = send
        self._lock = threading.Lock()
        self._sending: set[str] = set()
        self._pending = {request.feedback_id: request for request in self._read()}

    def __len__(self) -> int:
        """まだ届いていない件数。"""

    def submit(self, request: FeedbackRequest, *, timeout_seconds: float=3.0) -> Assessment | None:
        """送る。期限(秒)までに届かなければ手元に残して ``None`` を返す。

        Raises:
            FeedbackError: サーバーが内容を拒否した(残しても届かない)。
        """

    def replay(self, *, timeout_seconds: float=15.0) -> ReplayReport:
        """残っているものを送り直す。サーバーに届かなければ、そこでやめて残りは次に回す。

        トレースが見つからないものは残し、後ろのものを先に送る(1 件が全体を止めない)。
        """

    def _claim(self, request: FeedbackRequest) -> bool:
        """ほかのスレッドが送っている最中か、もう届いていれば False。"""

    def _done(self, request: FeedbackRequest) -> None:
        ...

    def _append(self, entry: dict[str, Any], path: Path | None=None) -> None:
        ...

    def _read(self) -> list[FeedbackRequest]:
        ...

    def _compact(self) -> None:
        """届いたものを除いたファイルに置き換える(置き換えは一瞬で、途中で落ちても壊れない)。"""

def main() -> None:
    """サンプルを実行する。"""
