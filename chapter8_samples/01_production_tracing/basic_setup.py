"""8.1.3 軽量SDK・8.1.4 本番トレーシングの基本設定(リスト8.4)。

MLflow の既定値では、2,000 件のバーストで半分以上のトレースが警告だけで消え、サーバーが止まると
リクエストまで止まる。起動時に一度だけ呼ぶこの設定で、消えず、待たせないトレーシングにする。

実行::

    $ python chapter8_samples/01_production_tracing/basic_setup.py
    100 リクエストのバースト(既定値の上限 1,000 件と 2,000 件のバーストを 1/20 に縮小)
      default  保存 ... 件、消失 ... 件(呼び出し側 1 件 ... us)
      burst    保存 100 件、消失   0 件(呼び出し側 1 件 ... us)

Databricks では ``MLFLOW_TRACKING_URI=databricks`` と認証情報だけを設定し、同じ関数を呼ぶ。
エクスペリメント名は ``/Shared/my-llm-app`` のようなワークスペースの絶対パスにする。本番の
アプリには ``mlflow-tracing`` だけを入れればよい(SQLite は ``mlflow`` が必要)。
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import mlflow
import mlflow.tracing
import requests

from chapter8_samples.production_tracing.delivery.profiles import (
    EnvironmentPatch,
    ExportProfile,
    SpanFilter,
    TracingOptions,
    TracingSetupError,
    TracingStatus,
    backend_of,
    default_tracking_uri,
    export_environment,
    hide_secrets,
    otlp_environment,
)

if TYPE_CHECKING:
    from chapter8_samples.production_tracing.masking import mask_pii as mask_pii
    from chapter8_samples.production_tracing.spans import atraced_stream as atraced_stream
    from chapter8_samples.production_tracing.spans import traced_stream as traced_stream

logger = logging.getLogger(__name__)

_ELSEWHERE = {
    "mask_pii": "pii_masking",
    "traced_stream": "manual_spans",
    "atraced_stream": "manual_spans",
}


@dataclass
class _Session:
    """プロセスに 1 つだけの設定と、やり直すために覚えておく値。"""

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


def setup_production_tracing(
    experiment_name: str,
    service_name: str = "llm-app",
    tracking_uri: str | None = None,
    enable_async: bool = True,
    deployment_region: str | None = None,
    service_version: str | None = None,
    *,
    environment: str = "development",
    export_profile: ExportProfile = "burst",
    sampling_ratio: float | None = None,
    strict: bool = False,
    http_timeout_seconds: int = 10,
    http_max_retries: int = 2,
    probe_timeout_seconds: float = 2.0,
    retry_seconds: float = 15.0,
    span_processors: Sequence[SpanFilter] = (),
) -> TracingStatus:
    """本番のトレーシングを設定する。アプリの起動時に一度だけ呼ぶ。

    同じ引数での 2 回目は何もしない。別の引数での 2 回目は ``TracingSetupError`` になる
    (途中でエクスペリメントを変えると実行中のトレースが壊れるため)。テストやノートブックで
    やり直すときは先に ``reset_production_tracing()`` を呼ぶ。

    Args:
        tracking_uri: ``None`` なら ``MLFLOW_TRACKING_URI``、それもなければ MLflow の既定
            (カレントディレクトリーの SQLite)。
        enable_async: ``False`` ではリクエストのスレッドで書き込む(1 件およそ 40 ms)。
        deployment_region: リソース属性 ``cloud.region``。
        environment: リソース属性 ``deployment.environment.name``。
        export_profile: ``EXPORT_PROFILES`` の名前。利用者の環境変数が優先される。
        sampling_ratio: ヘッドサンプリングの割合 [0, 1]。``sampling_strategies`` の重みにも入る。
        strict: サーバーに届かないとき ``True`` は例外、``False`` は記録を止めて起動を続け、
            ``retry_seconds`` 秒ごとに背後で接続し直す。
        http_timeout_seconds: MLflow サーバーへの 1 回のリクエストの上限。
        span_processors: ``mlflow.tracing.configure`` に渡す関数(``pii_masking.mask_pii()`` など)。

    Raises:
        ValueError: 引数の値が正しくない。
        TracingSetupError: 二重設定、使えない URI、``strict=True`` での接続失敗。
    """
    options = TracingOptions(
        experiment_name=experiment_name,
        service_name=service_name,
        tracking_uri=tracking_uri,
        enable_async=enable_async,
        deployment_region=deployment_region,
        service_version=service_version,
        environment=environment,
        export_profile=export_profile,
        sampling_ratio=sampling_ratio,
        strict=strict,
        http_timeout_seconds=http_timeout_seconds,
        http_max_retries=http_max_retries,
        probe_timeout_seconds=probe_timeout_seconds,
        retry_seconds=retry_seconds,
        span_processors=tuple(span_processors),
    )
    with _lock:
        if _session is not None:
            return _same_or_error(_session, options)
        return _start(options)


def enable_autologging(providers: Sequence[str] | None = None) -> list[str]:
    """LLM ライブラリーの自動トレースを有効にし、有効になった名前を返す。

    実体は autologging.py(使うときだけ読み込む)。引数と例外はそちらを参照。
    """
    return import_module(_sibling("autologging")).enable_autologging(providers)


def __getattr__(name: str) -> Any:
    """マスキングとストリーミングの関数は、それぞれのファイルにある(使うときだけ読み込む)。"""
    if name not in _ELSEWHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_sibling(_ELSEWHERE[name])), name)


def _sibling(name: str) -> str:
    """同じフォルダーのファイルを import する名前。"""
    return f"{__package__}.{name}" if __package__ else name


def tracing_status() -> TracingStatus | None:
    """いまの状態(再接続した後の ``ready`` など)。設定前は ``None``。"""
    return _session.status if _session else None


def reset_production_tracing() -> None:
    """設定を取り消し、環境変数とトラッキング URI を元に戻す(テスト・ノートブック用)。

    残っているトレースを送り終えてから戻る。リクエストの処理中には呼ばない。
    """
    global _session
    with _lock:
        session, _session = _session, None
    if session is None:
        return
    session.stop.set()
    mlflow.flush_trace_async_logging()
    mlflow.tracing.reset()
    _renew_trace_buffer()
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
    _call_overhead("trim_call_overhead")
    _update(session)


def _update(session: _Session, *problems: str, **changes: Any) -> None:
    """環境変数の変更と警告を状態に映す。"""
    session.status = replace(
        session.status,
        applied=dict(session.environment.applied),
        warnings=(*session.environment.warnings, *problems),
        **changes,
    )


def _call_overhead(action: str) -> None:
    """call_overhead.py も写してあれば、呼び出し側の時間を縮める(なくても動作は同じ)。"""
    if find_spec(_sibling("call_overhead")):
        getattr(import_module(_sibling("call_overhead")), action)()


def _restore(session: _Session) -> None:
    _call_overhead("restore_call_overhead")
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
    _renew_trace_buffer()
    if session.disabled:
        mlflow.tracing.enable()
    _fix_id_generator()
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


def _renew_trace_buffer() -> None:
    """MLFLOW_TRACE_BUFFER_MAX_SIZE はバッファーを作るときに一度しか読まれないので作り直す。"""
    from mlflow.tracing.trace_manager import InMemoryTraceManager  # 公開 API では作り直せない

    InMemoryTraceManager.reset()


def _fix_id_generator() -> None:
    """MLflow 3.17 の ID 生成器は、終了時に ``__del__`` が必ず失敗し、まれに終了が止まる。"""
    provider: Any = mlflow.tracing.get_bridged_tracer_provider()
    generator: Any = getattr(provider, "id_generator", None)
    kind: Any = generator.__class__
    if kind.__module__.startswith("mlflow.") and "__del__" in vars(kind):
        del kind.__del__


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


def main() -> None:
    """同じバーストを既定値と burst で記録し、保存された件数を比べる。"""
    from chapter8_samples import _lab

    count = 100
    # 待ち時間を省くため、MLflow の上限(1,000 件)も 2,000 件のバーストも 1/20 に縮めて比べる
    scaled_limits = {
        "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE": "50",
        "MLFLOW_TRACE_BUFFER_MAX_SIZE": "50",
    }
    run = f"{int(time.time() * 1000):x}"  # 本番のエクスペリメントにも、前回の結果にも混ぜない
    with _lab.sample(None, fresh_store=True):
        os.environ.update(scaled_limits)
        before = _burst(f"/Shared/ch8-burst-default-{run}", count, "default")
        for name in scaled_limits:
            del os.environ[name]
        after = _burst(f"/Shared/ch8-burst-burst-{run}", count, "burst")
    print(f"{count} リクエストのバースト(既定値の上限 1,000 件と 2,000 件のバーストを 1/20 に縮小)")
    for profile, stored, microseconds in (before, after):
        print(
            f"  {profile:8s} 保存 {stored:3d} 件、消失 {count - stored:3d} 件"
            f"(呼び出し側 1 件 {microseconds:.0f} us)"
        )


def _burst(experiment: str, count: int, profile: ExportProfile) -> tuple[str, int, float]:
    """``count`` 件を一気に記録し、(設定, 保存された件数, 1 件あたりの時間 us) を返す。"""
    status = setup_production_tracing(experiment, "my-llm-app", export_profile=profile)

    @mlflow.trace(name="answer")
    def answer(number: int) -> str:
        return f"回答 {number}"

    started = time.perf_counter()
    for number in range(count):
        answer(number)
    microseconds = (time.perf_counter() - started) / count * 1e6
    mlflow.flush_trace_async_logging()
    found: Any = mlflow.search_traces(
        locations=[status.experiment_id], return_type="list", include_spans=False
    )
    reset_production_tracing()
    return profile, len(found), microseconds


if __name__ == "__main__":
    main()
