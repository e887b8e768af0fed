"""8.5.3 OTLP の環境変数: 基盤(Kubernetes など)が付けた値と引数から設定を作り、書き、元に戻す。

引数にないものは、基盤の ``OTEL_*`` を残す(ヘッダーとリソース属性は合わせる)。引数が基盤の値を替えた
ときは、そう書いて残す。
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..endpoint import signal_url, split_endpoint
from .config import PREFIX, OtlpConfig, OtlpConfigError, OtlpOptions, parse_pairs

if TYPE_CHECKING:
    from typing_extensions import Unpack

RESOURCE_VARIABLE = "OTEL_RESOURCE_ATTRIBUTES"
_before: dict[str, str | None] = {}


# ---- 書く、戻す ----


def platform_environment() -> dict[str, str]:
    """``setup_otlp_export`` が書く前の環境変数。"""
    now: dict[str, str | None] = {**os.environ, **_before}
    return {name: value for name, value in now.items() if value is not None}


def write_environment(values: Mapping[str, str | None]) -> None:
    """環境変数を書く。空の値は基盤の値のまま、None は消す。初めてなら、いまの値を控える。"""
    for name, value in values.items():
        before = _before.setdefault(name, os.environ.get(name))
        set_variable(name, before if value == "" else value)


def restore_environment() -> None:
    """``setup_otlp_export`` が書く前に戻す。"""
    for name, value in _before.items():
        set_variable(name, value)
    _before.clear()


def set_variable(name: str, value: str | None) -> None:
    """環境変数を書く。None なら消す。"""
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


# ---- 読む ----

_SETTINGS = {
    "endpoint": "ENDPOINT",
    "protocol": "PROTOCOL",
    "compression": "COMPRESSION",
    "timeout_seconds": "TIMEOUT",
    "certificate_file": "CERTIFICATE",
    "headers": "HEADERS",
}


def setting(environment: Mapping[str, str], name: str) -> tuple[str, str]:
    """トレース用、なければ全体用の ``OTEL_EXPORTER_OTLP_*`` の、環境変数の名前と値。"""
    for variable in (f"{PREFIX}TRACES_{name}", f"{PREFIX}{name}"):
        if value := environment.get(variable, "").strip():
            return variable, value
    return "", ""


def platform_resource(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """基盤が付けたリソース属性。"""
    found = platform_environment() if environment is None else environment
    return parse_pairs(found.get(RESOURCE_VARIABLE, ""))


def _platform_options(environment: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """項目ごとの、基盤の環境変数の名前と値。"""
    found: dict[str, tuple[str, Any]] = {}
    if name := platform_resource(environment).get("service.name"):
        found["service_name"] = RESOURCE_VARIABLE, name
    if name := environment.get("OTEL_SERVICE_NAME", "").strip():
        found["service_name"] = "OTEL_SERVICE_NAME", name
    for option, suffix in _SETTINGS.items():
        variable, text = setting(environment, suffix)
        if text:
            found[option] = variable, _parsed(option, text)
    return found


def _parsed(option: str, text: str) -> Any:
    if option == "headers":
        return parse_pairs(text)
    if option == "timeout_seconds":
        with suppress(ValueError):
            return float(text)
    return text.lower() if option == "compression" else text


def build_otlp_config(
    endpoint: str | None = None,
    service_name: str = "",
    protocol: str | None = None,
    *,
    env: Mapping[str, str] | None = None,
    **options: Unpack[OtlpOptions],
) -> OtlpConfig:
    """値を検査して ``OtlpConfig`` を作る。

    Args:
        endpoint: ``http://HOST:4317`` (gRPC) や ``http://HOST:4318`` (HTTP)。HTTP では
            ``/v1/traces`` がなければ足し、gRPC ではパスを取り除く。
        service_name: バックエンドで見えるサービス名。
        protocol: ``"grpc"`` (既定)か ``"http/protobuf"``。
        env: 基盤の設定を読む場所。既定は ``os.environ`` (``setup_otlp_export`` が書く前のもの)。
        **options: ``OtlpConfig`` の残りの項目。

    省略したものは、``OTEL_EXPORTER_OTLP_*`` ``OTEL_SERVICE_NAME`` ``OTEL_RESOURCE_ATTRIBUTES`` から
    取る。

    Raises:
        OtlpConfigError: 値が誤っている。
    """
    environment = platform_environment() if env is None else env
    found = _platform_options(environment)
    main = {"endpoint": endpoint, "service_name": service_name or None, "protocol": protocol}
    given = _without_none({**main, **options})
    values = _completed(given, found, environment)
    try:
        config = OtlpConfig(**values)
    except OtlpConfigError as error:
        variables = sorted({found[option][0] for option in found.keys() - given.keys()})
        source = f" (from {', '.join(variables)})" if variables else ""
        raise OtlpConfigError(f"{error}{source}") from None
    return replace(config, overridden=tuple(_overridden(config, found, environment)))


def resolve_config(
    endpoint: str | OtlpConfig | None,
    service_name: str,
    protocol: str | None,
    options: OtlpOptions,
) -> OtlpConfig:
    """``setup_otlp_export`` の引数を 1 つの設定にする。できている設定は、単独でだけ受け取る。"""
    if not isinstance(endpoint, OtlpConfig):
        return build_otlp_config(endpoint, service_name, protocol, **options)
    if service_name or options or protocol not in (None, endpoint.protocol):
        raise OtlpConfigError("an OtlpConfig already has all options; pass it alone")
    return endpoint


def _without_none(given: Mapping[str, Any]) -> dict[str, Any]:
    """None は、渡されなかったことにする(意味のあるものと、誤りとして知らせるもののほかは)。"""
    keep_none = ("headers", "resource_attributes", "service_namespace")
    return {name: v for name, v in given.items() if v is not None or name in keep_none}


def _completed(
    given: dict[str, Any], found: dict[str, tuple[str, Any]], environment: Mapping[str, str]
) -> dict[str, Any]:
    """引数に、基盤の値を足したもの。"""
    values: dict[str, Any] = {"endpoint": None, "service_name": ""}
    for option, (_, value) in found.items():
        if option != "certificate_file" or Path(value).is_file():
            values[option] = value
    if namespace := platform_resource(environment).get("service.namespace"):
        values["service_namespace"] = namespace
    values |= given
    headers = given.get("headers")
    if isinstance(headers, Mapping) and "headers" in found:
        own = {str(name).lower() for name in headers}
        kept = {name: v for name, v in found["headers"][1].items() if name.lower() not in own}
        values["headers"] = {**kept, **headers}
    return values


def _overridden(
    config: OtlpConfig, found: dict[str, tuple[str, Any]], environment: Mapping[str, str]
) -> Iterator[str]:
    """基盤の値のうち、引数が替えたもの。"""
    for option, (variable, old) in found.items():
        used = getattr(config, option)
        if option == "headers":
            own = {name.lower(): value for name, value in config.headers.items()}
            changed = [name for name, value in old.items() if own[name.lower()] != value]
            yield from (f"header {name!r} overrides {variable}" for name in changed)
        elif option == "certificate_file" and used is None:
            yield f"{variable}={old!r} does not exist; TLS uses default roots"
        elif not _is_same(option, used, old):
            yield f"{option}={used!r} overrides {variable}={_without_keys(old)!r}"
    resource = config.resource()
    for name, old in platform_resource(environment).items():
        if resource.get(name, old) != old:
            yield f"{name}={resource[name]!r} overrides {RESOURCE_VARIABLE} {name}={old!r}"


def _is_same(option: str, used: Any, old: Any) -> bool:
    if option == "endpoint":
        with suppress(ValueError):
            used = signal_url(split_endpoint(used), "traces")
            old = signal_url(split_endpoint(old), "traces")
    return bool(used == old)


def _without_keys(value: Any) -> Any:
    """URL の中の鍵かもしれないところを除く。"""
    return re.sub("//[^/]*@|[?#].*", "//***@", value) if isinstance(value, str) else value
