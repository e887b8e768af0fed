"""8.5.3 OTLP の設定値(リスト8.14, 表8.16)。

エンドポイントの書き間違いは、MLflow では「トレースが黙って消える」形で現れる。送り始める前に値を
検査し、トレース専用の環境変数だけに直す。

Databricks でもこの環境変数は同じ。トレースは Databricks にも残る(``mode="dual"``)。
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict, cast, get_args
from urllib.parse import SplitResult, quote, unquote

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from ..endpoint import signal_url, split_endpoint

Protocol = Literal["grpc", "http/protobuf"]
Mode = Literal["dual", "otlp_only"]
Compression = Literal["gzip", "none", "deflate"]

PROTOCOLS = get_args(Protocol)
PREFIX = "OTEL_EXPORTER_OTLP_"
# HTTP ヘッダー名に使える文字(RFC 9110 の token)
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
# gRPC はもっと狭い。-bin で終わる名前は、値がバイト列でなければならない
_GRPC_NAME = re.compile(r"(?!.*-bin$)[._0-9a-z-]+", re.IGNORECASE)


class OtlpConfigError(ValueError):
    """設定値の誤り。文面に、誤った値と直し方がある。"""


class OtlpSetupError(RuntimeError):
    """設定値は正しいが、この環境では OTLP の送信を始められない。"""


# ---- 環境変数の k=v,k=v ----


def parse_pairs(text: str) -> dict[str, str]:
    """``OTEL_RESOURCE_ATTRIBUTES`` やヘッダーの ``k=v,k=v`` を読む。

    壊れた項目だけを飛ばす(MLflow は 1 つでも壊れていると、全部を捨てる)。

    >>> parse_pairs("team=search,broken,")
    {'team': 'search'}
    """
    pairs = (item.partition("=") for item in text.split(","))
    return {k.strip(): unquote(v.strip()) for k, found, v in pairs if found and k.strip()}


def format_pairs(pairs: Mapping[str, str]) -> str:
    """``k=v,k=v`` にする。区切りの文字と日本語はパーセント符号化する。"""
    return ",".join(f"{name}={quote(value, safe='')}" for name, value in pairs.items())


# ---- 値の検査 ----


def _named(service_name: str) -> str:
    if not service_name.strip():
        raise ValueError("service_name is empty; name the service as dashboards show it")
    return service_name


def _existing(path: str | None) -> str | None:
    if path and not Path(path).is_file():
        raise ValueError(f"certificate_file {path!r} does not exist")
    return path


def _headers(given: Any) -> Any:
    for name, value in _items(given, "headers"):
        if not (isinstance(name, str) and _TOKEN.fullmatch(name)):
            raise ValueError(f"header name {name!r} has characters HTTP does not allow")
        text = value if isinstance(value, str) else ""
        if not (text.strip() and text.isascii() and text.isprintable()):
            raise ValueError(f"the value of header {name!r} is not printable ASCII, or empty")
    return given


def _resource(given: Any) -> Any:
    for name, value in _items(given, "resource_attributes"):
        if not isinstance(name, str) or not name or re.search(r"[=,\s]", name):
            raise ValueError(f"resource attribute name {name!r} has '=', ',' or a space")
        if not isinstance(value, str):
            raise ValueError(f"resource attribute {name!r} is {value!r}, not str")
    return given


def _items(given: Any, option: str) -> list[tuple[Any, Any]]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{option} is {type(given).__name__}, not a mapping of str to str")
    return list(cast("Mapping[Any, Any]", given).items())


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class _Fields:
    endpoint: Any
    """トレースの送り先。HTTP なら ``/v1/traces`` まで、gRPC ならパスなし。"""
    service_name: Annotated[str, AfterValidator(_named)]
    protocol: Protocol = "grpc"
    mode: Mode = "dual"
    """``dual`` は MLflow と OTLP の両方、``otlp_only`` は OTLP だけに送る。"""
    service_version: str | None = None
    deployment_environment: str | None = None
    service_namespace: str | None = "llm-apps"
    resource_attributes: Annotated[Mapping[str, str], BeforeValidator(_resource)] = field(
        default_factory=dict[str, str]
    )
    headers: Annotated[Mapping[str, str], BeforeValidator(_headers)] = field(
        default_factory=dict[str, str], repr=False
    )
    """認証などのヘッダー。値は ``repr`` にもログにも出さない。"""
    compression: Compression = "gzip"
    timeout_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """1 回の送信を、再送も含めてあきらめるまでの秒数。"""
    certificate_file: Annotated[str | None, AfterValidator(_existing)] = None
    genai_semconv: bool = True
    """GenAI セマンティック規約の属性名に訳して送る(MLflow 側の記録は変わらない)。"""
    overridden: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """基盤の環境変数のうち、引数が替えたもの(``OtlpStatus.warnings`` に出る)。"""


class OtlpConfig(_Fields):
    """検査済みの OTLP 設定。誤った値では作れない(``dataclasses.replace`` でも同じ)。"""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise OtlpConfigError(_told(error)) from None
        self._check_together()

    def _check_together(self) -> None:
        try:
            parts = split_endpoint(self.endpoint)
        except ValueError as error:
            raise OtlpConfigError(str(error)) from None
        if self.protocol == "grpc":
            self._check_grpc(parts)
            url = f"{parts.scheme}://{parts.netloc}"
        else:
            url = signal_url(parts, "traces")
        object.__setattr__(self, "endpoint", url)  # frozen

    def _check_grpc(self, parts: SplitResult) -> None:
        if parts.scheme == "http" and parts.port is None:
            url = f"http://{parts.netloc}"
            raise OtlpConfigError(f"endpoint {url!r} has no port; grpc needs one: {url}:4317")
        if self.compression == "deflate":
            raise OtlpConfigError("compression 'deflate' is not 'gzip' or 'none', as grpc needs")
        for name in self.headers:
            if not _GRPC_NAME.fullmatch(name):
                raise OtlpConfigError(
                    f"header name {name!r} cannot be sent over grpc (letters, digits, '_', '-' "
                    "and '.' only, no -bin at the end); rename it or use http/protobuf"
                )

    def resource(self) -> dict[str, str]:
        """リソース属性。``service.name`` は含まない。"""
        named = {
            "service.version": self.service_version,
            "service.namespace": self.service_namespace,
            "deployment.environment.name": self.deployment_environment,
        }
        return {k: v for k, v in named.items() if v} | dict(self.resource_attributes)

    def to_env(self, inherited: str = "") -> dict[str, str | None]:
        """設定する環境変数。空の値は基盤の値のまま、None は消す。

        Args:
            inherited: 基盤が付けた ``OTEL_RESOURCE_ATTRIBUTES``。残して、この設定を重ねる。

        ``OTEL_EXPORTER_OTLP_ENDPOINT`` は使わない。MLflow がそこへメトリクスも送り始め、
        そのラベルにユーザーやセッションの ID が入って、系列が際限なく増えるため。
        """
        # gRPC のエクスポーターは、none を受け付けない
        is_plain_grpc = self.protocol == "grpc" and self.compression == "none"
        resource = parse_pairs(inherited) | self.resource()
        traces: dict[str, str | None] = {
            "ENDPOINT": self.endpoint,
            "PROTOCOL": self.protocol,
            "HEADERS": format_pairs(self.headers),
            "TIMEOUT": f"{self.timeout_seconds:g}",
            "COMPRESSION": None if is_plain_grpc else self.compression,
            "CERTIFICATE": self.certificate_file or "",
            "INSECURE": "true" if self.endpoint.startswith("http://") else "",
        }
        return {
            **{f"{PREFIX}TRACES_{name}": value for name, value in traces.items()},
            "OTEL_SERVICE_NAME": self.service_name,
            "OTEL_RESOURCE_ATTRIBUTES": format_pairs(resource),
            "MLFLOW_ENABLE_OTLP_EXPORTER": "true",
            "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT": str(self.mode == "dual").lower(),
            "MLFLOW_ENABLE_OTEL_GENAI_SEMCONV": str(self.genai_semconv).lower(),
        }


def _told(error: ValidationError) -> str:
    """すべての誤りを 1 行にする。鍵が入りうるもの(ヘッダー、知らない項目)の値は、出さない。"""
    told: list[str] = []
    for one in error.errors(include_url=False):
        name = str(one["loc"][0]) if one["loc"] else ""
        if one["type"] == "value_error":
            told.append(one["msg"].removeprefix("Value error, "))
        elif name in _Fields.__dataclass_fields__:
            told.append(f"{name} {one['input']!r} is wrong: {one['msg']}")
        else:
            options = ", ".join(_Fields.__dataclass_fields__)
            told.append(f"{name}: {one['msg']}; options are: {options}")
    return "; ".join(told)


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


class OtlpStatus(NamedTuple):
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
    """放っておくとトレースやメトリクスが狂うことと、引数が替えた基盤の設定。なければ空。"""
