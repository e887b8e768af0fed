"""8.5.3 主なバックエンドへの OTLP 設定。

接続先ごとに、URL・方式・ヘッダー名が違う。公開文書の値を 1 つの表にまとめ、鍵は
環境変数から読む。gRPC を受け付けない接続先に gRPC を選ぶと、送る前に知らせる。

Databricks では ``preset("databricks", ...)`` が Unity Catalog の表へ送る設定を作る。
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import OtlpConfig, OtlpConfigError, Protocol
from .environment import build_otlp_config


@dataclass(frozen=True, kw_only=True)
class OtlpPreset:
    """バックエンド 1 つの既定値。``{NAME}`` は環境変数 NAME の値で埋める。"""

    endpoint: str
    protocols: tuple[Protocol, ...] = ("grpc", "http/protobuf")
    """受け付ける方式。先頭が既定。"""
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    basic_auth: tuple[str, str] | None = None
    """``Authorization: Basic`` にするユーザー名と鍵の環境変数。"""
    defaults: Mapping[str, str] = field(default_factory=dict[str, str])
    """なくてもよい環境変数の既定値。"""
    genai_semconv: bool = True


_HTTP: tuple[Protocol, ...] = ("http/protobuf",)
_HTTP_FIRST: tuple[Protocol, ...] = ("http/protobuf", "grpc")


def _local(variable: str) -> OtlpPreset:
    """手元で動くもの。"""
    return OtlpPreset(endpoint="{" + variable + "}", defaults={variable: "http://127.0.0.1:4317"})


PRESETS: dict[str, OtlpPreset] = {
    "collector": _local("OTEL_COLLECTOR_URL"),
    "jaeger": _local("JAEGER_URL"),
    "tempo": _local("TEMPO_URL"),
    "arize_phoenix": _local("PHOENIX_URL"),
    "datadog_agent": _local("DD_AGENT_URL"),
    "datadog": OtlpPreset(  # docs.datadoghq.com/opentelemetry/setup/otlp_ingest/traces
        endpoint="https://otlp.{DD_SITE}",
        protocols=_HTTP,
        headers={"dd-api-key": "{DD_API_KEY}"},
        defaults={"DD_SITE": "datadoghq.com"},
    ),
    "grafana_cloud": OtlpPreset(  # grafana.com/docs/grafana-cloud/send-data/otlp
        endpoint="https://otlp-gateway-{GRAFANA_ZONE}.grafana.net/otlp",
        protocols=_HTTP,
        basic_auth=("GRAFANA_INSTANCE_ID", "GRAFANA_API_TOKEN"),
    ),
    "new_relic": OtlpPreset(  # docs.newrelic.com opentelemetry-otlp
        endpoint="{NEW_RELIC_OTLP_URL}",
        protocols=_HTTP_FIRST,
        headers={"api-key": "{NEW_RELIC_LICENSE_KEY}"},
        defaults={"NEW_RELIC_OTLP_URL": "https://otlp.nr-data.net:4318"},
    ),
    "honeycomb": OtlpPreset(  # docs.honeycomb.io
        endpoint="{HONEYCOMB_API_URL}",
        protocols=_HTTP_FIRST,
        headers={"x-honeycomb-team": "{HONEYCOMB_API_KEY}"},
        defaults={"HONEYCOMB_API_URL": "https://api.honeycomb.io:443"},
    ),
    "langfuse": OtlpPreset(  # langfuse.com/docs/opentelemetry
        endpoint="{LANGFUSE_HOST}/api/public/otel",
        protocols=_HTTP,
        headers={"x-langfuse-ingestion-version": "4"},
        basic_auth=("LANGFUSE_PUBLIC_KEY", "LANGFUSE_SECRET_KEY"),
        defaults={"LANGFUSE_HOST": "https://cloud.langfuse.com"},
    ),
    "mlflow": OtlpPreset(  # mlflow.org/docs opentelemetry/ingest
        endpoint="{MLFLOW_OTLP_URL}",
        protocols=_HTTP,
        headers={"x-mlflow-experiment-id": "{MLFLOW_EXPERIMENT_ID}"},
        defaults={"MLFLOW_OTLP_URL": "http://127.0.0.1:5000"},
        genai_semconv=False,
    ),
    "databricks": OtlpPreset(  # docs.databricks.com mlflow3 genai tracing Unity Catalog
        endpoint="{DATABRICKS_HOST}/api/2.0/otel",
        protocols=_HTTP,
        headers={
            "Authorization": "Bearer {DATABRICKS_TOKEN}",
            "X-Databricks-UC-Table-Name": "{DATABRICKS_UC_TABLE}",
        },
        genai_semconv=False,
    ),
}


def preset(
    name: str, service_name: str, *, env: Mapping[str, str] | None = None, **options: Any
) -> OtlpConfig:
    """``PRESETS`` の 1 つから設定を作る。

    Args:
        name: ``PRESETS`` のキー。
        service_name: バックエンドで見えるサービス名。
        env: 接続先と鍵を読む場所。既定は ``os.environ``。
        **options: ``build_otlp_config`` に渡す値。既定値より優先する。

    Raises:
        OtlpConfigError: 名前がない、環境変数が足りない、または対応しない方式。
    """
    if name not in PRESETS:
        raise OtlpConfigError(f"preset {name!r} does not exist; choose from {sorted(PRESETS)}")
    chosen = PRESETS[name]
    protocol: str = options.pop("protocol", chosen.protocols[0])
    if protocol not in chosen.protocols:
        raise OtlpConfigError(f"{name} accepts {chosen.protocols} only, not {protocol!r}")
    try:
        endpoint, headers = _filled(chosen, os.environ if env is None else env)
    except KeyError as missing:
        variable = missing.args[0]
        raise OtlpConfigError(
            f"preset {name!r} needs the environment variable {variable}"
        ) from None
    headers |= options.pop("headers", {})
    options.setdefault("genai_semconv", chosen.genai_semconv)
    return build_otlp_config(endpoint, service_name, protocol, env=env, headers=headers, **options)


def _filled(chosen: OtlpPreset, env: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """環境変数の値で埋めた送り先とヘッダー。足りなければ KeyError。"""
    values = dict(chosen.defaults)
    for variable, text in env.items():
        if value := text.strip():  # ファイルから読んだ鍵の末尾の改行を除く
            values[variable] = value
    headers = {key: text.format_map(values) for key, text in chosen.headers.items()}
    if chosen.basic_auth:
        user, secret = chosen.basic_auth
        pair = f"{values[user]}:{values[secret]}"
        headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    return chosen.endpoint.format_map(values), headers
