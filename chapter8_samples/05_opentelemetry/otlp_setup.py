"""8.5.3 OTLP エクスポートの設定(リスト8.14-8.16, 表8.16)。

同じトレースを MLflow と OpenTelemetry の両方へ、同じ ID で届ける。設定の誤りは最初の
リクエストではなくここで例外にし、送信先が止まってもアプリは止めない。

実行::

    $ python chapter8_samples/05_opentelemetry/otlp_setup.py
    送信(dual): OtelSpanProcessor, MlflowV3SpanProcessor
    応答は 1 秒未満。OTLP に届いたスパン 6、失われたスパン 0
    MLflow のトレース 3、OTLP のトレース 3、ID は一致
      chat gpt-4o-mini: gen_ai.usage.input_tokens=120 user.id=user-1 session.id=s-1
      invoke_agent answer: user.id=user-1 session.id=s-1 mlflow.traceTag.release=v1
    受信側が停止しても: 応答は 1 秒未満。OTLP に届いたスパン 0、失われたスパン 6

Databricks では ``MLFLOW_TRACKING_URI=databricks`` のまま同じ呼び出しで、Databricks と
OTLP の両方に届く。本物の送信先には ``--preset`` か ``--endpoint`` を付ける(``--check`` で確認)。
"""

from __future__ import annotations

import argparse
import atexit
import importlib
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import mlflow
import mlflow.tracing
from mlflow.tracing.config import get_config
from mlflow.tracing.processor.otel import OtelSpanProcessor
from mlflow.tracing.provider import is_tracing_enabled, provider
from opentelemetry.sdk.trace import SpanProcessor

