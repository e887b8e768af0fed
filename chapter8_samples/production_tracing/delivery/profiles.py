"""8.1.4 トレーシングの設定値(basic_setup.py が使う)。

MLflow の送信には、満杯になると黙って捨てる場所が 4 つある(スパンのキュー、送信タスクのキュー、
組み立て中のトレースの置き場、書き込みの速さ)。1 つでも既定値のままだと、そこで失われる。

Databricks でも同じ変数が効く。再試行は ``MLFLOW_ASYNC_TRACE_LOGGING_RETRY_TIMEOUT`` が決める。
"""

from __future__ import annotations

import os
import re
import threading
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote, urlsplit

import mlflow

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

Backend = Literal["sqlite", "server", "databricks"]
ExportProfile = Literal["default", "burst", "otlp"]
SpanFilter = Callable[["LiveSpan"], None]

# burst は 10,000 トレースのバーストを 1 件も失わなかった値(満杯でもメモリーは数十 MB)
EXPORT_PROFILES: Mapping[ExportProfile, Mapping[str, str]] = MappingProxyType(
    {
        "default": {},
        "burst": {
            "MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE": "16384",  # スパンのキューも兼ねる
            "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "1000",
            "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE": "20000",
            "MLFLOW_TRACE_BUFFER_MAX_SIZE": "20000",
        },
        "otlp": {
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            "OTEL_BSP_MAX_QUEUE_SIZE": "50000",
            "OTEL_BSP_SCHEDULE_DELAY": "1000",
            "MLFLOW_TRACE_BUFFER_MAX_SIZE": "50000",
        },
    }
)
"""送信の設定(環境変数)。``default`` は MLflow のまま、``burst`` はバーストを失わない設定。

``otlp`` は MLflow サーバーの ``/v1/traces`` へ直接送る。書き込みが 9-16 倍速い代わりに、
トレースのメタデータ・``client_request_id``・明示したプレビューは送られない
(``metadata_tagging.add_trace_metadata`` はルートスパンの属性に書いて補う)。
"""


class TracingSetupError(RuntimeError):
    """トレーシングを設定できない(設定の誤り、または ``strict=True`` でサーバーに届かない)。"""


@dataclass(frozen=True)
class TracingStatus:
    """いまのトレーシングの状態。"""

    experiment_id: str
    """エクスペリメントの ID。サーバーに届くまでは空文字列。"""
    experiment_name: str
    tracking_uri: str
    backend: Backend
    export_profile: ExportProfile
    applied: Mapping[str, str]
    """この設定が書いた環境変数。利用者が先に設定していたものは含まない。"""
    warnings: tuple[str, ...]
    ready: bool
    """``False`` はサーバーに届かず記録を止めている状態。届きしだい自動で始まる。"""


