"""8.1.4 送り終えていないトレースと、失ったトレースを 1 件まで数える。

MLflow は送れなかったトレースをログに書くだけで、数えない。キューからあふれた分や、置き場から
追い出された分は、ログにも出ない。ここでは「終わったトレース」から「サーバーが受け取ったと答えた
もの」を引く。途中のどこで消えても、引き算に残る。
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .._internals import (
    ExportHooks,
    export_is_idle,
    has_open_spans,
    mlflow_trace_id,
    watch_provider,
)
from .text import send_as_utf8

logger = logging.getLogger(__name__)

_SETTLE_SECONDS = 1.0
_LONGEST_GRACE_SECONDS = 3.0
_PAUSE_SECONDS = 2.0


@dataclass(frozen=True)
class DeliveryCounts:
    """送信のいまの件数。数え始めは ``setup_production_tracing`` か ``setup_graceful_shutdown``。"""

    backlog: int
    """終わったが、まだサーバーにもディスクにも届いていないトレース。"""
    dropped: int
    """数え始めてから失ったトレース(キューの満杯、置き場からの追い出し、送信の失敗)。"""
    spooled: int
    """``TraceSpool`` のディスクで送信を待つトレース。"""


class Ledger:
    """終わったトレースと、その行き先の帳簿(プロセスに 1 つ)。"""

    def __init__(self) -> None:
        self.spooled: Callable[[], int] = lambda: 0
        self.hooks = ExportHooks(self.root_ended, self.send)
        self.problem = ""
        """数えられないときの理由(MLflow の内部が変わったなど)。"""
        self._users = 0
        self._unwatch: Callable[[], None] | None = None
        self.start_over()

    def start_over(self) -> None:
        """空にする(fork した子では、親の分は親が送る)。"""
        self._changed = threading.Condition(threading.Lock())
        self._waiting: dict[str, float] = {}
        self._half: dict[str, float] = {}  # スパンだけが届き、タグやメタデータがまだのもの
        self._early: deque[str] = deque(maxlen=64)  # 終わりの知らせより先に届いたもの
        self._dropped = self._reported = self._failures = self._sending = 0
        self._first_failure = ""
        self._slowest = self._paused_until = 0.0
        self.closed = False

    def open(self, follow: bool) -> None:
        """数え始める(使う側の数だけ重ねてよい)。"""
        self._users += 1
        if follow and self._unwatch is None:
            self._unwatch = watch_provider(self.attach)
        self.attach()
        _watch_forks()

    def attach(self) -> None:
        """まだなら、いまのプロバイダーにつなぐ(作られるたびに呼ばれる)。"""
        if not self._users or self.problem:
            return
        try:
            for trace_id in self.hooks.attach():
                self.ended(trace_id)
        except RuntimeError as error:  # 数えられなくても、記録は続ける
            self.problem = str(error)
            logger.warning("undelivered traces are not counted: %s", error)

    def release(self) -> None:
        """使う側が 1 つ減った。最後の 1 つなら、MLflow を元に戻す。"""
        self._users -= 1
        if self._users == 0:
            if self._unwatch is not None:
                self._unwatch()
                self._unwatch = None
            self.hooks.detach()
            self.start_over()

    def root_ended(self, trace_id: str) -> None:
        """ルートスパンが終わった。

        8.5 の設定のように、知らせる役だけが新しいプロバイダーに移されていることがある。そのときは
        つなぎ直し、まだ送信を待っているものから数える。
        """
        if self.hooks.is_attached():
            self.ended(trace_id)
        else:
            self.attach()

    def ended(self, trace_id: str) -> None:
        """送信を待つトレースが増えた。"""
        with self._changed:
            if trace_id not in self._early:
                self._waiting[trace_id] = time.monotonic()

    def arrived(self, trace_ids: Iterable[str], *, whole: bool = True) -> None:
        """サーバーかディスクが受け取った(``whole=False`` はスパンだけ)。"""
        with self._changed:
            for trace_id in trace_ids:
                ended = self._waiting.pop(trace_id, None)
                if whole:
                    self._half.pop(trace_id, None)
                    if ended is None:
                        self._early.append(trace_id)
                elif ended is not None:
                    self._half[trace_id] = ended

    def lost(self, trace_ids: Iterable[str], reason: str) -> None:
        """もう届かない。"""
        with self._changed:
            for trace_id in trace_ids:
                self._dropped += self._waiting.pop(trace_id, None) is not None
                self._half.pop(trace_id, None)
            self._failures += 1
            self._first_failure = self._first_failure or reason[:200]

    def send(self, name: str, call: Callable[..., Any], *values: Any) -> Any:
        """MLflow の送信を 1 つ通して、結果を記す。閉じた後は、送らずに終える。"""
        if not self._may_send():
            return values[-1]
        started = time.monotonic()
        ids = _trace_ids(name, values)
        try:
            answer = send_as_utf8(call, *values)
            if name == "export" and answer.name == "FAILURE":
                self.lost(ids, "the OTLP endpoint did not accept the spans")
            else:
                self.arrived(ids, whole=name != "log_spans")
            return answer
        except BaseException as error:
            # スパンだけを送れなくても、MLflow は続く start_trace の後で全体を送り直す
            self.lost([] if name == "log_spans" else ids, f"{type(error).__name__}: {error}")
            raise
        finally:
            self._sent(time.monotonic() - started)

    def _may_send(self) -> bool:
        while not self.closed and time.monotonic() < self._paused_until:
            time.sleep(0.02)
        with self._changed:
            self._sending += not self.closed
            return not self.closed

    def _sent(self, seconds: float) -> None:
        with self._changed:
            self._sending -= 1
            self._slowest = max(seconds, 0.9 * self._slowest)
            self._changed.notify_all()

    def grace_seconds(self, timeout_seconds: float) -> float:
        """期限のうち、送り始めたものの返事だけを待つ時間。"""
        wanted = min(0.2 + 1.5 * self._slowest, _LONGEST_GRACE_SECONDS)
        return min(wanted, timeout_seconds / 2)

    def stop_sending(self, grace_seconds: float, *, for_good: bool) -> None:
        """新しく送り始めるのを止め、送り始めたものの返事を待つ。残りの件数は、これで動かない。

        ``for_good`` なら二度と送らず、残りは失ったと数える。でなければ、2 秒後にまた送り始める。
        """
        self._paused_until = time.monotonic() + grace_seconds + _PAUSE_SECONDS
        with self._changed:
            self._changed.wait_for(lambda: self._sending <= 0, grace_seconds)
            if for_good:
                self.closed = True
                self._dropped += len(self._waiting)
                self._waiting.clear()

    def waits_for(self, before: float) -> bool:
        """``before`` までに終わったのに、まだ届かないものがあるか(子の終わりを待つものは除く)。"""
        with self._changed:
            old = [trace_id for trace_id, ended in self._waiting.items() if ended <= before]
        return any(not has_open_spans(trace_id) for trace_id in old)

    def settle(self, older_than_seconds: float = 0.0) -> None:
        """MLflow のキューが空なのに届いていないトレースは、途中で捨てられている。"""
        limit = time.monotonic() - older_than_seconds
        with self._changed:
            old = [trace_id for trace_id, ended in self._waiting.items() if ended <= limit]
            half = [trace_id for trace_id, ended in self._half.items() if ended <= limit]
        if not (old or half) or not export_is_idle():
            return
        if gone := [trace_id for trace_id in old if not has_open_spans(trace_id)]:
            self.lost(gone, f"MLflow discarded {len(gone)} traces (a queue was full)")
        if torn := [trace_id for trace_id in half if not has_open_spans(trace_id)]:
            self.lost(torn, f"{len(torn)} traces are stored without their tags and metadata")

    def take_failures(self) -> str | None:
        """前回からの失敗の説明。なければ ``None``。"""
        with self._changed:
            count, first = self._failures, self._first_failure
            self._failures, self._first_failure = 0, ""
        return f"{count} export failures, first: {first}" if count else None

    def report(self, *, finished: bool) -> int:
        """前回の報告の後に失った件数。送り終えていなければ、待っている件数も足す。"""
        with self._changed:
            new, self._reported = self._dropped - self._reported, self._dropped
            return new if finished else new + len(self._waiting)

    def counts(self) -> DeliveryCounts:
        """いまの件数。"""
        self.attach()
        self.settle(_SETTLE_SECONDS)
        with self._changed:
            backlog = len(self._waiting) + len(self._half)
        return DeliveryCounts(backlog, self._dropped, self.spooled())


def _trace_ids(name: str, values: tuple[Any, ...]) -> list[str]:
    """1 回の送信で届くトレース。"""
    if name == "start_trace":
        return [values[0].trace_id]
    if name == "log_spans":
        return [span.trace_id for span in values[1] if span.parent_id is None]
    if name == "export":
        return [mlflow_trace_id(span) for span in values[0] if span.parent is None]
    return []


LEDGER = Ledger()


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=LEDGER.start_over)


def start_counting(*, follow: bool = True) -> None:
    """数え始める。接続もプロバイダーの作成もしない。

    Args:
        follow: MLflow がプロバイダーを作り直したら、すぐにつなぎ直す(MLflow の関数を 1 つ包む)。
            ``False`` なら何も包まず、``keep_counting`` か ``delivery_counts`` のときにつなぐ。
    """
    LEDGER.open(follow)


def keep_counting() -> None:
    """プロバイダーが作り直されていれば、つなぎ直す。"""
    LEDGER.attach()


def stop_counting() -> None:
    """``start_counting`` を 1 回分取り消す。"""
    LEDGER.release()


def delivery_counts() -> DeliveryCounts:
    """送信待ち、消失、ディスクの件数。"""
    return LEDGER.counts()
