"""8.3.3 届かなかったフィードバックを手元に残し、後で送り直す。

MLflow サーバーが止まっている間の評価も捨てない。1 件ずつファイルに追記してから送るので、アプリが
途中で落ちても残る。送り直しても、同じ ID のフィードバックは 1 件しか記録されない。

Databricks でも同じコードで動く。ファイルはプロセスごとに分け、再起動しても変わらない名前にする
(例: ワーカーの番号)。pid を名前にすると、落ちたプロセスの残りを引き継ぐものがいなくなる。
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlflow.entities import Assessment

from .delivery import send_feedback
from .request import (
    FeedbackDeliveryError,
    FeedbackError,
    FeedbackRequest,
    TraceNotFoundError,
)

logger = logging.getLogger(__name__)
Send = Callable[..., Assessment]


@dataclass(frozen=True)
class ReplayReport:
    """再送 1 回の結果(件)。"""

    sent: int
    rejected: int
    """サーバーが内容を拒否したので、``*.rejected`` に移した(読めない行も、起動時にそこへ移る)。"""
    remaining: int


class FeedbackOutbox:
    """届くまでファイルに残す送信箱。1 つのプロセスの複数のスレッドから使える。"""

    def __init__(self, path: str | Path, *, send: Send = send_feedback) -> None:
        """``path`` は追記していくファイル。前回の残りがあれば引き継ぐ。"""
        self._path = path = Path(path)
        # 名前の終わりが違うだけの、よその送信箱(box.1 と box.2)とは分ける
        self._rejected = path.with_name(path.name.removesuffix(".jsonl") + ".rejected")
        self._send = send
        self._lock = threading.Lock()
        self._sending: set[str] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._pending = {request.feedback_id: request for request in self._read()}
        if path.exists():
            self._compact()  # 書きかけの最後の行に、次の 1 件をつなげて書かない

    def __len__(self) -> int:
        """まだ届いていない件数。"""
        return len(self._pending)

    def submit(
        self, request: FeedbackRequest, *, timeout_seconds: float = 3.0
    ) -> Assessment | None:
        """送る。期限(秒)までに届かなければ手元に残して ``None`` を返す。

        Raises:
            FeedbackError: サーバーが内容を拒否した(残しても届かない)。
        """
        with self._lock:  # 先に数える(再送の片付けと重なっても、ファイルから消えない)
            self._pending[request.feedback_id] = request
            self._sending.add(request.feedback_id)
        try:
            self._append({"add": request.to_dict()})
            stored = self._send(request, timeout_seconds=timeout_seconds)
        except FeedbackDeliveryError as error:
            logger.warning("feedback %s kept in %s: %s", request.feedback_id, self._path, error)
            return None
        except FeedbackError:
            self._done(request)
            raise
        else:
            self._done(request)
            return stored
        finally:
            self._sending.discard(request.feedback_id)

    def replay(self, *, timeout_seconds: float = 15.0) -> ReplayReport:
        """残っているものを送り直す。サーバーに届かなければ、そこでやめて残りは次に回す。

        トレースが見つからないものは残し、後ろのものを先に送る(1 件が全体を止めない)。
        """
        sent = rejected = 0
        for request in list(self._pending.values()):
            if not self._claim(request):
                continue
            try:
                self._send(request, timeout_seconds=timeout_seconds)
                self._done(request)
                sent += 1
            except TraceNotFoundError as error:
                logger.warning("feedback %s waits for its trace: %s", request.feedback_id, error)
            except FeedbackDeliveryError as error:
                logger.warning("replay stopped, %d left: %s", len(self), error)
                break
            except FeedbackError:
                logger.exception("feedback %s was rejected", request.feedback_id)
                self._append({"add": request.to_dict()}, self._rejected)
                self._done(request)
                rejected += 1
            finally:
                self._sending.discard(request.feedback_id)
        self._compact()
        return ReplayReport(sent=sent, rejected=rejected, remaining=len(self))

    def _claim(self, request: FeedbackRequest) -> bool:
        """ほかのスレッドが送っている最中か、もう届いていれば False。"""
        with self._lock:
            name = request.feedback_id
            free = name in self._pending and name not in self._sending
            if free:
                self._sending.add(name)
            return free

    def _done(self, request: FeedbackRequest) -> None:
        with self._lock:  # 書いてから除くまでに再送の片付けが入ると、届いたものがファイルに戻る
            _write(self._path, "a", _line({"done": request.feedback_id}))
            self._pending.pop(request.feedback_id, None)

    def _append(self, entry: dict[str, Any], path: Path | None = None) -> None:
        with self._lock:
            _write(path or self._path, "a", _line(entry))

    def _read(self) -> list[FeedbackRequest]:
        if not self._path.exists():
            return []
        found: dict[str, FeedbackRequest] = {}
        # 壊れたバイトがあっても、ほかの行は読む
        text = self._path.read_text(encoding="utf-8", errors="backslashreplace")
        for line in text.splitlines():
            try:
                entry: dict[str, Any] = json.loads(line)
                if "add" in entry:
                    request = FeedbackRequest.from_dict(entry["add"])
                    found[request.feedback_id] = request
                else:
                    found.pop(entry["done"], None)
            except (ValueError, TypeError, KeyError):  # 電源が落ちて書きかけの行や、別の版の行
                logger.warning("set aside an unreadable line of %s", self._path)
                self._append({"unreadable": line}, self._rejected)
        return list(found.values())

    def _compact(self) -> None:
        """届いたものを除いたファイルに置き換える(置き換えは一瞬で、途中で落ちても壊れない)。"""
        with self._lock:
            lines = [_line({"add": request.to_dict()}) for request in self._pending.values()]
            fresh = self._path.with_name(self._path.name + ".tmp")
            _write(fresh, "w", "".join(lines))
            fresh.replace(self._path)


def _line(entry: dict[str, Any]) -> str:
    # ASCII だけで書く。U+2028 などは、そのままでは読むときに行の終わりとみなされる
    return json.dumps(entry) + "\n"


def _write(path: Path, mode: Literal["a", "w"], text: str) -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
