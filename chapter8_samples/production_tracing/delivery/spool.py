"""8.1.4 サーバー停止中のトレースを失わない(いったんディスクに置いて後で送る)。

MLflow は送れなかったトレースを捨てる。ここでは完成したトレースを先にファイルへ書き、背後で送り、
送れたら消す。サーバーが止まっていても、プロセスが終わっても、後で同じ ID のまま送り直せる。

Databricks では、スパンを成果物の置き場に送る経路になるため未対応である(OpenTelemetry Collector の
永続キューを使う)。MLflow サーバーと SQLite で使える。残ったファイルは次のコマンドでも送れる::

    python -m chapter8_samples.production_tracing replay DIR
"""

# MLflow には送信先を差し替える公開 API がなく、ID を保ったまま送る公開 API もない
# pyright: reportPrivateUsage=false
from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Trace
from mlflow.exceptions import MlflowException

logger = logging.getLogger(__name__)

Deliver = Callable[[Sequence[Trace]], None]
_RETRYABLE_4XX = (401, 403, 408, 429)
_DRAFT_SECONDS = 3600.0
_MAX_CACHED = 500  # 読み直しを省くために、メモリーにも置く数


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
    from mlflow.tracing.client import TracingClient

    client = TracingClient()
    for trace in traces:
        client.start_trace(trace.info)

    def experiment(trace: Trace) -> str:
        return str(trace.info.experiment_id)

    for identity, group in groupby(sorted(traces, key=experiment), experiment):
        client.log_spans(identity, [span for trace in group for span in trace.data.spans])