from chapter8_samples.opentelemetry.export import config as settings
from chapter8_samples.opentelemetry.export.config import (
    OtlpConfig,
    OtlpConfigError,
    OtlpOptions,
    OtlpSetupError,
    OtlpStatus,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass
class _Installed:
    """``setup_otlp_export`` が変えたもの。``disable_otlp_export`` が戻す。"""

    config: OtlpConfig
    saved_env: dict[str, str | None]
    tracking_uri: str
    span_processors: list[str]
    warnings: list[str]


_LOCK = threading.RLock()
_installed: _Installed | None = None


def setup_otlp_export(
    endpoint: str | OtlpConfig,
    service_name: str = "",
    protocol: str = "grpc",
    **options: Unpack[OtlpOptions],
) -> OtlpStatus:
    """MLflow のトレースを OTLP でも送る。起動時に、最初のトレースより前に呼ぶ。

    Args:
        endpoint: ``http://otel-collector:4317`` など。``OtlpConfig`` を 1 つ渡してもよい。
        service_name: バックエンドで見えるサービス名。
        protocol: ``"grpc"`` か ``"http/protobuf"``。
        **options: ``mode="dual"``(既定。MLflow にも残す)か ``"otlp_only"`` のほか、
            ``headers`` ``deployment_environment`` など ``OtlpConfig`` の項目。

    Returns:
        状態。同じ設定でもう一度呼んでも何も変わらない。

    Raises:
        OtlpConfigError: 設定値が誤っている。
        OtlpSetupError: エクスポーターがない、トレースが無効、など。環境は元に戻す。

    span_processors、エクスペリメント、送信先は残る。``mlflow.set_tracking_uri`` より後に呼び(逆だと
    span_processors が消える)、8.1 の設定より先に呼ぶ(逆だと MLflow の停止中に起動できない)。
    """
    config = _resolve(endpoint, service_name, protocol, options)
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


def _resolve(
    endpoint: str | OtlpConfig, service_name: str, protocol: str, options: OtlpOptions
) -> OtlpConfig:
    if not isinstance(endpoint, OtlpConfig):
        return settings.build_otlp_config(endpoint, service_name, protocol, **options)
    if not (service_name or options) and protocol in ("grpc", endpoint.protocol):
        return endpoint
    raise OtlpConfigError("an OtlpConfig already has all options; pass it alone")


def _check_environment(config: OtlpConfig) -> None:
    """書き方は正しくても、このプロセスでは送れない場合を見つける。"""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        raise OtlpSetupError("OTEL_SDK_DISABLED=true switches all tracing off; unset it")
    if not is_tracing_enabled():
        raise OtlpSetupError("MLflow tracing is disabled; call mlflow.tracing.enable() first")
    if config.certificate_file and config.protocol != "grpc":
        _check_ca_bundle(config.certificate_file)
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
    return "localhost" if host in ("127.0.0.1", "::1") else host, port


def _check_ca_bundle(certificate_file: str) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        if os.environ.get(name, certificate_file) not in ("", certificate_file):
            raise OtlpSetupError(
                f"{name}={os.environ[name]} overrides certificate_file; unset it or use grpc"
            )


def _install(config: OtlpConfig) -> None:
    global _installed
    present = {name: os.environ.get(name) for name in settings.OWNED_ENV}
    saved = _installed.saved_env if _installed else present
    try:
        settings.write_env(_desired_env(config, saved))
        settings.add_export_attributes()
        _start_counting()  # プロバイダーを作る前に。作るときに on_end を控えるものがある
        warnings = _rebuild_provider()
        _start_counting()
        if not _is_exporting(config.mode):
            raise OtlpSetupError(
                f"MLflow built {_processor_names()}, not {config.mode} export; a destination "
                "(mlflow.tracing.set_destination, Unity Catalog) replaces OTLP unless mode='dual'"
            )
    except Exception as error:
        _uninstall(saved)
        if isinstance(error, OtlpSetupError):
            raise
        raise OtlpSetupError(f"MLflow could not start the OTLP exporter: {error}") from error
    atexit.unregister(_at_exit)
    atexit.register(_at_exit)  # プロバイダーの終了処理(期限を守らない)より先に動く
    _installed = _Installed(config, saved, mlflow.get_tracking_uri(), _kept(), warnings)


def _kept() -> list[str]:
    """失ってはいけない span_processors。消えたものも、足し直されるまで覚えておく。"""
    moved = _installed and _installed.tracking_uri != mlflow.get_tracking_uri()
    gone = _installed.span_processors if _installed and moved else []
    return list(dict.fromkeys([*_span_processor_names(), *gone]))


def _span_processor_names() -> list[str]:
    return [getattr(p, "__name__", type(p).__name__) for p in get_config().span_processors]


def _desired_env(config: OtlpConfig, saved: Mapping[str, str | None]) -> dict[str, str | None]:
    values = config.to_env(saved["OTEL_RESOURCE_ATTRIBUTES"] or "")
    if mlflow.get_tracking_uri().startswith("databricks"):
        # Databricks の文書にある名前。OSS 版は MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT だけを読む
        values["MLFLOW_ENABLE_DUAL_EXPORT"] = values["MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT"]
    return {name: values.get(name) for name in settings.OWNED_ENV}


def _uninstall(saved: Mapping[str, str | None]) -> None:
    global _installed
    _installed = None
    settings.write_env(saved)
    if _added():
        _rebuild_provider()
        settings.write_env(saved)  # MLflow は作り直すときに OTEL_RESOURCE_ATTRIBUTES を書き換える
    else:
        provider.reset()


def _start_counting() -> None:
    """otlp_delivery.py が隣にあれば、届いた数を 0 から数える。"""
    try:
        _sibling("otlp_delivery").watch_delivery()
    except ModuleNotFoundError as missing:
        if not (missing.name or "").endswith("otlp_delivery"):
            raise


def _rebuild_provider() -> list[str]:
    """プロバイダーを作り直す。アプリが足したプロセッサーは移し、移せないものを知らせる。"""
    added = _added()
    # tracing.reset() と違い、span_processors と送信先を消さない(set_experiment と同じ経路)
    provider.reset()
    rebuilt = mlflow.tracing.get_bridged_tracer_provider()
    lost: list[str] = []
    for processor in added:
        name = type(processor).__name__
        if len(list(_unwrapped([processor]))) > 1:
            lost.append(f"{name} wrapped the old processors; install it after setup_otlp_export")
        else:
            rebuilt.add_span_processor(processor)
    return lost


def _added() -> list[SpanProcessor]:
    return [p for p in _top_level() if not type(p).__module__.startswith("mlflow.")]


def _top_level() -> tuple[SpanProcessor, ...]:
    active = getattr(provider.get(), "_active_span_processor", None)
    return tuple(getattr(active, "_span_processors", ()))


def _unwrapped(processors: Iterable[SpanProcessor]) -> Iterator[SpanProcessor]:
    """プロセッサーと、その中に包まれたプロセッサー(テールサンプリングなど)。"""
    for processor in processors:
        yield processor
        if type(processor).__module__.startswith("mlflow."):
            continue
        values: list[Any] = list(vars(processor).values())
        values += [i for v in values if isinstance(v, (list, tuple)) for i in v]
        yield from _unwrapped(value for value in values if isinstance(value, SpanProcessor))


def _processor_names() -> tuple[str, ...]:
    return tuple(type(p).__name__ for p in _unwrapped(_top_level()))


def _is_exporting(mode: settings.Mode) -> bool:
    found = [type(p) for p in _unwrapped(_top_level()) if type(p).__module__.startswith("mlflow.")]
    return OtelSpanProcessor in found and len(set(found)) == (2 if mode == "dual" else 1)


def otlp_status() -> OtlpStatus:
    """いまの送信先と、気を付けることを返す。設定していなければ ``mode="off"``。"""
    with _LOCK:
        if _installed is None:
            return OtlpStatus("off", processors=_processor_names())
        mlflow.tracing.get_bridged_tracer_provider()  # set_experiment の後は、ここで作り直される
        c, names = _installed.config, _processor_names()
        warnings = (*_installed.warnings, *_drift(_installed))
        return OtlpStatus(
            c.mode, c.endpoint, c.protocol, c.service_name, names, c.genai_semconv, warnings
        )


def _drift(installed: _Installed) -> Iterator[str]:
    """設定した後で変わってしまったこと。"""
    now = _span_processor_names()
    if gone := [name for name in installed.span_processors if name not in now]:
        yield f"span processors {gone} are gone; configure them again after set_tracking_uri"
    if mlflow.get_tracking_uri() != installed.tracking_uri:
        yield "set_tracking_uri was called after setup_otlp_export; call it before"
    if not _is_exporting(installed.config.mode):
        yield f"MLflow exports with {_processor_names()}; call setup_otlp_export again"
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
            _uninstall(_installed.saved_env)
        return otlp_status()


def _drain(timeout_seconds: float) -> None:
    """OTLP を書き出す。期限を過ぎたら送信をやめるので、終了処理が待たされない。"""
    deadline = time.monotonic() + timeout_seconds
    for processor in _unwrapped(_top_level()):
        if isinstance(processor, OtelSpanProcessor):
            worker = threading.Thread(target=processor.force_flush, daemon=True)
            worker.start()
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                _abandon(processor)


def _abandon(processor: OtelSpanProcessor) -> None:
    """残りをあきらめる。HTTP の送信中の 1 回は止められないので、後の終了処理にも待たせない。"""
    processor.span_exporter.shutdown()
    threading.Thread(target=processor.shutdown, daemon=True).start()
    vars(processor).update(shutdown=lambda: None, force_flush=lambda *_: False)


def _at_exit() -> None:
    if _installed is not None:
        _drain(_installed.config.timeout_seconds)


def setup_otlp_via_collector(
    service_name: str,
    collector_endpoint: str = "http://otel-collector:4317",
    service_version: str | None = None,
    deployment_environment: str | None = "production",
    **options: Unpack[settings.OtlpTransportOptions],
) -> OtlpStatus:
    """Collector へ gRPC で送る。"""
    return setup_otlp_export(
        collector_endpoint,
        service_name,
        service_version=service_version,
        deployment_environment=deployment_environment,
        **options,
    )


def setup_otlp_for_datadog(
    service_name: str,
    dd_api_key: str | None = None,
    dd_site: str = "datadoghq.com",
    **options: Unpack[OtlpOptions],
) -> OtlpStatus:
    """Datadog の受信エンドポイントへ直接送る(HTTP だけ)。キーは省略すると ``DD_API_KEY``。"""
    if not (key := dd_api_key or os.environ.get("DD_API_KEY")):
        raise OtlpConfigError("Datadog needs an API key; pass dd_api_key or set DD_API_KEY")
    options["headers"] = {"dd-api-key": key, **options.get("headers", {})}
    return setup_otlp_export(f"https://otlp.{dd_site}", service_name, "http/protobuf", **options)


def setup_otlp_for_grafana_tempo(
    service_name: str, tempo_endpoint: str = "http://tempo:4317", **options: Unpack[OtlpOptions]
) -> OtlpStatus:
    """Grafana Tempo へ gRPC で送る。"""
    return setup_otlp_export(tempo_endpoint, service_name, **options)


def setup_otlp_for_jaeger(
    service_name: str, jaeger_endpoint: str = "http://jaeger:4317", **options: Unpack[OtlpOptions]
) -> OtlpStatus:
    """Jaeger へ gRPC で送る。"""
    return setup_otlp_export(jaeger_endpoint, service_name, **options)


def main() -> None:
    """3 件のリクエストを両方へ送り、届いたものを見てから、受信側を止める。"""
    from chapter8_samples import _lab
    from chapter8_samples._lab.servers.receivers import OtlpReceiver

    chosen = _arguments()
    with _lab.sample("ch8-otlp-export") as lab, OtlpReceiver() as sink:
        config = chosen.config or _local_config(sink, chosen.protocol)
        if chosen.check:
            check = _sibling("otlp_delivery").check_config(config)
            print(f"{check.reason}: {check.detail}")
            sys.exit(0 if check.ok else 1)
        status = setup_otlp_export(config)
        print(f"送信({status.mode}): {', '.join(status.processors)}")
        print(_three_requests())
        if not chosen.config:
            _show(sink.spans, lab.experiment_id or "")
            sink.stop()
            print(f"受信側が停止しても: {_three_requests()}")
        disable_otlp_export()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=main.__doc__)
    real = parser.add_mutually_exclusive_group()
    real.add_argument("--endpoint", help="本物の送信先(省略すると手元の受信側)")
    real.add_argument("--preset", help="otlp_presets.py の名前(鍵は環境変数から読む)")
    parser.add_argument("--protocol", choices=settings.PROTOCOLS)
    parser.add_argument("--check", action="store_true", help="1 スパンを送り、届いたかだけを答える")
    chosen = parser.parse_args()
    try:
        chosen.config = _real_config(chosen)
    except OtlpConfigError as error:
        parser.error(str(error))
    return chosen


