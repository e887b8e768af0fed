"""8.1.4 送り終えていないトレースと、失ったトレースを 1 件まで数える。

MLflow は、送れなかったトレースをログに書くだけで、あふれて捨てた分はログにも出さない。ここでは
「終わったトレース」から「サーバーが受け取ったと答えたもの」を引く。どこで消えても、引き算に残る。
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import mlflow
from mlflow.entities import LiveSpan

from .. import _internals
from .text import as_utf8

logger = logging.getLogger(__name__)

_MAX_WAITING = 100_000  # 約 20 MB。MLflow が抱える件数(burst で 2 万件)より、ずっと多い
_SETTLE_SECONDS = 1.0  # 終わってからこれだけたてば、MLflow のキューに入っている


class Ledger:
    """終わったトレースと、その行き先の帳簿(プロセスに 1 つ)。"""

    def __init__(self) -> None:
        self.spool: Any = None  # 送る前に書く TraceSpool
        self.problem = ""  # 数えられないときの理由
        self._pipeline: Any = None
        self.start_over()

    def start_over(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._waiting: dict[str, float] = {}  # 終わった時刻
        self._torn: set[str] = set()  # そのうち、スパンは届き、タグやメタデータがまだのもの
        self._dropped = 0
        self._reported = 0
        self._failure = ""
        self._sending = 0
        self._slowest = 0.0
        self._paused_until = 0.0
        self._forking_until = 0.0
        self.closed = False

    # ---- MLflow の送信に立ち会う ----

    def attach_if_rebuilt(self, span: LiveSpan) -> None:
        """スパンプロセッサー: MLflow がプロバイダーを作り直していたら、立ち会い直す。"""
        if _internals.pipeline_of(span) is not self._pipeline:
            self.attach()

    def attach(self) -> None:
        """いまの送信処理に、まだなら立ち会う。"""
        _watch_forks()
        if self.problem:
            return
        try:
            with self._changed:
                self._pipeline = _internals.current_pipeline()
                for processor in _internals.mlflow_processors():
                    _internals.watch_export(processor, self, as_utf8)
        except AttributeError as error:  # 数えられなくても、記録は続ける
            self.problem = f"MLflow {mlflow.__version__} has changed: {error}"
            logger.warning("undelivered traces are not counted: %s", self.problem)

    def send(self, name: str, call: Callable[..., Any], *values: Any) -> Any:
        """MLflow の送信を 1 つ通して、結果を記す。閉じた後は、送らずに終える。"""
        if not self._may_send():
            return values[-1]
        started = time.monotonic()
        ids = _trace_ids(name, values)
        try:
            answer = call(*as_utf8(values))
            if name == "export" and answer.name == "FAILURE":
                self.lost(ids, "the OTLP endpoint did not accept the spans")
            else:
                self.arrived(ids, whole=name != "log_spans")
            return answer
        except Exception as error:
            # スパンだけを送れなくても、MLflow は続く start_trace の後で全体を送り直す
            self.lost(() if name == "log_spans" else ids, f"{type(error).__name__}: {error}")
            raise
        finally:
            self._sent(time.monotonic() - started)

    def _may_send(self) -> bool:
        with self._changed:
            while not self.closed and time.monotonic() < max(
                self._paused_until, self._forking_until
            ):
                self._changed.wait(0.02)
            if not self.closed:
                self._sending += 1
            return not self.closed

    def _sent(self, seconds: float) -> None:
        with self._changed:
            self._sending -= 1
            self._slowest = max(seconds, 0.9 * self._slowest)
            self._changed.notify_all()

    # ---- 帳簿 ----

    def ended(self, trace_id: str) -> None:
        """送信を待つトレースが増えた。多すぎれば、古いものからまとめて、失ったことにする。"""
        oldest: list[str] = []
        with self._changed:
            self._waiting[trace_id] = time.monotonic()
            if len(self._waiting) > _MAX_WAITING:  # 止まったサーバーへの、MLflow が捨てた分
                oldest = list(itertools.islice(self._waiting, _MAX_WAITING // 100))
        if oldest:
            self.lost(oldest, f"more than {_MAX_WAITING} traces wait to be sent")

    def arrived(self, trace_ids: Iterable[str], *, whole: bool = True) -> None:
        """サーバーかディスクが受け取った(``whole=False`` は、スパンだけ)。"""
        with self._changed:
            if whole:
                self._forget(trace_ids)
            else:
                self._torn |= self._waiting.keys() & trace_ids

    def lost(self, trace_ids: Iterable[str], reason: str) -> None:
        with self._changed:
            self._dropped += self._forget(trace_ids)
            self._failure = self._failure or reason[:200]

    def _forget(self, trace_ids: Iterable[str]) -> int:
        """待つのをやめ、スパンも届いていない件数を返す。"""
        known = self._waiting.keys() & trace_ids
        missing = len(known - self._torn)
        self._torn -= known
        for trace_id in known:
            del self._waiting[trace_id]
        return missing

    def waiting(self, ended_before: float) -> list[str]:
        """それまでに終わったのに届かないトレース(まだ終わらない子を待つものは除く)。"""
        with self._changed:
            old = [key for key, ended in self._waiting.items() if ended <= ended_before]
        return [trace_id for trace_id in old if not _internals.has_open_spans(trace_id)]

    def settle(self) -> None:
        """MLflow のキューが空なのに届いていないトレースは、途中で捨てられている。"""
        if not _internals.export_is_idle():
            return
        if gone := self.waiting(time.monotonic() - _SETTLE_SECONDS):
            self.lost(gone, f"MLflow discarded {len(gone)} traces or their tags (full queue)")

    def counts(self) -> tuple[int, int, int]:
        """いまの(待つ件数, 失った件数, ディスクの件数)。"""
        self.attach()
        self.settle()
        spooled = self.spool.stats().pending if self.spool else 0
        return len(self._waiting), self._dropped, spooled

    # ---- 期限つきのフラッシュ ----

    def grace_seconds(self, timeout_seconds: float) -> float:
        """期限のうち、送り始めたものの返事だけを待つ時間。"""
        return min(0.2 + 1.5 * self._slowest, 3.0, timeout_seconds / 2)

    def stop_sending(self, grace_seconds: float, *, for_good: bool) -> None:
        """新しく送るのを 2 秒(``for_good`` なら最後まで)止め、送り始めたものの返事を待つ。

        続けて呼ばれても、次の 2 秒は止めない。その間に届く分も、届かない方に数えられる。
        """
        now = time.monotonic()
        if for_good or now > self._paused_until + 2.0:  # 止め続けると、1 件も届かない
            self._paused_until = now + grace_seconds + 2.0
        with self._changed:
            self._changed.wait_for(lambda: self._sending <= 0, grace_seconds)
            if for_good:
                self.closed = True
                self._dropped += self._forget(set(self._waiting))

    def hold(self) -> None:
        """fork の間、送るのを止める(送るスレッドが握るロックは、子では永久に開かない)。

        fork が待つロックを、送り終えるのを待つスレッドが握ることもあるので、2 秒で再開する。
        """
        grace = self.grace_seconds(4.0)
        with self._changed:
            self._forking_until = time.monotonic() + grace + 2.0
            self._changed.wait_for(lambda: self._sending <= 0, grace)

    def resume(self) -> None:
        self._forking_until = 0.0

    def renew(self) -> None:
        """fork した子で、新しい帳簿と送信処理にする。親の残りは親が送る。"""
        self.start_over()
        _internals.renew_provider()

    def report(self, *, finished: bool) -> tuple[int, str | None]:
        """前回の後に失った件数(送り終えていなければ、待っている分も)と、失敗の説明。"""
        with self._changed:
            count = self._dropped - self._reported
            if not finished:
                count += len(self._waiting.keys() - self._torn)
            failure = self._failure
            self._reported = self._dropped
            self._failure = ""
        return count, f"export failures: {failure}" if failure else None


def _trace_ids(name: str, values: tuple[Any, ...]) -> set[str]:
    if name == "start_trace":
        return {values[0].trace_id}
    if name == "log_spans":
        return {span.trace_id for span in values[1] if span.parent_id is None}
    if name == "export":
        return {_internals.mlflow_trace_id(span) for span in values[0] if span.parent is None}
    return set()


LEDGER = Ledger()


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=LEDGER.hold, after_in_parent=LEDGER.resume, after_in_child=LEDGER.renew
        )


def start_counting() -> Callable[[], None]:
    """数え始める(接続はしない)。MLflow が送信処理を作り直しても、戻り値を呼ぶまで追う。"""
    LEDGER.attach()
    return _internals.watch_provider(LEDGER.attach)
