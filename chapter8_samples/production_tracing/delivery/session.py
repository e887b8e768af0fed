"""8.1.4 プロセスに 1 つだけのトレーシングの設定(basic_setup.py の土台)。

二重の設定を拒否し、サーバーに届かなければ記録を止めて背後で接続し直し、やり直すときは元に戻す。
"""

from __future__ import annotations

import functools
import logging
import math
import os
import threading
from collections.abc import Mapping
from typing import Final

import mlflow.tracing
from mlflow.entities import LiveSpan
from mlflow.exceptions import InvalidUrlException
from mlflow.tracing.config import get_config  # 登録済みのプロセッサーを読む公開 API はない
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator

from .._internals import TracingClient, renew_trace_buffer, use_id_generator
from .counts import LEDGER
from .environment import EnvironmentPatch, check_otlp, limits_of, otlp_environment
from .settings import TracingOptions, TracingSetupError, TracingStatus, backend_of, hide_secrets

logger = logging.getLogger(__name__)


class _Session:
    def __init__(self, options: TracingOptions) -> None:
        self.options = options
        self.uri = options.tracking_uri or mlflow.get_tracking_uri()
        self.backend: Final = backend_of(self.uri)
        if options.export_profile == "otlp":
            check_otlp(self.uri, self.backend)
        self.previous_uri = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        self.environment = EnvironmentPatch()
        self.experiment_id = ""
        self.problem = ""  # 接続できずに記録を止めている理由
        self.stop = threading.Event()

    def status(self) -> TracingStatus:
        backlog, dropped, spooled = LEDGER.counts()
        return TracingStatus(
            experiment_id=self.experiment_id,
            experiment_name=self.options.experiment_name,
            tracking_uri=hide_secrets(self.uri),
            backend=self.backend,
            export_profile=self.options.export_profile,
            warnings=(*self.environment.warnings, *filter(None, [self.problem])),
            ready=bool(self.experiment_id),
            backlog=backlog,
            dropped=dropped,
            spooled=spooled,
        )

    def start(self, profile: Mapping[str, str]) -> None:
        """プロバイダーが作られる前に環境変数とスパンの処理を決めてから、接続する。"""
        options = self.options
        self.environment.set(limits_of(options, self.backend, profile))
        self.environment.set_resource(options)
        ours = [_keep_counting, *options.span_processors]
        others = [one for one in get_config().span_processors if one not in ours]
        if options.tracking_uri is not None:
            mlflow.set_tracking_uri(options.tracking_uri)  # 登録を消す
        mlflow.tracing.configure(span_processors=[*others, *ours])
        try:
            self.connect()
        except Exception as error:
            problem = self._problem_of(error)
            if self._never_works(error):
                raise TracingSetupError(problem) from None  # 元の文面には、パスワードが残る
            if options.strict:
                problem += "; start the server or pass strict=False"
                raise TracingSetupError(problem) from None
            mlflow.tracing.disable()  # リクエストを待たせずに、背後で接続し直す
            self._stay_off(problem)
            self.start_reconnecting()

    def connect(self) -> None:
        """接続して記録を始める。"""
        experiment_id = self._set_experiment()
        if self.options.export_profile == "otlp":
            self.environment.set(otlp_environment(self.uri, experiment_id))
        renew_trace_buffer()
        if self.problem:
            mlflow.tracing.enable()
            logger.warning("tracing is on: %s", hide_secrets(self.uri))
        if os.environ.get("MLFLOW_USE_DEFAULT_TRACER_PROVIDER", "").lower() not in ("false", "0"):
            use_id_generator(SystemRandomIds())  # アプリと共有するプロバイダーは変えない
        self.experiment_id = experiment_id
        self.problem = ""

    def _problem_of(self, error: Exception) -> str:
        reason = hide_secrets(str(error) or repr(error))
        return f"experiment {self.options.experiment_name!r} cannot be used: {reason}"

    def _never_works(self, error: Exception) -> bool:
        refused_name = getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
        bad_uri = isinstance(error, ValueError | InvalidUrlException)
        return refused_name or bad_uri or self.backend == "sqlite"

    def _stay_off(self, problem: str) -> None:
        if problem != self.problem:
            logger.warning("tracing is off until the server answers: %s", problem)
        self.problem = problem

    def _set_experiment(self) -> str:
        if self.backend == "server":
            self._ask_server()
        experiment_id = mlflow.set_experiment(self.options.experiment_name).experiment_id
        # 同時に作って負けた側では、MLflow 3.17 の記録先は Default のままになる
        if os.environ.get("MLFLOW_EXPERIMENT_ID") != experiment_id:
            mlflow.set_experiment(experiment_id=experiment_id)
        return experiment_id

    def _ask_server(self) -> None:
        """届くかを、1 回だけ、短く尋ねる(``set_experiment`` の再試行は、数分続く)。"""
        short = {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(math.ceil(self.options.probe_timeout_seconds)),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        }
        usual = {name: os.environ[name] for name in short}
        os.environ.update(short)
        try:
            found = TracingClient().store.get_experiment_by_name(self.options.experiment_name)
        finally:
            os.environ.update(usual)
        if found is not None and not found.experiment_id:
            raise ConnectionError("the server answered without an experiment (a proxy?)")

    def start_reconnecting(self) -> None:
        threading.Thread(target=self._reconnect, name="trace-reconnect", daemon=True).start()

    def _reconnect(self) -> None:
        while not self.stop.wait(self.options.retry_seconds):
            with _lock:
                if self.stop.is_set():
                    return
                try:
                    self.connect()
                    return
                except Exception as error:  # どれも直りうる(削除したエクスペリメントを戻すなど)
                    self._stay_off(self._problem_of(error))

    def undo(self) -> None:
        self.stop.set()
        mlflow.set_tracking_uri(self.previous_uri)  # type: ignore[arg-type]  # None で未設定に戻る
        self.environment.restore()


