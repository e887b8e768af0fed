"""8.1.4 サーバー停止中のトレースを失わない(いったんディスクに置いて後で送る)。

MLflow は送れなかったトレースを捨てる。ここでは完成したトレースを先にファイルへ書き、背後で送り、
送れたら消す。サーバーが止まっていても、プロセスが終わっても、後で同じ ID のまま送り直せる。

Databricks では、スパンを成果物の置き場に送る経路になるため未対応である(OpenTelemetry Collector の
永続キューを使う)。MLflow サーバーと SQLite で使える。残ったファイルは次のコマンドでも送れる::

    python -m chapter8_samples.production_tracing replay DIR
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from mlflow.entities import Span, Trace
from mlflow.exceptions import MlflowException

from .._internals import tracing_client
from ..metadata import sends_only_otlp
from .counts import LEDGER, start_counting, stop_counting
from .text import as_utf8, send_as_utf8

logger = logging.getLogger(__name__)

Deliver = Callable[[Sequence[Trace]], None]
_BATCH = 50
_DRAFT_SECONDS = 3600.0


@dataclass(frozen=True)
class SpoolStats:
    """``TraceSpool`` の件数。"""

    written: int = 0
    """ディスクに書いた件数。"""
    delivered: int = 0
    pending: int = 0
    """まだ送れていない件数。"""
    dead: int = 0
    """読めない、またはサーバーに拒否されて ``dead/`` に移した件数。"""
    dropped: int = 0
    """ディスクに書けず(満杯など)、その場で送ることもできずに失った件数。"""
    write_errors: int = 0


def deliver(traces: Sequence[Trace]) -> None:
    """トレースを同じ ID のまま保存する。同じものを 2 回送っても 1 件のままになる。"""
    store = tracing_client().store
    spans: defaultdict[str, list[Span]] = defaultdict(list)
    for trace in traces:
        send_as_utf8(store.start_trace, trace.info)
        spans[str(trace.info.experiment_id)] += trace.data.spans
    for experiment_id, group in spans.items():
        send_as_utf8(store.log_spans, experiment_id, group)


class TraceSpool:
    """完成したトレースを、送る前にディスクへ書く。

    1 つのディレクトリーを、いくつものプロセスで使える。添付ファイルと、プロンプトの版とのリンクは
    送らない。
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_traces: int = 10_000,
        cooldown_seconds: float = 5.0,
        fsync: bool = False,
        deliver: Deliver = deliver,
    ) -> None:
        """設定だけを行う。MLflow につなぎ、前回の残りを送り始めるのは ``install()``。

        Args:
            directory: 置き場(トレースの中身が入るため、他の利用者は読めない権限で作る)。
            max_traces: 置ける上限。超えた分は書かずにその場で送る。
            cooldown_seconds: 送信に失敗した後、次に試すまでの時間。
            fsync: 停電でも失わないよう、書くたびにディスクへ確定する(およそ 0.4 ms)。
        """
        if max_traces < 1 or cooldown_seconds < 0:
            raise ValueError(f"{max_traces=} must be >= 1, {cooldown_seconds=} must be >= 0")
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._max = max_traces
        self._cooldown = cooldown_seconds
        self._fsync = fsync
        self._deliver = deliver
        self._counts: Counter[str] = Counter()
        self._remove_old_drafts()
        self._start_over(self._on_disk())

    def _start_over(self, pending: list[str]) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._pending = dict.fromkeys(pending)  # 送る順のトレース ID
        self._sender: threading.Thread | None = None
        self._hurry = False

    def install(self) -> TraceSpool:
        """MLflow の送信をこの置き場に切り替える。前回の残りも送り始める。

        Raises:
            RuntimeError: 別の置き場が有効、トレースを OTLP だけに送る設定、または MLflow の内部が
                変わった。
        """
        if sends_only_otlp():
            raise RuntimeError(
                "traces go only to OTLP, past the spool; use export_profile='burst' or set "
                "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT=true"
            )
        if LEDGER.hooks.accept not in (None, self.accept):
            raise RuntimeError("another TraceSpool is installed; uninstall() it first")
        if LEDGER.hooks.accept is None:
            LEDGER.hooks.accept = self.accept
            LEDGER.spooled = lambda: len(self._on_disk())
            start_counting()
            if LEDGER.problem:
                self.uninstall()
                raise RuntimeError(f"TraceSpool: {LEDGER.problem}")
            self._start_sending()
        return self

    def uninstall(self) -> None:
        """MLflow の送信に戻し、背後で送るのをやめる。残ったファイルはそのまま置いておく。"""
        if LEDGER.hooks.accept == self.accept:
            LEDGER.hooks.accept = None
            LEDGER.spooled = lambda: 0
            stop_counting()
        self._forget_the_parent()
        with self._changed:
            self._sender = None
            self._changed.notify_all()

    def accept(self, trace: Trace) -> None:
        """トレースを書いて、送信を頼む(MLflow の背後のスレッドから呼ばれる)。"""
        self._start_sending()
        trace_id = trace.info.trace_id
        text = Trace(as_utf8(trace.info), trace.data).to_json()
        with self._changed:
            if len(self._pending) < self._max and self._write(self._path(trace_id), text):
                self._pending[trace_id] = None
                LEDGER.arrived([trace_id])
                self._changed.notify_all()
                return
        try:
            self._deliver([trace])
        except Exception as error:
            self._counts["dropped"] += 1
            LEDGER.lost([trace_id], f"{type(error).__name__}: {error}")
            logger.exception("trace %s could neither be written nor sent", trace_id)
        else:
            self._counts["delivered"] += 1
            LEDGER.arrived([trace_id])

    def drain(self, timeout_seconds: float = 10.0) -> int:
        """送り終えるまで最大 ``timeout_seconds`` 秒待ち、ディスクに残った件数を返す。"""
        self._start_sending()
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            if self._sender is not None:
                self._changed.wait_for(lambda: not self._pending, timeout_seconds)
            return len(self._pending)

    def stats(self) -> SpoolStats:
        """いままでの件数。"""
        self._forget_the_parent()
        return SpoolStats(pending=len(self._pending), **self._counts)

    def _forget_the_parent(self) -> None:
        """fork した子には送るスレッドがない。残りは親が送るので、子は空から始める。"""
        if self._pid != os.getpid():
            self._start_over([])

    def _start_sending(self) -> None:
        """ここまでは送らない(作っただけでは、接続先がまだ決まっていないことがある)。"""
        self._forget_the_parent()
        with self._changed:
            if self._sender is not None:
                return
            self._sender = threading.Thread(
                target=self._send_forever, name="trace-spool", daemon=True
            )
            try:
                self._sender.start()
            except RuntimeError:  # Python 3.12 以降の終了処理の中。次の起動か replay で送る
                self._sender = None

    def _remove_old_drafts(self) -> None:
        """書きかけで強制終了されたプロセスの残りを消す(新しいものは、誰かが書いている途中)。"""
        for draft in self.directory.glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime > _DRAFT_SECONDS:
                    draft.unlink()
                    logger.warning("half-written %s of a killed process removed", draft)

    def _on_disk(self) -> list[str]:
        # 一覧の途中で、別のプロセスが送り終えて消すことがある
        return [path.stem for path in self.directory.glob("*.json") if path.exists()]

    def _path(self, trace_id: str) -> Path:
        return self.directory / f"{trace_id}.json"

    def _write(self, path: Path, text: str) -> bool:
        draft = path.with_suffix(".tmp")
        try:
            with open(draft, "w", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
                file.write(text)
                if self._fsync:
                    file.flush()
                    os.fsync(file.fileno())
            draft.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            self._counts["write_errors"] += 1
            logger.error("cannot write to spool %s: %s", self.directory, error)
            return False
        self._counts["written"] += 1
        return True

    def _send_forever(self) -> None:
        while batch := self._next_batch():
            try:
                self._send(batch)
            except Exception as error:
                logger.warning("%d traces wait on disk: %s", len(self._pending), str(error)[:200])
                self._rest()

    def _next_batch(self) -> list[str]:
        """送る番のトレース ID。取り外されたら空。"""
        me = threading.current_thread()
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._sender is not me)
            return list(islice(self._pending, _BATCH)) if self._sender is me else []

    def _rest(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._hurry or not self._sender, self._cooldown)
            self._hurry = False

    def _send(self, batch: list[str]) -> None:
        """送って、ファイルを消す。まとめて拒否されたら、1 件ずつ確かめる。"""
        traces = [trace for trace in map(self._load, batch) if trace is not None]
        try:
            self._deliver(traces)
            self._counts["delivered"] += len(traces)
        except Exception as error:
            if not _is_rejection(error):
                raise
            if len(batch) > 1:
                for trace_id in batch:
                    self._send([trace_id])
                return
            self._set_aside(batch[0], "rejected by the server")
        for trace_id in batch:
            self._path(trace_id).unlink(missing_ok=True)
        with self._changed:
            for trace_id in batch:
                self._pending.pop(trace_id, None)
            self._changed.notify_all()

    def _load(self, trace_id: str) -> Trace | None:
        try:
            return Trace.from_json(self._path(trace_id).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None  # 同じ置き場を使う別のプロセスが送り終えた
        except Exception as error:
            self._set_aside(trace_id, f"unreadable ({error})")
            return None

    def _set_aside(self, trace_id: str, reason: str) -> None:
        grave = self.directory / "dead"
        grave.mkdir(exist_ok=True, mode=0o700)
        self._path(trace_id).replace(grave / f"{trace_id}.json")
        self._counts["dead"] += 1
        logger.error("trace %s moved to %s: %s", trace_id, grave, reason)


def _is_rejection(error: Exception) -> bool:
    """中身を理由に拒否されたか(待っても直らない)。"""
    if not isinstance(error, MlflowException):
        return False
    status = error.get_http_status_code()
    return 400 <= status < 500 and status not in (401, 403, 408, 429)


def replay(directory: str | os.PathLike[str], timeout_seconds: float = 60.0) -> SpoolStats:
    """残ったファイルをいまのトラッキング URI に送る。何度呼んでも重複しない。

    Raises:
        FileNotFoundError: そのディレクトリーがない。
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(
            f"no spool at {os.fspath(directory)!r}; pass TraceSpool's directory"
        )
    spool = TraceSpool(directory)
    spool.drain(timeout_seconds)
    spool.uninstall()
    return spool.stats()