def _real_config(chosen: argparse.Namespace) -> OtlpConfig | None:
    protocol = {"protocol": chosen.protocol} if chosen.protocol else {}
    if chosen.preset:
        return _sibling("otlp_presets").preset(chosen.preset, "support-bot", **protocol)
    if chosen.endpoint is None:
        return None
    return settings.build_otlp_config(chosen.endpoint, "support-bot", **protocol)


def _local_config(sink: Any, protocol: str | None) -> OtlpConfig:
    protocol = protocol or "grpc"
    endpoint = sink.grpc_endpoint if protocol == "grpc" else sink.http_endpoint
    return settings.build_otlp_config(endpoint, "support-bot", protocol, timeout_seconds=1.0)


def _sibling(name: str) -> Any:
    return importlib.import_module(f"{__package__}.{name}" if __package__ else name)


def _three_requests() -> str:
    delivery, started = _sibling("otlp_delivery"), time.perf_counter()
    before = delivery.delivery_counts()
    for number in (1, 2, 3):
        _answer(f"user-{number}")
    speed = "1 秒未満" if time.perf_counter() - started < 1 else "1 秒以上"
    after = delivery.flush_all(timeout_seconds=15.0)  # 本物の送信先の期限(10 秒)より長く
    delivered, lost = after.delivered - before.delivered, after.lost - before.lost
    return f"応答は {speed}。OTLP に届いたスパン {delivered}、失われたスパン {lost}"


