"""OTLP の送信を始め、状態を答え、元に戻す。

送信は 1 つのプロセスに 1 つ。環境変数を書き、MLflow のプロバイダーを作り直し、本当に送る形に
なったかを見る。ならなければ全部を元に戻して例外にする。
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from urllib.parse import urlsplit

import mlflow
import mlflow.tracing
from mlflow.tracing.processor.otel import OtelSpanProcessor
from mlflow.tracing.provider import is_tracing_enabled
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor

from .._internals import (
    change_before_export,
    current_provider,
    forget_provider,
    is_mlflows,
    processors_of,
    span_hooks,
    unwrapped,
    wrapped_by,
)
from ..deadlines import run_in_time
from .attributes import with_export_attributes
from .config import Mode, OtlpConfig, OtlpConfigError, OtlpSetupError, OtlpStatus
from .delivery import count_span, restart_counts
from .environment import (
    RESOURCE_VARIABLE,
    platform_environment,
    restore_environment,
    set_variable,
    setting,
    write_environment,
)


@dataclass
class _Installed:
    """``start_otlp_export`` が変えたもの。``disable_otlp_export`` が戻す。"""

    config: OtlpConfig
    tracking_uri: str
    span_processors: list[str]
    warnings: list[str]


_LOCK = threading.RLock()
_installed: _Installed | None = None
_changes = ExitStack()


def start_otlp_export(config: OtlpConfig) -> OtlpStatus:
    """``config`` の送り先へ送り始め、状態を返す。同じ設定なら何も変えない。

    Raises:
        OtlpConfigError: 送り先が、MLflow の保存先と同じサーバー。
        OtlpSetupError: エクスポーターがない、トレースが無効、など。環境は元に戻す。
    """
    with _LOCK:
        if not _is_current(config):
            _check_environment(config)
            _install(config)
        return otlp_status()


def _is_current(config: OtlpConfig) -> bool:
    return (
        _installed is not None
        and _installed.config == config
        and _installed.tracking_uri == mlflow.get_tracking_uri()
        and _is_exporting(config.mode)
    )


def _check_environment(config: OtlpConfig) -> None:
    """書き方は正しくても、このプロセスでは送れない場合を見つける。"""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        raise OtlpSetupError("OTEL_SDK_DISABLED=true switches all tracing off; unset it")
    if not is_tracing_enabled():
        raise OtlpSetupError("MLflow tracing is disabled; call mlflow.tracing.enable() first")
    given = config.certificate_file != setting(platform_environment(), "CERTIFICATE")[1]
    if given and (problem := _ca_bundle(config)):
        raise OtlpSetupError(problem)
    same_server = _address(config.endpoint) == _address(mlflow.get_tracking_uri())
    if config.mode == "dual" and same_server:
        raise OtlpConfigError(
            f"{config.endpoint} is the MLflow server dual mode writes to; use mode='otlp_only'"
        )


def _address(url: str) -> tuple[str, int | None]:
    """ホストとポート。同じサーバーの書き方の違い(localhost と 127.0.0.1 など)をそろえる。"""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    if host in ("127.0.0.1", "::1"):
        host = "localhost"
    return host, port


def _ca_bundle(config: OtlpConfig) -> str:
    """HTTP では、証明書の指定よりも強い環境変数がある。"""
    given = config.certificate_file
    if not given or config.protocol == "grpc" or config.endpoint.startswith("http://"):
        return ""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if os.environ.get(name, given) not in ("", given):
            return f"{name}={os.environ[name]} overrides certificate_file; unset it or use grpc"
    return ""


def _install(config: OtlpConfig) -> None:
    global _installed
    try:
        write_environment(_desired_env(config))
        _changes.close()
        _changes.callback(change_before_export(_changed))
        restart_counts()  # 新しいエクスポーターが、前の数を使い始めないうちに
        warnings = _rebuild_provider()
        if not _is_exporting(config.mode):
            raise OtlpSetupError(
                f"MLflow built {_processor_names()}, not {config.mode} export; a destination "
                "(mlflow.tracing.set_destination, Unity Catalog) replaces OTLP unless mode='dual'"
            )
    except Exception as error:
        _uninstall()
        if isinstance(error, OtlpSetupError):
            raise
        raise OtlpSetupError(f"MLflow could not start the OTLP exporter: {error}") from error
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)  # プロバイダーの終了処理(期限を守らない)より先に動く
    _installed = _Installed(config, mlflow.get_tracking_uri(), _hooks_to_keep(), warnings)


def _changed(processor: OtelSpanProcessor, span: ReadableSpan) -> ReadableSpan:
    count_span(processor, span)
    return with_export_attributes(span)


def _hooks_to_keep() -> list[str]:
    """失ってはいけない span_processors。消えたものも、足し直されるまで覚えておく。"""
    names = _hook_names()
    if _installed and _installed.tracking_uri != mlflow.get_tracking_uri():
        names += [name for name in _installed.span_processors if name not in names]
    return names


def _hook_names() -> list[str]:
    return [getattr(hook, "__name__", type(hook).__name__) for hook in span_hooks()]


def _desired_env(config: OtlpConfig) -> dict[str, str | None]:
    values = config.to_env(platform_environment().get(RESOURCE_VARIABLE, ""))
    if mlflow.get_tracking_uri().startswith("databricks"):
        # Databricks の文書にある名前。OSS 版は MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT だけを読む
        values["MLFLOW_ENABLE_DUAL_EXPORT"] = values["MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT"]
    return values


def _uninstall() -> None:
    global _installed
    _installed = None
    restore_environment()
    if _added():
        _rebuild_provider()
    else:
        forget_provider()
    _changes.close()


def _rebuild_provider() -> list[str]:
    """プロバイダーを作り直す。アプリが足したプロセッサーは移し、移せないものを知らせる。"""
    added = _added()
    resource = os.environ.get(RESOURCE_VARIABLE)
    forget_provider()
    rebuilt = mlflow.tracing.get_bridged_tracer_provider()
    set_variable(RESOURCE_VARIABLE, resource)  # MLflow は、作り直すときに書き換える
    lost: list[str] = []
    for processor in added:
        name = type(processor).__name__
        if wrapped_by(processor):
            lost.append(f"{name} wrapped the old processors; install it after setup_otlp_export")
        elif processor not in processors_of(rebuilt):
            rebuilt.add_span_processor(processor)
    return lost


def _added() -> list[SpanProcessor]:
    return [p for p in processors_of(current_provider()) if not is_mlflows(p)]


def _processor_names() -> tuple[str, ...]:
    return tuple(type(p).__name__ for p in unwrapped(processors_of(current_provider())))


def _is_exporting(mode: Mode) -> bool:
    found = [type(p) for p in unwrapped(processors_of(current_provider())) if is_mlflows(p)]
    return OtelSpanProcessor in found and len(set(found)) == (2 if mode == "dual" else 1)


def otlp_status() -> OtlpStatus:
    """いまの送信先と、気を付けることを返す。設定していなければ ``mode="off"``。"""
    with _LOCK:
        if _installed is None:
            return OtlpStatus("off", processors=_processor_names())
        mlflow.tracing.get_bridged_tracer_provider()  # set_experiment の後は、ここで作り直される
        config = _installed.config
        return OtlpStatus(
            config.mode,
            config.endpoint,
            config.protocol,
            config.service_name,
            processors=_processor_names(),
            genai_semconv=config.genai_semconv,
            warnings=(*config.overridden, *_installed.warnings, *_drift(_installed)),
        )


def _drift(installed: _Installed) -> Iterator[str]:
    """設定した後で変わってしまったこと。"""
    now = _hook_names()
    if gone := [name for name in installed.span_processors if name not in now]:
        yield f"span processors {gone} are gone; configure them again after set_tracking_uri"
    if mlflow.get_tracking_uri() != installed.tracking_uri:
        yield "set_tracking_uri was called after setup_otlp_export; call it before"
    if not _is_exporting(installed.config.mode):
        yield f"MLflow exports with {_processor_names()}; call setup_otlp_export again"
    if problem := _ca_bundle(installed.config):
        yield problem
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"):
        if os.environ.get(name):
            yield f"{name} makes MLflow send a metric with user ids as labels"


def disable_otlp_export(timeout_seconds: float = 10.0) -> OtlpStatus:
    """OTLP への送信をやめ、環境変数を ``setup_otlp_export`` の前に戻す。

    送信待ちは ``timeout_seconds`` 秒まで送り、残りはあきらめる。MLflow への記録は続く。
    """
    with _LOCK:
        if _installed is not None:
            _drain(timeout_seconds)
            _uninstall()
        return otlp_status()


def _drain(timeout_seconds: float) -> None:
    """OTLP を書き出す。期限を過ぎたら送信をやめるので、終了処理が待たされない。"""
    found = unwrapped(processors_of(current_provider()))
    sending = [p for p in found if isinstance(p, OtelSpanProcessor)]
    finished = run_in_time([processor.force_flush for processor in sending], timeout_seconds)
    for processor, is_empty in zip(sending, finished, strict=True):
        if not is_empty:
            _abandon(processor)


def _abandon(processor: OtelSpanProcessor) -> None:
    """残りをあきらめる。HTTP の送信中の 1 回は止められないので、後の終了処理にも待たせない。"""
    processor.span_exporter.shutdown()
    threading.Thread(target=processor.shutdown, daemon=True).start()
    vars(processor).update(shutdown=lambda: None, force_flush=lambda *_: False)


def _at_exit() -> None:
    if _installed is not None:
        _drain(_installed.config.timeout_seconds)