@dataclass(frozen=True, kw_only=True)
class TracingOptions:
    """``setup_production_tracing`` の引数(意味はそちらを参照)。作る時点で値を確かめる。"""

    experiment_name: str
    service_name: str
    tracking_uri: str | None
    enable_async: bool
    deployment_region: str | None
    service_version: str | None
    environment: str
    export_profile: ExportProfile
    sampling_ratio: float | None
    strict: bool
    http_timeout_seconds: int
    http_max_retries: int
    probe_timeout_seconds: float
    retry_seconds: float
    span_processors: tuple[SpanFilter, ...]

    def __post_init__(self) -> None:
        self._check("experiment_name", _is_text, "a non-empty string")
        self._check("service_name", _is_text, "a non-empty string")
        self._check("tracking_uri", lambda uri: isinstance(uri, str | None), "a string or None")
        profiles = list(EXPORT_PROFILES)
        self._check("export_profile", lambda name: name in profiles, f"one of {sorted(profiles)}")
        self._check("sampling_ratio", _is_ratio, "within [0, 1]")
        self._check("http_timeout_seconds", lambda n: _is_count(n) and n > 0, "a whole number > 0")
        self._check("http_max_retries", _is_count, "a whole number >= 0")
        for name in ("probe_timeout_seconds", "retry_seconds"):
            self._check(name, _is_seconds, "> 0 and finite")
        for processor in self.span_processors:
            _require(callable(processor), f"span_processors: {processor!r} must be a function")
        for key, value in self.resource_attributes().items():
            _require(
                _is_text(value) and not set(value) & set(",="),
                f"{key}={value!r} must be a string without ',' or '='",
            )

    def _check(self, name: str, valid: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        _require(valid(value), f"{name}={value!r} must be {expected}")

    def differences(self, other: TracingOptions) -> str:
        """``other`` と値が違う引数の一覧(エラーの文面に使う)。"""
        pairs = [
            (item.name, getattr(self, item.name), getattr(other, item.name))
            for item in fields(self)
        ]
        return hide_secrets(", ".join(f"{name}: {a!r} -> {b!r}" for name, a, b in pairs if a != b))

    def resource_attributes(self) -> dict[str, str]:
        """OpenTelemetry のリソース属性(OTLP で送るときに全スパンへ付く)。"""
        values = {
            "deployment.environment.name": self.environment,
            "service.version": self.service_version,
            "cloud.region": self.deployment_region,
        }
        return {key: value for key, value in values.items() if value}


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_ratio(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and 0.0 <= value <= 1.0)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _is_seconds(value: object) -> bool:
    return isinstance(value, int | float) and 0 < value <= threading.TIMEOUT_MAX


def hide_secrets(text: str) -> str:
    """URL の中の利用者名とパスワードを隠す(ログと例外の文面に出さないため)。

    >>> hide_secrets("http://admin:pass@mlflow:5000/health did not answer")
    'http://***@mlflow:5000/health did not answer'
    """
    return re.sub(r"(?<=://)[^\s/@]+(?=@)", "***", text)


def _hide_value(name: str, value: str) -> str:
    """環境変数の値を、見せてよい形にする。送信のヘッダーには鍵が入る。"""
    return "(hidden)" if name.endswith("_HEADERS") else hide_secrets(value)


def backend_of(uri: str) -> Backend:
    """トラッキング URI の種類。

    Raises:
        TracingSetupError: 本番のトレースに使えない URI、または ``mlflow-tracing`` だけでの SQLite。
    """
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        return "server"
    if uri == "databricks" or scheme == "databricks":
        return "databricks"
    if scheme != "sqlite":
        raise TracingSetupError(
            f"tracking_uri={hide_secrets(uri)!r} is not supported for production tracing; "
            "use http(s)://, databricks or sqlite:///"
        )
    if not hasattr(mlflow, "MlflowClient"):
        raise TracingSetupError(_NEEDS_MLFLOW.format(uri))
    return "sqlite"


def default_tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``、なければ MLflow の既定(カレントディレクトリーの SQLite)。

    Raises:
        TracingSetupError: ``mlflow-tracing`` だけの環境で、接続先が決まっていない。
    """
    if not mlflow.is_tracking_uri_set() and not hasattr(mlflow, "MlflowClient"):
        raise TracingSetupError(_NEEDS_MLFLOW.format("(default: SQLite)"))
    return mlflow.get_tracking_uri()


_NEEDS_MLFLOW = (
    "tracking_uri={} needs the full package (pip install mlflow); with mlflow-tracing alone "
    "set MLFLOW_TRACKING_URI to an MLflow server or databricks"
)


def export_environment(
    profile: ExportProfile, backend: Backend, *, http_timeout_seconds: int, http_max_retries: int
) -> dict[str, str]:
    """送信に使う環境変数。MLflow が最初のスパンで読むので、その前に書く。"""
    # random.seed() を呼ぶアプリでも、トレース ID が重ならないようにする
    values = {"MLFLOW_TRACE_USE_ISOLATED_RANDOM_ID_GENERATOR": "true", **EXPORT_PROFILES[profile]}
    if profile == "burst":
        # SQLite は書き手が 1 人のほうが衝突の再試行がなく、失わない
        values["MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS"] = "1" if backend == "sqlite" else "4"
    if backend == "server":
        values["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(http_timeout_seconds)
        values["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = str(http_max_retries)
        values["MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"] = "1"
    if backend == "databricks":
        values["MLFLOW_ASYNC_TRACE_LOGGING_RETRY_TIMEOUT"] = "30"
    return values


def otlp_environment(tracking_uri: str, backend: Backend, experiment_id: str) -> dict[str, str]:
    """``otlp`` で送る先。

    Raises:
        TracingSetupError: MLflow サーバー以外(``/v1/traces`` がない)。
    """
    if backend != "server":
        raise TracingSetupError(
            "export_profile='otlp' needs an MLflow server (http://...), not "
            f"{hide_secrets(tracking_uri)!r}; "
            "use export_profile='burst'"
        )
    headers = {"x-mlflow-experiment-id": experiment_id, **_authorization()}
    return {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{tracking_uri.rstrip('/')}/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": ",".join(
            f"{name}={quote(value, safe='')}" for name, value in headers.items()
        ),
    }


def _authorization() -> dict[str, str]:
    """MLflow と同じ変数の認証。OTLP の送信は、MLflow の HTTP クライアントを通らない。"""
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        return {"authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}
    return {"authorization": f"Bearer {token}"} if token else {}


class EnvironmentPatch:
    """環境変数を書き、後で元に戻す。利用者が先に決めた値は変えない。"""

    def __init__(self, *remember: str) -> None:
        """``remember`` は、MLflow 自身が書き換えるので覚えておく変数。"""
        self.applied: dict[str, str] = {}
        self.warnings: list[str] = []
        self._previous = {name: os.environ.get(name) for name in remember}

    def set(self, values: Mapping[str, str]) -> None:
        """書き込む。利用者の値と違うときは、そちらを残して ``warnings`` に書く。"""
        for name, value in values.items():
            current = os.environ.get(name)
            if current is None:
                self._write(name, value)
            elif current != value:
                given, wanted = _hide_value(name, current), _hide_value(name, value)
                kept = f"{name}={given} from the environment is kept (wanted {wanted})"
                self.warnings.append(kept)

    def set_service_name(self, name: str) -> None:
        """``OTEL_SERVICE_NAME`` は強いので、利用者がリソース属性で決めた名前があれば書かない。"""
        given = _resource_in_environment().get("service.name")
        if given is None:
            self.set({"OTEL_SERVICE_NAME": name})
        elif given != name:
            kept = f"service.name={given} from OTEL_RESOURCE_ATTRIBUTES is kept (wanted {name})"
            self.warnings.append(kept)

    def add_resource(self, attributes: Mapping[str, str]) -> None:
        """``OTEL_RESOURCE_ATTRIBUTES`` に足す(同じ名前は利用者の値が優先)。"""
        pairs = _resource_in_environment()
        merged = {**attributes, **pairs}
        if merged != pairs:
            text = ",".join(f"{key}={value}" for key, value in merged.items())
            self._write("OTEL_RESOURCE_ATTRIBUTES", text)

    def restore(self) -> None:
        """書く前の値に戻す。"""
        for name, value in self._previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    def _write(self, name: str, value: str) -> None:
        self._previous.setdefault(name, os.environ.get(name))
        self.applied[name] = _hide_value(name, value)
        os.environ[name] = value


def _resource_in_environment() -> dict[str, str]:
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    pairs = (item.split("=", 1) for item in given.split(",") if "=" in item)
    return {key.strip(): value.strip() for key, value in pairs}