@mlflow.trace(name="answer", span_type="AGENT")
def _answer(user: str) -> None:
    who = {"mlflow.trace.user": user, "mlflow.trace.session": "s-1"}
    mlflow.update_current_trace(tags={"release": "v1"}, metadata=who)
    with mlflow.start_span("llm", span_type="CHAT_MODEL") as llm:
        llm.set_attribute("mlflow.llm.model", "gpt-4o-mini")
        llm.set_attribute("mlflow.llm.provider", "openai")
        llm.set_attribute("mlflow.chat.tokenUsage", {"input_tokens": 120, "output_tokens": 20})


def _show(spans: Sequence[Any], experiment_id: str) -> None:
    traces: Any = mlflow.search_traces(locations=[experiment_id], return_type="list")
    ours = {trace.info.trace_id.removeprefix("tr-") for trace in traces}
    theirs = {span.trace_id for span in spans}
    same = "一致" if ours == theirs else "不一致"
    print(f"MLflow のトレース {len(ours)}、OTLP のトレース {len(theirs)}、ID は{same}")
    shown = ("gen_ai.usage.input_tokens", "user.id", "session.id", "mlflow.traceTag.release")
    for span in spans[:2]:
        values = " ".join(f"{k}={span.attributes[k]}" for k in shown if k in span.attributes)
        print(f"  {span.name}: {values}")


if __name__ == "__main__":
    main()