class SystemRandomIds(RandomIdGenerator):
    """OS の乱数による ID。fork も、アプリの ``random.seed(42)`` も影響しない。

    OpenTelemetry の既定では、``random.seed(42)`` を呼ぶと、起動のたびに同じ ID になり、前のトレース
    を上書きする。MLflow にも ID を分ける設定があるが、3.17 では終了時に例外を残す。
    """

    def generate_span_id(self) -> int:
        return int.from_bytes(os.urandom(8), "big") or 1

    def generate_trace_id(self) -> int:
        return int.from_bytes(os.urandom(16), "big") or 1


def _keep_counting(span: LiveSpan) -> None:
    LEDGER.attach_if_rebuilt(span)  # MLflow は、引数が self と span のメソッドを受け取らない


_lock = threading.RLock()
_session: _Session | None = None


def _after_fork() -> None:
    """fork した子(gunicorn の ``--preload`` など)にスレッドは残らない。子でも接続し直す。"""
    _lock.release()
    if _session is not None and _session.problem:
        _session.stop = threading.Event()
        _session.start_reconnecting()


@functools.cache
def _watch_forks() -> None:
    # 接続の途中で fork すると、子には、短くした期限と、MLflow の掛かったままのロックが残る
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork
        )


def open_session(options: TracingOptions, profile: Mapping[str, str]) -> TracingStatus:
    """設定を始める。``profile`` は、送信の上限を決める環境変数。"""
    global _session
    _watch_forks()
    with _lock:
        if _session is None:
            session = _Session(options)
            try:
                session.start(profile)
            except BaseException:
                session.undo()
                raise
            _session = session
        elif (old := _session.options) != options:
            changes = {key: value for key, value in options if value != getattr(old, key)}
            raise TracingSetupError(
                f"tracing is already set up for {old.experiment_name!r}; a second, different setup "
                f"({hide_secrets(repr(changes))}) needs reset_production_tracing() first"
            )
        return _session.status()


def session_status() -> TracingStatus | None:
    return None if _session is None else _session.status()


def close_session() -> None:
    """残りのトレースを送り終えてから、設定を取り消す。"""
    global _session
    with _lock:
        session = _session
        _session = None
        if session is not None:
            mlflow.flush_trace_async_logging()
            mlflow.tracing.reset()
            renew_trace_buffer()
            session.undo()
            LEDGER.start_over()
