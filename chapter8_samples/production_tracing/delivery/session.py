"""8.1.4 プロセスに 1 つだけのトレーシングの設定(basic_setup.py の土台)。

二重の設定を断り、サーバーに届かなければ記録を止めて背後で接続し直し、やり直すときは環境変数と
トラッキング URI を元に戻す。状態はここにだけあるので、ページを直接実行しても 2 つに分かれない。
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

import mlflow
import mlflow.tracing
import requests
from mlflow.entities import Experiment

from .._internals import renew_trace_buffer
from .counts import delivery_counts, keep_counting, start_counting, stop_counting
from .ids import use_system_random_ids
from .otlp import check_otlp, otlp_environment
from .settings import (
    Backend,
    EnvironmentPatch,
    TracingOptions,
    TracingSetupError,
    TracingStatus,
    backend_of,
    hide_secrets,
)
from .text import replace_surrogates

logger = logging.getLogger(__name__)

_WORKERS = "MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS"


@dataclass
class _Session:
    """いまの設定と、やり直すために覚えておく値。"""

    options: TracingOptions
    uri: str
    backend: Backend
    previous_uri: str | None
    environment: EnvironmentPatch
    experiment_id: str = ""
    problem: str = ""
    """接続できずに記録を止めている理由。"""
    stop: threading.Event = field(default_factory=threading.Event)
    status: TracingStatus | None = None


_lock = threading.RLock()
_session: _Session | None = None


def open_session(options: TracingOptions, limits: Mapping[str, str]) -> TracingStatus:
    """設定を始める。``limits`` は、送信の上限を決める環境変数。"""
    with _lock:
        if _session is None:
            return _start(options, limits)
        if _session.options == options:
            return _status_of(_session)
        raise TracingSetupError(
            f"tracing is already set up for {_session.options.experiment_name!r}; a second, "
            f"different setup ({_session.options.differences(options)}) would rebuild the tracer "
            "provider and break traces in flight. Call setup_production_tracing() once per "
            "process, or reset_production_tracing() first (tests, notebooks)."
        )


def session_status() -> TracingStatus | None:
    """いまの状態と件数。設定前は ``None``。"""
    return None if _session is None else _status_of(_session)


def _status_of(session: _Session) -> TracingStatus:
    """変わっていなければ、前と同じオブジェクト。"""
    status = TracingStatus(
        experiment_id=session.experiment_id,
        experiment_name=session.options.experiment_name,
        tracking_uri=hide_secrets(session.uri),
        backend=session.backend,
        export_profile=session.options.export_profile,
        applied=dict(session.environment.applied),
        warnings=tuple(session.environment.warnings),
        ready=bool(session.experiment_id),
        **vars(delivery_counts()),
    )
    if session.status is None or session.status != status:
        session.status = status
    return session.status


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


def _start(options: TracingOptions, limits: Mapping[str, str]) -> TracingStatus:
    global _session
    uri = options.tracking_uri or mlflow.get_tracking_uri()
    backend = backend_of(uri)
    if options.export_profile == "otlp":
        check_otlp(uri, backend)
    previous = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    session = _Session(options, uri, backend, previous, EnvironmentPatch())
    start_counting(follow=False)
    try:
        _prepare(session, limits)
        _connect_or_wait(session)
    except BaseException:
        session.stop.set()
        _restore(session)
        raise
    _session = session
    return _status_of(session)


def _prepare(session: _Session, limits: Mapping[str, str]) -> None:
    """プロバイダーが作られる前に、環境変数・URI・スパンの処理を決める。"""
    options, environment = session.options, session.environment
    enable_async = str(options.enable_async).lower()
    environment.set({"MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": enable_async})
    environment.set({**limits, **_backend_limits(session, limits)})
    if options.sampling_ratio is not None:
        environment.set({"MLFLOW_TRACE_SAMPLING_RATIO": str(options.sampling_ratio)})
    environment.set_resource(options.service_name, options.resource_attributes())
    if options.tracking_uri is not None:
        mlflow.set_tracking_uri(options.tracking_uri)
    mlflow.tracing.configure(span_processors=[replace_surrogates, *options.span_processors])


def _backend_limits(session: _Session, limits: Mapping[str, str]) -> dict[str, str]:
    """保存先ごとの設定。"""
    if session.backend == "sqlite" and _WORKERS in limits:
        return {_WORKERS: "1"}  # SQLite は書き手が 1 人のほうが衝突の再試行がなく、失わない
    if session.backend == "server":  # 止まっているときに、1 回の送信をあきらめるまで
        return {
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(session.options.http_timeout_seconds),
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(session.options.http_max_retries),
            "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
            # 429 の Retry-After に従うと、1 時間でも眠る
            "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
        }
    if session.backend == "databricks":
        return {"MLFLOW_ASYNC_TRACE_LOGGING_RETRY_TIMEOUT": "30"}
    return {}


def _restore(session: _Session) -> None:
    mlflow.set_tracking_uri(session.previous_uri)  # type: ignore[arg-type]  # None で未設定に戻る
    session.environment.restore()
    stop_counting()


def _connect_or_wait(session: _Session) -> None:
    """接続する。届かなければ記録を止め、リクエストを待たせずに背後で接続し直す。"""
    problem = _connect(session)
    if problem is None:
        return
    if session.options.strict:
        raise TracingSetupError(f"{problem}; start the server or pass strict=False")
    _stay_off(session, "tracing is off until the server answers", problem)
    mlflow.tracing.disable()
    _start_reconnecting(session)


def _stay_off(session: _Session, what: str, problem: str) -> None:
    logger.warning("%s: %s", what, problem)
    session.problem = problem
    session.environment.warnings.append(problem)


def _connect(session: _Session) -> str | None:
    """``set_experiment`` を一度だけ呼ぶ。待てば直りうる失敗なら、その理由を返す。"""
    name = session.options.experiment_name
    if problem := _probe(session):
        return f"experiment {name!r} cannot be used yet: {problem}"
    try:
        experiment = _set_experiment(name)
    except Exception as error:
        problem = f"experiment {name!r} cannot be used: {hide_secrets(str(error))}"
        # 名前が使えない。ほかの応答(401、404、429 など)は、直るまで待つ
        refused = getattr(error, "error_code", "") == "INVALID_PARAMETER_VALUE"
        if session.backend == "sqlite" or refused:
            raise TracingSetupError(problem) from error
        return problem
    if session.options.export_profile == "otlp":
        session.environment.set(otlp_environment(session.uri, experiment.experiment_id))
    renew_trace_buffer()
    if session.problem:
        mlflow.tracing.enable()
    use_system_random_ids()
    keep_counting()
    session.experiment_id = experiment.experiment_id
    return None


def _set_experiment(name: str) -> Experiment:
    """``mlflow.set_experiment``。いくつものワーカーが同時に作っても、その名前に記録する。

    作るのに負けた側では、MLflow 3.17 は見つけたものを返すだけで、記録先は Default のままになる。
    """
    experiment = mlflow.set_experiment(name)
    if os.environ.get("MLFLOW_EXPERIMENT_ID") != experiment.experiment_id:
        mlflow.set_experiment(experiment_id=experiment.experiment_id)
    return experiment


def _probe(session: _Session) -> str | None:
    """MLflow の再試行(数分)に入る前に、短いリクエストでサーバーとその奥のデータベースを確かめる。

    証明書は MLflow と同じ変数、プロキシは ``requests`` が読む変数による。4xx は認証や経路の
    都合でも返るので、MLflow 自身に判断させる。
    """
    if session.backend != "server":
        return None
    url = f"{session.uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name"
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    certificate = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
    try:
        answer = requests.get(
            url,
            params={"experiment_name": session.options.experiment_name},
            timeout=session.options.probe_timeout_seconds,
            verify=certificate or not insecure,
            cert=os.environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH"),
        )
    except (requests.exceptions.InvalidURL, UnicodeError) as error:
        raise TracingSetupError(f"tracking_uri={hide_secrets(session.uri)!r}: {error}") from error
    except OSError as error:  # 証明書のファイルがないときは、requests の例外にならない
        cause = str(error).rpartition("Caused by ")[2]
        return hide_secrets(f"{url} did not answer: {cause}")
    if answer.status_code >= 500 or answer.status_code == 429:
        return hide_secrets(f"{url} answered HTTP {answer.status_code}")
    return None


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_reconnect_after_fork)


def _start_reconnecting(session: _Session) -> None:
    _watch_forks()
    name = "production-tracing-reconnect"
    threading.Thread(target=_reconnect, args=(session,), name=name, daemon=True).start()


def _reconnect_after_fork() -> None:
    """fork した子(gunicorn の ``--preload`` など)にスレッドは残らないので、子でも接続し直す。"""
    global _lock
    _lock = threading.RLock()  # 接続の途中で fork すると、子では永久に解かれない
    if _session is not None and not _session.experiment_id:
        _session.stop = threading.Event()
        _start_reconnecting(_session)


def _reconnect(session: _Session) -> None:
    """接続できるまで続ける。理由が変わるたびに、ログと状態に書く。"""
    while not session.stop.wait(session.options.retry_seconds):
        with _lock:
            if session.stop.is_set():
                return
            try:
                problem = _connect(session)
            except Exception as error:
                problem = hide_secrets(str(error))
            if problem is None:
                logger.warning("tracing is on: %s", hide_secrets(session.uri))
                return
            if problem != session.problem:
                _stay_off(session, "tracing stays off", problem)