def _sends_only_otlp() -> bool:
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    dual = os.environ.get("MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "").lower() in ("true", "1")
    return any(os.environ.get(name) for name in names) and not dual


class TraceSpool:
    """完成したトレースを、送る前にディスクへ書く。

    添付ファイルと、プロンプトの版とのリンクは送らない。
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        max_traces: int = 10_000,
        batch_size: int = 50,
        cooldown_seconds: float = 5.0,
        fsync: bool = False,
        deliver: Deliver = deliver,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """設定だけを行う。MLflow につなぎ、前回の残りを送り始めるのは ``install()``。

        Args:
            directory: 置き場(トレースの中身が入るため、他の利用者は読めない権限で作る)。
            max_traces: 置ける上限。超えた分は書かずにその場で送る。
            cooldown_seconds: 送信に失敗した後、次に試すまでの時間。
            fsync: 停電でも失わないよう、書くたびにディスクへ確定する(およそ 0.4 ms)。
        """
        if max_traces < 1 or batch_size < 1 or cooldown_seconds < 0:
            raise ValueError("max_traces and batch_size must be >= 1, cooldown_seconds >= 0")
        self.directory = Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._max = max_traces
        self._batch = batch_size
        self._cooldown = cooldown_seconds
        self._fsync = fsync
        self._deliver = deliver
        self._clock = clock
        self._originals: tuple[Any, Any] | None = None
        self._totals = SpoolStats()
        self._remove_old_drafts()
        self._start_sender(self._on_disk())

    def install(self) -> TraceSpool:
        """MLflow の送信をこの置き場に切り替える。前回の残りも送り始める。

        Raises:
            RuntimeError: 別の置き場が有効、トレースを OTLP だけに送る設定、または MLflow の内部が
                変わった。
        """
        if _sends_only_otlp():
            raise RuntimeError(
                "traces go only to OTLP, past the spool; use export_profile='burst' or set "
                "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT=true"
            )
        from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter as Exporter

        names = ("_log_trace", "_export_spans_incrementally")
        originals = tuple(vars(Exporter).get(name) for name in names)
        if None in originals:
            raise RuntimeError(f"MLflow {mlflow.__version__} has no {names}; update this file")
        if self._originals is not None:
            return self
        if getattr(Exporter, "_spool", None) is not None:
            raise RuntimeError("another TraceSpool is installed; uninstall() it first")
        if self._stopped:  # 一度外したものを、つなぎ直す
            self._start_sender(self._on_disk())
        self._originals = (originals[0], originals[1])
        exporter: Any = Exporter
        exporter._spool = self
        exporter._log_trace = lambda _exporter, trace, *_args, **_kwargs: self.accept(trace)
        exporter._export_spans_incrementally = lambda _exporter, _spans: None  # 完成してから送る
        self._allow_sending()
        return self

    def uninstall(self) -> None:
        """MLflow の送信に戻す。残ったファイルはそのまま置いておく。"""
        from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter as Exporter

        if self._originals is None:
            return
        Exporter._log_trace, Exporter._export_spans_incrementally = self._originals
        Exporter._spool = None  # pyright: ignore[reportAttributeAccessIssue]
        self._originals = None
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def accept(self, trace: Trace) -> None:
        """トレースを書いて、送信を頼む(MLflow の背後のスレッドから呼ばれる)。"""
        self._renew_after_fork()
        self._allow_sending()
        if self._reserve() and self._write(trace):
            self._enqueue(trace)
            return
        try:
            self._deliver([trace])
            self._add(delivered=1)
        except Exception:
            self._add(dropped=1)
            logger.exception("trace %s could neither be written nor sent", trace.info.trace_id)

    def drain(self, timeout_seconds: float = 10.0) -> int:
        """送り終えるまで最大 ``timeout_seconds`` 秒待ち、ディスクに残った件数を返す。"""
        self._renew_after_fork()
        deadline = time.monotonic() + timeout_seconds
        self._allow_sending()
        with self._changed:
            self._retry_at = 0.0
            self._changed.notify_all()
            while self._pending and not self._stopped and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            return len(self._pending)

    def stats(self) -> SpoolStats:
        """いままでの件数。"""
        self._renew_after_fork()
        with self._changed:
            return replace(self._totals, pending=len(self._pending))

    def _renew_after_fork(self) -> None:
        """fork した子には送るスレッドがない。残りは親が送るので、子は空から始める。"""
        if self._pid != os.getpid():
            self._start_sender([])

    def _start_sender(self, pending: Iterable[str]) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._pending = deque(pending)
        self._cache: dict[str, Trace] = {}
        self._retry_at = 0.0
        self._writing = 0
        self._stopped = self._allowed = False
        try:
            threading.Thread(target=self._send_forever, name="trace-spool", daemon=True).start()
        except RuntimeError:  # Python 3.12 以降の終了処理の中(fork した子の終わりなど)
            self._stopped = True  # 書くだけにする。次の起動か replay で送る

    def _allow_sending(self) -> None:
        """ここまでは送らない(作っただけでは、接続先がまだ決まっていないことがある)。"""
        with self._changed:
            self._allowed = True
            self._changed.notify_all()

    def _remove_old_drafts(self) -> None:
        """書きかけで強制終了されたプロセスの残りを消す(新しいものは、誰かが書いている途中)。"""
        for draft in self.directory.glob("*.tmp"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - draft.stat().st_mtime > _DRAFT_SECONDS:
                    draft.unlink()
                    logger.warning("half-written %s of a killed process removed", draft)

    def _on_disk(self) -> list[str]:
        found: list[tuple[int, str]] = []
        for path in self.directory.glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # 別のプロセスが送り終えた
                found.append((path.stat().st_mtime_ns, path.stem))
        return [trace_id for _, trace_id in sorted(found)]

    def _path(self, trace_id: str) -> Path:
        return self.directory / f"{trace_id}.json"

    def _reserve(self) -> bool:
        """上限までなら 1 件分の場所を取る(書き手は複数いる)。"""
        with self._changed:
            free = len(self._pending) + self._writing < self._max
            self._writing += free
            return free

    def _enqueue(self, trace: Trace) -> None:
        with self._changed:
            self._writing -= 1
            self._pending.append(trace.info.trace_id)
            if len(self._cache) < _MAX_CACHED:
                self._cache[trace.info.trace_id] = trace
            self._changed.notify_all()

    def _write(self, trace: Trace) -> bool:
        path = self._path(trace.info.trace_id)
        draft = path.with_suffix(".tmp")
        try:
            handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(trace.to_json())
                file.flush()
                if self._fsync:
                    os.fsync(file.fileno())
            draft.replace(path)
        except (OSError, UnicodeError) as error:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            with self._changed:
                self._writing -= 1
            self._add(write_errors=1)
            logger.error("cannot write to spool %s: %s", self.directory, error)
            return False
        self._add(written=1)
        return True

    def _add(self, **counts: int) -> None:
        with self._changed:
            values = {key: getattr(self._totals, key) + value for key, value in counts.items()}
            self._totals = replace(self._totals, **values)

    def _send_forever(self) -> None:
        while batch := self._next_batch():
            try:
                self._send(batch)
            except Exception as error:
                self._retry_at = self._clock() + self._cooldown
                self._cache.clear()  # 長い停止の間は、ディスクだけに置く
                logger.warning("%d traces wait on disk: %s", len(self._pending), str(error)[:200])

    def _next_batch(self) -> list[str]:
        """送る番のトレース ID。取り外されたら空。"""
        changed = self._changed  # fork した子では作り直される
        with changed:
            while not self._stopped:
                wait = self._retry_at - self._clock()
                ready = self._pending and self._allowed
                if ready and wait <= 0:
                    return [self._pending[i] for i in range(min(self._batch, len(self._pending)))]
                changed.wait(wait if ready else None)
        return []

    def _send(self, batch: list[str]) -> None:
        traces = [trace for trace in map(self._load, batch) if trace is not None]
        try:
            self._deliver(traces)
            rejected: list[Trace] = []
        except MlflowException as error:
            if not _is_rejection(error):
                raise
            rejected = self._send_one_by_one(traces)
        for trace in rejected:
            self._set_aside(trace.info.trace_id, "rejected by the server")
        self._forget(batch, delivered=len(traces) - len(rejected))

    def _send_one_by_one(self, traces: Iterable[Trace]) -> list[Trace]:
        """まとめて拒否されたときに、原因のトレースだけを取り分ける。"""
        rejected: list[Trace] = []
        for trace in traces:
            try:
                self._deliver([trace])
            except MlflowException as error:
                if not _is_rejection(error):
                    raise
                rejected.append(trace)
        return rejected

    def _load(self, trace_id: str) -> Trace | None:
        if trace := self._cache.get(trace_id):
            return trace
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
        self._add(dead=1)
        logger.error("trace %s moved to %s: %s", trace_id, grave, reason)

    def _forget(self, batch: list[str], delivered: int) -> None:
        for trace_id in batch:
            self._path(trace_id).unlink(missing_ok=True)
        self._add(delivered=delivered)
        with self._changed:
            for trace_id in batch:
                self._pending.popleft()
                self._cache.pop(trace_id, None)
            self._changed.notify_all()


def _is_rejection(error: MlflowException) -> bool:
    """サーバーが中身を理由に拒否したか(待っても直らない)。"""
    status = error.get_http_status_code()
    return 400 <= status < 500 and status not in _RETRYABLE_4XX


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
    with spool._changed:
        spool._stopped = True
        spool._changed.notify_all()
    return spool.stats()
