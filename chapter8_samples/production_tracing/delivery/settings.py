"""8.1.4 トレーシングの設定値と状態(basic_setup.py の土台)。

値を確かめ、環境変数を書き、やり直すときは元に戻す。利用者が先に決めた環境変数は変えない。
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import mlflow
from pydantic import BaseModel, ConfigDict, Field, ValidationError

Backend = Literal["sqlite", "server", "databricks"]
Text = Annotated[str, Field(pattern=r"\S")]
ResourceValue = Annotated[str, Field(pattern=r"^[^,=]*[^,=\s][^,=]*$")]
_WRITTEN_BY_MLFLOW = ("MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI", "OTEL_RESOURCE_ATTRIBUTES")
Seconds = Annotated[float, Field(gt=0, le=threading.TIMEOUT_MAX)]


class TracingSetupError(RuntimeError):
    """トレーシングを設定できない(設定の誤り、または ``strict=True`` でサーバーに届かない)。"""


@dataclass(frozen=True)
class TracingStatus:
    """いまのトレーシングの状態。"""

    experiment_id: str
    """エクスペリメントの ID。サーバーに届くまでは空文字列。"""
    experiment_name: str
    tracking_uri: str
    """パスワードを隠したもの。"""
    backend: Backend
    export_profile: str
    applied: Mapping[str, str]
    """この設定が書いた環境変数。利用者が先に設定していたものは含まない。"""
    warnings: tuple[str, ...]
    ready: bool
    """``False`` はサーバーに届かず記録を止めている状態。届きしだい自動で始まる。"""
    backlog: int = 0
    """終わったが、まだ届いていないトレースの件数。"""
    dropped: int = 0
    """設定してから失ったトレースの件数(キューの満杯、送信の失敗など)。"""
    spooled: int = 0
    """``TraceSpool`` のディスクで送信を待つトレースの件数。"""


class TracingOptions(BaseModel):
    """``setup_production_tracing`` の引数(意味はそちらを参照)。"""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    experiment_name: Text
    service_name: Text
    tracking_uri: str | None
    enable_async: bool
    deployment_region: ResourceValue | None
    service_version: ResourceValue | None
    environment: ResourceValue
    export_profile: str
    sampling_ratio: Annotated[float, Field(ge=0, le=1)] | None
    strict: bool
    http_timeout_seconds: Annotated[int, Field(gt=0)]
    http_max_retries: Annotated[int, Field(ge=0)]
    probe_timeout_seconds: Seconds
    retry_seconds: Seconds
    span_processors: tuple[Callable[..., None], ...]

    def resource_attributes(self) -> dict[str, str]:
        """OpenTelemetry のリソース属性(OTLP で送るときに全スパンへ付く)。"""
        values = {
            "deployment.environment.name": self.environment,
            "service.version": self.service_version,
            "cloud.region": self.deployment_region,
        }
        return {key: value for key, value in values.items() if value}

    def differences(self, other: TracingOptions) -> str:
        """``other`` と値が違う引数の一覧(エラーの文面に使う)。"""
        changes = [
            f"{name}: {value!r} -> {getattr(other, name)!r}"
            for name, value in self
            if value != getattr(other, name)
        ]
        return hide_secrets(", ".join(changes))


def check_options(**options: Any) -> TracingOptions:
    """引数を確かめる。正しくないものをすべて、1 つの ``ValueError`` にする。"""
    try:
        return TracingOptions(**options)
    except ValidationError as error:
        problems = [
            f"{one['loc'][0]}={one['input']!r} must be valid: {one['msg']}"
            for one in error.errors()
        ]
    raise ValueError(hide_secrets("; ".join(problems)))


def hide_secrets(text: str) -> str:
    """URL の中の利用者名とパスワードを隠す(ログと例外の文面に出さないため)。

    >>> hide_secrets("http://admin:p@ss@mlflow:5000/health did not answer")
    'http://***@mlflow:5000/health did not answer'
    """
    return re.sub(r"(?<=://)[^\s/]+(?=@)", "***", text)


def backend_of(uri: str) -> Backend:
    """トラッキング URI の種類。

    Raises:
        TracingSetupError: 本番のトレースに使えない URI、または ``mlflow-tracing`` だけでの SQLite。
    """
    scheme = uri.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return "server"
    if scheme == "databricks":
        return "databricks"
    if scheme != "sqlite":
        raise TracingSetupError(
            f"tracking_uri={hide_secrets(uri)!r} is not supported for production tracing; "
            "use http(s)://, databricks or sqlite:///"
        )
    if not hasattr(mlflow, "MlflowClient"):
        raise TracingSetupError(
            f"tracking_uri={uri} needs the full package (pip install mlflow); with mlflow-tracing "
            "alone set MLFLOW_TRACKING_URI to an MLflow server or databricks"
        )
    return "sqlite"


class EnvironmentPatch:
    """環境変数を書き、後で元に戻す。利用者が先に決めた値は変えない。"""

    def __init__(self) -> None:
        self.applied: dict[str, str] = {}
        self.warnings: list[str] = []
        self._before = dict(os.environ)

    def set(self, values: Mapping[str, str]) -> None:
        """書き込む。利用者の値と違うときは、そちらを残して ``warnings`` に書く。"""
        for name, value in values.items():
            current = os.environ.get(name)
            if current is None:
                self._write(name, value)
            elif current != value:
                self._keep(name, _shown(name, current), _shown(name, value))

    def set_resource(self, service_name: str, attributes: Mapping[str, str]) -> None:
        """サービス名とリソース属性を書く。``OTEL_RESOURCE_ATTRIBUTES`` の利用者の値が優先する。"""
        items = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(",")
        pairs = [item.split("=", 1) for item in items if "=" in item]
        given = {key.strip(): value.strip() for key, value in pairs}
        users_name = given.get("service.name")
        if users_name is None:
            self.set({"OTEL_SERVICE_NAME": service_name})
        elif users_name != service_name:
            self._keep("service.name", users_name, service_name)
        merged = {**attributes, **given}
        if merged != given:
            text = ",".join(f"{key}={value}" for key, value in merged.items())
            self._write("OTEL_RESOURCE_ATTRIBUTES", text)

    def restore(self) -> None:
        """書く前の値に戻す。"""
        for name in (*self.applied, *_WRITTEN_BY_MLFLOW):
            if name in self._before:
                os.environ[name] = self._before[name]
            else:
                os.environ.pop(name, None)

    def _keep(self, name: str, given: str, wanted: str) -> None:
        self.warnings.append(f"{name}={given} from the environment is kept (wanted {wanted})")

    def _write(self, name: str, value: str) -> None:
        self.applied[name] = _shown(name, value)
        os.environ[name] = value


def _shown(name: str, value: str) -> str:
    """送信のヘッダーには鍵が入る。"""
    return "(hidden)" if name.endswith("_HEADERS") else hide_secrets(value)
