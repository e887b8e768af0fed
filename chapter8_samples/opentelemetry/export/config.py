"""8.5.3 OTLP の設定値と環境変数(リスト8.14, 表8.16)。

エンドポイントの書き間違いは、MLflow では「トレースが黙って消える」形で現れる。
送り始める前に値を検査し、トレース専用の環境変数だけに直す。

Databricks でもこの環境変数は同じ。トレースは Databricks にも残る(``mode="dual"``)。
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast
from urllib.parse import SplitResult, quote, unquote, urlsplit

if TYPE_CHECKING:
    from typing_extensions import Unpack

Protocol = Literal["grpc", "http/protobuf"]
Mode = Literal["dual", "otlp_only"]
Compression = Literal["gzip", "none"]

PROTOCOLS, TRACES_PATH = ("grpc", "http/protobuf"), "/v1/traces"
# HTTP ヘッダー名に使える文字(RFC 9110 の token)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# gRPC はもっと狭い。-bin で終わる名前は、値がバイト列でなければならない
_GRPC_NAME = re.compile(r"(?!.*-bin$)[._0-9a-z-]+", re.IGNORECASE)
# 設定のたびに、値を入れるか消すかを決める環境変数(前の設定の鍵などを残さない)
OWNED_ENV = (
    "MLFLOW_ENABLE_DUAL_EXPORT",
    "MLFLOW_ENABLE_OTEL_GENAI_SEMCONV",
    "MLFLOW_ENABLE_OTLP_EXPORTER",
    "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT",
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_INSECURE",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_SERVICE_NAME",
)


class OtlpError(Exception):
    """8.5 の例外の親。"""


class OtlpConfigError(OtlpError, ValueError):
    """設定値の誤り。文面に、誤った値と直し方がある。"""


class OtlpSetupError(OtlpError, RuntimeError):
    """設定値は正しいが、この環境では OTLP の送信を始められない。"""


@dataclass(frozen=True, kw_only=True)
class OtlpConfig:
    """検査済みの OTLP 設定。誤った値では作れない(``dataclasses.replace`` でも同じ)。"""

    endpoint: str
    """トレースの送り先。HTTP なら ``/v1/traces`` まで、gRPC ならパスなし。"""
    service_name: str
    protocol: Protocol = "grpc"
    mode: Mode = "dual"
    """``dual`` は MLflow と OTLP の両方、``otlp_only`` は OTLP だけに送る。"""
    service_version: str | None = None
    deployment_environment: str | None = None
    service_namespace: str | None = "llm-apps"
    resource_attributes: Mapping[str, str] = field(default_factory=dict[str, str])
    headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """認証などのヘッダー。値は ``repr`` にもログにも出さない。"""
    compression: Compression = "gzip"
    timeout_seconds: float = 10.0
    """1 回の送信を、再送も含めてあきらめるまでの秒数。"""
    certificate_file: str | None = None
    genai_semconv: bool = True
    """GenAI セマンティック規約の属性名に訳して送る(MLflow 側の記録は変わらない)。"""

    def __post_init__(self) -> None:
        _check_choices(self.protocol, self.mode, self.compression)
        _check_values(self)
        object.__setattr__(self, "endpoint", _normalized_endpoint(self.endpoint, self.protocol))

    def resource(self) -> dict[str, str]:
        """リソース属性。``service.name`` は含まない。"""
        named = {
            "service.version": self.service_version,
            "service.namespace": self.service_namespace,
            "deployment.environment.name": self.deployment_environment,
        }
        return {k: v for k, v in named.items() if v} | dict(self.resource_attributes)

    def to_env(self, inherited: str = "") -> dict[str, str]:
        """設定する環境変数。

        Args:
            inherited: 基盤が付けた ``OTEL_RESOURCE_ATTRIBUTES``。残して、この設定を重ねる。

        ``OTEL_EXPORTER_OTLP_ENDPOINT`` は使わない。MLflow がそこへメトリクスも送り始め、
        そのラベルにユーザーやセッションの ID が入って、系列が際限なく増えるため。
        """
        prefix, resource = "OTEL_EXPORTER_OTLP_TRACES_", parse_resource_attributes(inherited)
        values = {
            "OTEL_SERVICE_NAME": self.service_name,
            "OTEL_RESOURCE_ATTRIBUTES": _encode({**resource, **self.resource()}),
            f"{prefix}ENDPOINT": self.endpoint,
            f"{prefix}PROTOCOL": self.protocol,
            f"{prefix}HEADERS": _encode(self.headers),
            f"{prefix}TIMEOUT": f"{self.timeout_seconds:g}",
            f"{prefix}COMPRESSION": "gzip" if self.compression == "gzip" else "",
            f"{prefix}CERTIFICATE": self.certificate_file or "",
            f"{prefix}INSECURE": "true" if self.endpoint.startswith("http://") else "",
            "MLFLOW_ENABLE_OTLP_EXPORTER": "true",
            "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT": str(self.mode == "dual").lower(),
            "MLFLOW_ENABLE_OTEL_GENAI_SEMCONV": str(self.genai_semconv).lower(),
        }
        return {name: value for name, value in sorted(values.items()) if value}


class OtlpTransportOptions(TypedDict, total=False):
    """``OtlpOptions`` のうち、サービスの版と環境名のほかの項目。"""

    mode: Mode
    service_namespace: str | None
    resource_attributes: Mapping[str, str]
    headers: Mapping[str, str]
    compression: Compression
    timeout_seconds: float
    certificate_file: str | None
    genai_semconv: bool


class OtlpOptions(OtlpTransportOptions, total=False):
    """``build_otlp_config`` に名前で渡せる項目。意味は ``OtlpConfig`` と同じ。"""

    service_version: str | None
    deployment_environment: str | None


@dataclass(frozen=True)
class OtlpStatus:
    """いまの OTLP 送信の状態。鍵やヘッダーは含まない。"""

    mode: str
    """``dual`` ``otlp_only`` ``off`` のどれか。"""
    endpoint: str | None = None
    protocol: str | None = None
    service_name: str | None = None
    processors: tuple[str, ...] = ()
    """MLflow のプロバイダーに付いているプロセッサーのクラス名(包まれたものも含む)。"""
    genai_semconv: bool = False
    warnings: tuple[str, ...] = ()
    """放っておくとトレースやメトリクスが狂うこと。なければ空。"""


def parse_resource_attributes(text: str) -> dict[str, str]:
    """``OTEL_RESOURCE_ATTRIBUTES`` を読む。

    壊れた項目だけを飛ばす(MLflow は 1 つでも壊れていると、全部を捨てる)。

    >>> parse_resource_attributes("team=search,broken,")
    {'team': 'search'}
    """
    pairs = (item.partition("=") for item in text.split(","))
    return {k.strip(): unquote(v.strip()) for k, found, v in pairs if found and k.strip()}


def write_env(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """環境変数を書き、None のものは消す。戻すための元の値を返す。"""
    saved = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    return saved


def _encode(pairs: Mapping[str, str]) -> str:
    """``k=v,k=v`` にする。区切りの文字と日本語はパーセント符号化する。"""
    return ",".join(f"{name}={quote(value, safe='')}" for name, value in pairs.items())


def build_otlp_config(
    endpoint: str, service_name: str, protocol: str = "grpc", **options: Unpack[OtlpOptions]
) -> OtlpConfig:
    """値を検査して ``OtlpConfig`` を作る。

    Args:
        endpoint: ``http://HOST:4317`` (gRPC) や ``http://HOST:4318`` (HTTP)。HTTP では
            ``/v1/traces`` がなければ足し、gRPC ではパスを取り除く。
        service_name: バックエンドで見えるサービス名。
        protocol: ``"grpc"`` か ``"http/protobuf"``。
        **options: ``OtlpConfig`` の残りの項目。

    Raises:
        OtlpConfigError: 値が誤っている。
    """
    known: Any = protocol
    try:
        return OtlpConfig(endpoint=endpoint, service_name=service_name, protocol=known, **options)
    except TypeError as error:
        names = ", ".join(OtlpConfig.__dataclass_fields__)
        raise OtlpConfigError(f"{error}; options are: {names}") from error


def resolve_config(
    endpoint: str | OtlpConfig, service_name: str, protocol: str, options: OtlpOptions
) -> OtlpConfig:
    """``setup_otlp_export`` の引数を 1 つの設定にする。できている設定は、単独でだけ受け取る。"""
    if not isinstance(endpoint, OtlpConfig):
        return build_otlp_config(endpoint, service_name, protocol, **options)
    if not (service_name or options) and protocol in ("grpc", endpoint.protocol):
        return endpoint
    raise OtlpConfigError("an OtlpConfig already has all options; pass it alone")


def _normalized_endpoint(endpoint: str, protocol: str) -> str:
    parts = _split(endpoint)
    if protocol == "grpc":
        return f"{parts.scheme}://{parts.netloc}"
    path = re.sub("/{2,}", "/", parts.path).rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}" + (
        "" if path.endswith(TRACES_PATH) else TRACES_PATH
    )


def _split(endpoint: Any) -> SplitResult:
    if not isinstance(endpoint, str) or not endpoint.strip():
        raise OtlpConfigError(f"endpoint {endpoint!r} is not a URL; write http://HOST:PORT")
    if any(mark in endpoint for mark in "@?#"):  # 鍵かもしれないので、値は文面に出さない
        raise OtlpConfigError("endpoint has a user name or a query; pass credentials as headers")
    if "://" not in endpoint:
        raise OtlpConfigError(
            f"endpoint {endpoint!r} has no scheme; write http://{endpoint} (plain) "
            f"or https://{endpoint} (TLS)"
        )
    try:
        parts = urlsplit(endpoint)
        _ = parts.port
    except ValueError as error:
        raise OtlpConfigError(f"endpoint {endpoint!r}: {error}") from error
    if parts.scheme not in ("http", "https") or not _is_host(parts.hostname or ""):
        raise OtlpConfigError(f"endpoint {endpoint!r} is not an http(s) URL with a host")
    return parts


def _is_host(name: str) -> bool:
    """ホスト名として引けるか。点の間が空、64 文字以上、空白入りのものは、送るたびに例外になる。"""
    parts = name.removesuffix(".").split(".")
    return " " not in name and all(0 < len(part) < 64 for part in parts)


def _check_choices(protocol: str, mode: str, compression: str) -> None:
    if protocol not in PROTOCOLS:
        hint = "; MLflow cannot send http/json" if protocol == "http/json" else ""
        raise OtlpConfigError(f"protocol {protocol!r} is not one of {PROTOCOLS}{hint}")
    if mode not in ("dual", "otlp_only"):
        raise OtlpConfigError(f"mode {mode!r} is not 'dual' or 'otlp_only'")
    if compression not in ("gzip", "none"):
        raise OtlpConfigError(f"compression {compression!r} is not 'gzip' or 'none'")


def _check_values(config: OtlpConfig) -> None:
    if not _is_text(config.service_name):
        raise OtlpConfigError("service_name is empty; name the service as dashboards show it")
    for option in ("service_version", "deployment_environment", "service_namespace"):
        if not isinstance(text := getattr(config, option), str | None):
            raise OtlpConfigError(f"{option} {text!r} is {type(text).__name__}, not str")
    seconds: Any = config.timeout_seconds
    if not isinstance(seconds, (int, float)) or not 0 < seconds < float("inf"):
        raise OtlpConfigError(f"timeout_seconds {seconds!r} must be a finite number above 0")
    if config.certificate_file and not Path(config.certificate_file).is_file():
        raise OtlpConfigError(f"certificate_file {config.certificate_file!r} does not exist")
    for name, value in _pairs(config.headers, "headers"):
        if not (_is_text(name) and _TOKEN.fullmatch(name)):
            raise OtlpConfigError(f"header name {name!r} has characters HTTP does not allow")
        if config.protocol == "grpc" and not _GRPC_NAME.fullmatch(name):
            raise OtlpConfigError(
                f"header name {name!r} cannot be sent over grpc (letters, digits, '_', '-' and '.' "
                "only, no -bin at the end); rename it or use http/protobuf"
            )
        if not (_is_text(value) and value.isascii() and value.isprintable()):
            raise OtlpConfigError(f"the value of header {name!r} is not printable ASCII, or empty")
    for name, value in _pairs(config.resource_attributes, "resource_attributes"):
        if not _is_text(name) or re.search(r"[=,\s]", name):
            raise OtlpConfigError(f"resource attribute name {name!r} has '=', ',' or a space")
        if not isinstance(value, str):
            raise OtlpConfigError(f"resource attribute {name!r} is {value!r}, not str")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _pairs(values: Any, option: str) -> list[tuple[Any, Any]]:
    if not isinstance(values, Mapping):
        raise OtlpConfigError(f"{option} is {type(values).__name__}, not a mapping of str to str")
    return list(cast("Mapping[Any, Any]", values).items())
