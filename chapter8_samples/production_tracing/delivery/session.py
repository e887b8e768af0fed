"""8.1.4 プロセスに 1 つだけのトレーシングの設定(basic_setup.py の土台)。

二重の設定を断り、サーバーに届かなければ記録を止めて背後で接続し直し、やり直すときは環境変数と
トラッキング URI を元に戻す。状態はここにだけあるので、設定のファイルを直接実行しても 2 つに
分かれない。
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass, field, replace
from typing import Any

import mlflow
import mlflow.tracing
import requests

from .._internals import fix_id_generator, renew_trace_buffer
from .profiles import (
    EnvironmentPatch,
    TracingOptions,
    TracingSetupError,
    TracingStatus,
    backend_of,
    default_tracking_uri,
    export_environment,
    hide_secrets,
    otlp_environment,
)

logger = logging.getLogger(__name__)


@dataclass
class _Session:
    """いまの設定と、やり直すために覚えておく値。"""

    options: TracingOptions
    uri: str
    """トラッキング URI(``status`` のほうは、パスワードを隠したもの)。"""
    status: TracingStatus
    environment: EnvironmentPatch
    previous_uri: str | None
    disabled: bool = False
    stop: threading.Event = field(default_factory=threading.Event)


_lock = threading.RLock()
_session: _Session | None = None


def open_session(options: TracingOptions) -> TracingStatus:
    """設定を始める。同じ ``options`` での 2 回目は何もしない。

    Raises:
        TracingSetupError: 二重設定、使えない URI、``strict=True`` での接続失敗。
    """
    with _lock:
        if _session is not None:
            return _same_or_error(_session, options)
        return _start(options)


def session_status() -> TracingStatus | None:
    """いまの状態(再接続した後の ``ready`` など)。設定前は ``None``。"""
    return _session.status if _session else None


def close_session() -> None:
    """残りのトレースを送り終えてから、設定を取り消す。"""
    global _session
    with _lock:
        session, _session = _session, None
    if session is None:
        return
    session.stop.set()
    mlflow.flush_trace_async_logging()
    mlflow.tracing.reset()
    renew_trace_buffer()
    _restore(session)


def _same_or_error(session: _Session, options: TracingOptions) -> TracingStatus:
    if session.options == options:
        return session.status
    raise TracingSetupError(
        f"tracing is already set up for {session.options.experiment_name!r}; a second, different "
        f"setup ({session.options.differences(options)}) would rebuild the tracer provider and "
        "break traces in flight. Call setup_production_tracing() once per process, or "
        "reset_production_tracing() first (tests, notebooks)."
    )


def _start(options: TracingOptions) -> TracingStatus:
    global _session
    session = _new_session(options)
    try:
        _prepare(session)
        _connect_or_wait(session)
    except BaseException:
        session.stop.set()
        _restore(session)
        raise
    _session = session
    return session.status


def _new_session(options: TracingOptions) -> _Session:
    uri = options.tracking_uri or default_tracking_uri()
    status = TracingStatus(
        experiment_id="",
        experiment_name=options.experiment_name,
        tracking_uri=hide_secrets(uri),
        backend=backend_of(uri),
        export_profile=options.export_profile,
        applied={},
        warnings=(),
        ready=False,
    )
    # MLflow 自身も、この 3 つを書き換える
    patch = EnvironmentPatch(
        "MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI", "OTEL_RESOURCE_ATTRIBUTES"
    )
    previous = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    return _Session(options, uri, status, patch, previous)


def _prepare(session: _Session) -> None:
    """プロバイダーが作られる前に、環境変数・URI・マスク処理を決める。"""
    options, status = session.options, session.status
    session.environment.set(
        {
            "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": str(options.enable_async).lower(),
            **export_environment(
                status.export_profile,
                status.backend,
                http_timeout_seconds=options.http_timeout_seconds,
                http_max_retries=options.http_max_retries,
            ),
        }
    )
    if options.sampling_ratio is not None:
        session.environment.set({"MLFLOW_TRACE_SAMPLING_RATIO": str(options.sampling_ratio)})
    session.environment.set_service_name(options.service_name)
    session.environment.add_resource(options.resource_attributes())
    if options.tracking_uri is not None:
        mlflow.set_tracking_uri(session.uri)
    mlflow.tracing.configure(span_processors=list(options.span_processors))
    _update(session)


def _update(session: _Session, *problems: str, **changes: Any) -> None:
    """環境変数の変更と警告を状態に映す。"""
    session.status = replace(
        session.status,
        applied=dict(session.environment.applied),
        warnings=(*session.environment.warnings, *problems),
        **changes,
    )


def _restore(session: _Session) -> None:
    mlflow.set_tracking_uri(session.previous_uri)  # type: ignore[arg-type]  # None で未設定に戻る
    session.environment.restore()


def _connect_or_wait(session: _Session) -> None:
    """接続する。届かなければ記録を止め、リクエストを待たせずに背後で接続し直す。"""
    problem = _connect(session)
    if problem is None:
        return
    if session.options.strict:
        raise TracingSetupError(f"{problem}; start the server or pass strict=False")
    logger.warning("tracing is off until the server answers: %s", problem)
    _update(session, problem)
    mlflow.tracing.disable()
    session.disabled = True
    _start_reconnecting(session)


def _connect(session: _Session) -> str | None:
    """``set_experiment`` を一度だけ呼ぶ。届かないときはその理由を返す。"""
    status = session.status
    if problem := _probe(session):
        return problem
    try:
        experiment = mlflow.set_experiment(  # pyright: ignore[reportUnknownMemberType]
            session.options.experiment_name
        )
    except mlflow.MlflowException as error:
        reason = hide_secrets(str(error))
        problem = f"experiment {session.options.experiment_name!r} cannot be used: {reason}"
        # 500 番台は、応答の途切れや、サーバーの奥のデータベースの停止も含む(待てば直りうる)
        server_error = status.backend == "server" and error.get_http_status_code() >= 500
        if server_error or status.backend == "databricks":
            return problem
        raise TracingSetupError(problem) from error
    if status.export_profile == "otlp":
        identity = experiment.experiment_id
        session.environment.set(otlp_environment(session.uri, status.backend, identity))
    renew_trace_buffer()
    if session.disabled:
        mlflow.tracing.enable()
    fix_id_generator()
    _update(session, experiment_id=experiment.experiment_id, ready=True)
    return None


def _probe(session: _Session) -> str | None:
    """短いリクエストでサーバーを確かめる。MLflow の再試行(既定で数分)に入る前に分かる。"""
    if session.status.backend != "server":
        return None
    url, limit = f"{session.uri.rstrip('/')}/health", session.options.probe_timeout_seconds
    shown = hide_secrets(url)
    try:
        answer = requests.get(url, timeout=limit)
    except requests.RequestException as error:
        return f"{shown} did not answer within {limit:g}s ({type(error).__name__})"
    return f"{shown} answered HTTP {answer.status_code}" if answer.status_code >= 500 else None


_fork_hook_installed = False


def _start_reconnecting(session: _Session) -> None:
    global _fork_hook_installed
    if not _fork_hook_installed and hasattr(os, "register_at_fork"):
        _fork_hook_installed = True
        os.register_at_fork(after_in_child=_reconnect_after_fork)
    name = "production-tracing-reconnect"
    threading.Thread(target=_reconnect, args=(session,), name=name, daemon=True).start()


def _reconnect_after_fork() -> None:
    """fork した子(gunicorn の ``--preload`` など)にスレッドは残らないので、子でも接続し直す。"""
    global _lock
    _lock = threading.RLock()  # 接続の途中で fork すると、子では永久に解かれない
    if _session is not None and not _session.status.ready:
        _session.stop = threading.Event()
        _start_reconnecting(_session)


def _reconnect(session: _Session) -> None:
    while not session.stop.wait(session.options.retry_seconds):
        with _lock:
            if session.stop.is_set():
                return
            try:
                problem = _connect(session)
            except TracingSetupError:
                logger.exception("tracing stays off")
                return
            if problem is None:
                logger.warning("tracing is on: %s", session.status.tracking_uri)
                return
