"""8.5.3 引数と、基盤が付けた環境変数から、OTLP の設定を 1 つ作る。

引数にないものは、基盤の ``OTEL_*`` を残す(ヘッダーとリソース属性は合わせる)。引数が基盤の値を替えた
ときは、そう書いて残す。
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..endpoint import signal_url, split_endpoint
from .config import OtlpConfig, OtlpConfigError, OtlpOptions
from .environment import parse_resource_attributes, platform_environment, setting

if TYPE_CHECKING:
    from typing_extensions import Unpack

_SETTINGS = {
    "endpoint": "ENDPOINT",
    "protocol": "PROTOCOL",
    "compression": "COMPRESSION",
    "timeout_seconds": "TIMEOUT",
    "certificate_file": "CERTIFICATE",
}
_RESOURCE = {
    "service_name": "service.name",
    "service_version": "service.version",
    "service_namespace": "service.namespace",
    "deployment_environment": "deployment.environment.name",
}
_ATTRIBUTES = "OTEL_RESOURCE_ATTRIBUTES"


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
    platform = _Platform(platform_environment() if env is None else env)
    main = {"endpoint": endpoint, "service_name": service_name or None, "protocol": protocol}
    given: dict[str, Any] = {
        name: value
        for name, value in {**main, **options}.items()
        if value is not None or name in ("headers", "resource_attributes", "service_namespace")
    }
    values, overridden = platform.completed(given)
    try:
        return OtlpConfig(**{"endpoint": None, "service_name": "", **values, **overridden})
    except OtlpConfigError as error:
        raise OtlpConfigError(f"{error}{platform.named(values.keys() - given.keys())}") from None


def resolve_config(
    endpoint: str | OtlpConfig | None,
    service_name: str,
    protocol: str | None,
    options: OtlpOptions,
) -> OtlpConfig:
    """``setup_otlp_export`` の引数を 1 つの設定にする。できている設定は、単独でだけ受け取る。"""
    if not isinstance(endpoint, OtlpConfig):
        return build_otlp_config(endpoint, service_name, protocol, **options)
    if not (service_name or options) and protocol in (None, endpoint.protocol):
        return endpoint
    raise OtlpConfigError("an OtlpConfig already has all options; pass it alone")


def platform_resource() -> dict[str, str]:
    """基盤が付けたリソース属性。"""
    return parse_resource_attributes(platform_environment().get(_ATTRIBUTES, ""))


class _Platform:
    """基盤の設定。``found`` は、項目ごとの環境変数の名前と値。"""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.found: dict[str, tuple[str, Any]] = {}
        attributes = parse_resource_attributes(environment.get(_ATTRIBUTES, ""))
        for option, attribute in _RESOURCE.items():
            if value := attributes.get(attribute, ""):
                self.found[option] = _ATTRIBUTES, value
        if name := environment.get("OTEL_SERVICE_NAME", "").strip():
            self.found["service_name"] = "OTEL_SERVICE_NAME", name
        for option, suffix in _SETTINGS.items():
            variable, value = setting(environment, suffix)
            if value:
                self.found[option] = variable, _parsed(option, value)
        self.headers_variable, headers = setting(environment, "HEADERS")
        self.headers = parse_resource_attributes(headers)
        self.attributes = attributes

    def completed(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """``given`` に基盤の値を足したものと、``given`` が替えた基盤の値。"""
        overridden: list[str] = []
        values = dict(given)
        for option, (variable, value) in self.found.items():
            if option == "certificate_file" and option not in given and not Path(value).is_file():
                overridden.append(f"{variable}={value!r} does not exist; TLS uses default roots")
            elif not _equal(option, values.setdefault(option, value), value):
                shown = f"{option}={_safe(given[option])!r}"
                overridden.append(f"{shown} overrides {variable}={_safe(value)!r}")
        overridden += self._merge_headers(values)
        extra = values.get("resource_attributes")
        for name, value in extra.items() if isinstance(extra, Mapping) else ():
            if self.attributes.get(name, value) != value:
                old = self.attributes[name]
                overridden.append(f"{name}={value!r} overrides {_ATTRIBUTES} {name}={old!r}")
        return values, {"overridden": tuple(overridden)}

    def _merge_headers(self, values: dict[str, Any]) -> list[str]:
        given = values.get("headers", {})
        if not (self.headers and isinstance(given, Mapping)):
            return []
        own = {str(name).lower(): value for name, value in given.items()}
        kept = {k: v for k, v in self.headers.items() if k.lower() not in own}
        values["headers"] = {**kept, **given}
        return [
            f"header {name!r} overrides {self.headers_variable}"
            for name, value in self.headers.items()
            if own.get(name.lower(), value) != value
        ]

    def named(self, options: Any) -> str:
        """誤りの値が、どの環境変数のものか。"""
        names = sorted(self.found[option][0] for option in options if option in self.found)
        return f" (from {', '.join(names)})" if names else ""


def _parsed(option: str, value: str) -> Any:
    if option == "timeout_seconds":
        with suppress(ValueError):
            return float(value)
    return value.lower() if option == "compression" else value


def _equal(option: str, given: Any, found: Any) -> bool:
    if option == "endpoint":
        with suppress(ValueError):
            urls = (signal_url(split_endpoint(url), "traces") for url in (given, found))
            return next(urls) == next(urls)
    return bool(given == found)


def _safe(value: Any) -> Any:
    """URL の中の鍵かもしれないところを除く。"""
    return re.sub("//[^/]*@|[?#].*", "//***@", value) if isinstance(value, str) else value
