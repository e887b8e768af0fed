"""8.5.3 OTLP の環境変数: 基盤(Kubernetes など)が付けた値を読み、書き、元に戻す。"""

from __future__ import annotations

import os
from collections.abc import Mapping
from urllib.parse import quote, unquote

PREFIX = "OTEL_EXPORTER_OTLP_"
# setup_otlp_export が書き、disable_otlp_export が戻す環境変数
OWNED_ENV = (
    *(f"MLFLOW_{name}" for name in ("ENABLE_DUAL_EXPORT", "TRACE_ENABLE_OTLP_DUAL_EXPORT")),
    *(f"MLFLOW_ENABLE_{name}" for name in ("OTEL_GENAI_SEMCONV", "OTLP_EXPORTER")),
    *(f"{PREFIX}TRACES_{name}" for name in ("ENDPOINT", "PROTOCOL", "HEADERS", "TIMEOUT")),
    *(f"{PREFIX}TRACES_{name}" for name in ("COMPRESSION", "CERTIFICATE", "INSECURE")),
    *("OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME"),
)
_before: dict[str, str | None] | None = None


def platform_environment() -> dict[str, str]:
    """``setup_otlp_export`` が書く前の環境変数。"""
    now: dict[str, str | None] = {**os.environ, **(_before or {})}
    return {name: value for name, value in now.items() if value is not None}


def write_environment(values: Mapping[str, str | None]) -> None:
    """``OWNED_ENV`` を書く(None のものは消す)。初めてなら、いまの値を控える。"""
    global _before
    if _before is None:
        _before = {name: os.environ.get(name) for name in OWNED_ENV}
    _write(values)


def restore_environment() -> None:
    """``setup_otlp_export`` が書く前に戻す。"""
    _write(_before or {})


def forget_environment() -> None:
    """いまの値を、基盤のものとして扱う。"""
    global _before
    _before = None


def _write(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def setting(environment: Mapping[str, str], name: str) -> tuple[str, str]:
    """トレース用、なければ全体用の ``OTEL_EXPORTER_OTLP_*`` の、環境変数の名前と値。"""
    for variable in (f"{PREFIX}TRACES_{name}", f"{PREFIX}{name}"):
        if value := environment.get(variable, "").strip():
            return variable, value
    return "", ""


def parse_resource_attributes(text: str) -> dict[str, str]:
    """``OTEL_RESOURCE_ATTRIBUTES`` やヘッダーの ``k=v,k=v`` を読む。

    壊れた項目だけを飛ばす(MLflow は 1 つでも壊れていると、全部を捨てる)。

    >>> parse_resource_attributes("team=search,broken,")
    {'team': 'search'}
    """
    pairs = (item.partition("=") for item in text.split(","))
    return {k.strip(): unquote(v.strip()) for k, found, v in pairs if found and k.strip()}


def format_pairs(pairs: Mapping[str, str]) -> str:
    """``k=v,k=v`` にする。区切りの文字と日本語はパーセント符号化する。"""
    return ",".join(f"{name}={quote(value, safe='')}" for name, value in pairs.items())
