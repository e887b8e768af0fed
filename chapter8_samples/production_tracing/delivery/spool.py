"""8.1.4 サーバー停止中のトレースを失わない(いったんディスクに置いて後で送る)。

完成したトレースを先にファイルへ書き、背後で送り、送れたら消す。サーバーが止まっていても、プロセスが
終わっても、後で(``python -m chapter8_samples.production_tracing replay DIR`` でも)送り直せる。
同じ置き場を使う他のプロセスは、手が空くと、終わったプロセスの残りも送る。
Databricks では使えない(スパンの送り方が違う。OpenTelemetry Collector の永続キューを使う)。
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from mlflow.entities import Span, Trace
from mlflow.exceptions import MlflowException

from .._internals import TracingClient, log_spans
from ..metadata import sends_only_otlp
from .counts import LEDGER, start_counting
from .text import as_utf8

logger = logging.getLogger(__name__)

_MAX_BATCH = 50  # 一度に送る件数
_IDLE_SECONDS = 60.0  # これだけ手が空いたら、終わった別のプロセスの残りを探す


class SpoolStats(NamedTuple):
    """``TraceSpool`` の件数。``dead`` は、読めないか拒否されて ``dead/`` に移したもの。"""

    delivered: int
    pending: int
    dead: int
    write_errors: int
    """ディスクに書けず、その場で送った回数。"""


def deliver(traces: Sequence[Trace]) -> None:
    """トレースを同じ ID のまま保存する。同じものを 2 回送っても 1 件のままになる。"""
    client = TracingClient()
    spans: defaultdict[str, list[Span]] = defaultdict(list)
    for trace in traces:
        client.start_trace(trace.info)
        spans[str(trace.info.experiment_id)] += trace.data.spans
    for experiment_id, group in spans.items():
        log_spans(client.log_spans, experiment_id, group)


class TraceSpool:
    """完成したトレースを、送る前にディスクへ書く(添付ファイルと、プロンプトへのリンクは除く)。"""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        cooldown_seconds: float = 5.0,
        deliver: Callable[[Sequence[Trace]], None] = deliver,
    ) -> None:
        """置き場を、他の利用者には読めない権限で作る(複数のプロセスで 1 つを使える)。

        送れなかった後は、次に試すまで ``cooldown_seconds`` 秒待ち、半分ずつ、後ろに回して試す。
        """
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._cooldown = cooldown_seconds
        self._deliver = deliver
        self._delivered = 0
        self._dead = 0
        self._write_errors = 0
        self._start_over(self.directory.glob("*.json"))

    def _start_over(self, pending: Iterable[Path]) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._pending = dict.fromkeys(pending)  # 送る順
        self._sender: threading.Thread | None = None
        self._hurry = False

    def install(self) -> TraceSpool:
        """MLflow の送信をこの置き場に切り替え(できなければ ``RuntimeError``)、残りも送り始める。"""
        if sends_only_otlp():
            raise RuntimeError("traces go only to OTLP, past the spool; use export_profile='burst'")
        if LEDGER.spool is self:
            return self
        if LEDGER.spool is not None:
            raise RuntimeError("another TraceSpool is installed; uninstall() it first")
        self._stop_counting = start_counting()
        if LEDGER.problem:
            self._stop_counting()
            raise RuntimeError(f"TraceSpool: {LEDGER.problem}")
        LEDGER.spool = self
        self._start_sending()
        return self

    def uninstall(self) -> None:
        """MLflow の送信に戻し、背後で送るのをやめる。残ったファイルはそのまま置いておく。"""
        if LEDGER.spool is self:
            LEDGER.spool = None
            self._stop_counting()
        with self._changed:
            self._sender = None
            self._changed.notify_all()

    def accept(self, trace: Trace) -> None:
        """トレースを書いて、送信を頼む。書けなければ、その場で送る。"""
        self._start_sending()
        try:
            self._keep_or_send(as_utf8(trace))
        except Exception as error:
            LEDGER.lost([trace.info.trace_id], f"{type(error).__name__}: {error}")
            logger.error("a trace could neither be kept nor sent: %s", error)
        else:
            LEDGER.arrived([trace.info.trace_id])

    def _keep_or_send(self, trace: Trace) -> None:
        try:
            path = self._write(trace)
        except OSError as error:
            self._write_errors += 1
            logger.error("cannot write to spool %s: %s", self.directory, error)
            self._deliver([trace])
            self._delivered += 1
            return
        with self._changed:
            self._pending[path] = None
            self._changed.notify_all()

    def _write(self, trace: Trace) -> Path:
        draft = self.directory / f"{trace.info.trace_id}.tmp"
        try:
            draft.touch(mode=0o600)
            draft.write_text(trace.to_json(), encoding="utf-8")
            return draft.replace(draft.with_suffix(".json"))
        except BaseException:
            draft.unlink(missing_ok=True)  # 満杯のディスクに、書きかけを残さない
            raise

    def drain(self, timeout_seconds: float = 10.0) -> int:
        """送り終えるまで最大 ``timeout_seconds`` 秒待ち、ディスクに残った件数を返す。"""
        self._start_sending()
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not (self._pending and self._sender), timeout_seconds)
            return len(self._pending)

    def stats(self) -> SpoolStats:
        return SpoolStats(self._delivered, len(self._pending), self._dead, self._write_errors)

    # ---- 背後で送る ----

    def _start_sending(self) -> None:
        if self._pid != os.getpid():  # fork した子では、親の残りは親が送る
            self._start_over([])
        with self._changed:
            if self._sender is None:
                sender = threading.Thread(target=self._send_forever, name="spool", daemon=True)
                with contextlib.suppress(RuntimeError):  # 終了処理の中では起動できない。次に送る
                    sender.start()
                    self._sender = sender

    def _send_forever(self) -> None:
        me = threading.current_thread()
        size = _MAX_BATCH
        while True:
            with self._changed:
                while not self._changed.wait_for(
                    lambda: self._pending or self._sender is not me, _IDLE_SECONDS
                ):
                    with contextlib.suppress(OSError):
                        self._pending |= dict.fromkeys(self.directory.glob("*.json"))
                batch = list(islice(self._pending, size))
            if self._sender is not me:
                return
            try:
                self._send(batch)
                size = min(_MAX_BATCH, 2 * size)
            except Exception as error:
                size = max(1, len(batch) // 2)
                if _is_rejection(error):  # 半分ずつ、その 1 件まで絞る
                    continue
                logger.warning("%d traces wait on disk: %s", len(self._pending), str(error)[:200])
                with self._changed:
                    for path in filter(self._pending.__contains__, batch):  # 他を待たせない
                        self._pending[path] = self._pending.pop(path)
                    self._changed.wait_for(lambda: self._hurry or not self._sender, self._cooldown)
                    self._hurry = False

    def _send(self, batch: list[Path]) -> None:
        """送って、ファイルを消す。1 件だけで拒否されたものは、よける。"""
        traces = [trace for trace in map(self._load, batch) if trace is not None]
        try:
            self._deliver(traces)
            self._delivered += len(traces)
        except Exception as error:
            if len(batch) > 1 or not _is_rejection(error):
                raise
            self._set_aside(batch[0], f"rejected ({str(error)[:200]})")
        with self._changed:
            for path in batch:
                self._pending.pop(path, None)
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    logger.error("cannot remove a delivered trace: %s", error)
            self._changed.notify_all()

    def _load(self, path: Path) -> Trace | None:
        try:
            return as_utf8(Trace.from_json(path.read_text(encoding="utf-8")))
        except FileNotFoundError:  # 同じ置き場を使う別のプロセスが送り終えた
            return None
        except Exception as error:
            is_final = isinstance(error, PermissionError | IsADirectoryError)
            if isinstance(error, OSError) and not is_final:
                raise  # 開いたファイルが多すぎるなど。次には読める
            self._set_aside(path, f"unreadable ({error})")
            return None

    def _set_aside(self, path: Path, reason: str) -> None:
        grave = self.directory / "dead"
        grave.mkdir(exist_ok=True, mode=0o700)
        moved = path.replace(grave / path.name)
        self._dead += 1
        logger.error("trace moved to %s: %s", moved, reason)


def _is_rejection(error: Exception) -> bool:
    """中身を理由に拒否されたか、送る形にできないか(待っても直らない)。"""
    if isinstance(error, ValueError) and "Value out of range" in str(error):
        return True  # protobuf に書けない時刻など
    if getattr(error, "error_code", "") == "ENDPOINT_NOT_FOUND":  # 入れ替え中のプロキシなどの 404
        return False
    status = error.get_http_status_code() if isinstance(error, MlflowException) else 500
    return 400 <= status < 500 and status not in (401, 403, 408, 429)


def replay(directory: str | os.PathLike[str], timeout_seconds: float = 60.0) -> SpoolStats:
    """残ったファイルをいまのトラッキング URI に送る。何度呼んでも重複しない。"""
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"no spool at {str(directory)!r}; pass TraceSpool's directory")
    spool = TraceSpool(directory)
    spool.drain(timeout_seconds)
    spool.uninstall()
    return spool.stats()
