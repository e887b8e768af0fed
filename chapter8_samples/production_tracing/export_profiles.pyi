"""8.1.4 トレーシングの設定値(basic_setup.py が使う)。"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal
Backend = Literal['sqlite', 'server', 'databricks']
ExportProfile = Literal['default', 'burst', 'otlp']
SpanFilter = Callable[['LiveSpan'], None]
EXPORT_PROFILES: Mapping[ExportProfile, Mapping[str, str]] = MappingProxyType({'default': {}, 'burst': {'MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE': '16384', 'MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS': '1000', 'MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE': '20000', 'MLFLOW_TRACE_BUFFER_MAX_SIZE': '20000'}, 'otlp': {'OTEL_EXPORTER_OTLP_TRACES_PROTOCOL': 'http/protobuf', 'OTEL_BSP_MAX_QUEUE_SIZE': '50000', 'OTEL_BSP_SCHEDULE_DELAY': '1000', 'MLFLOW_TRACE_BUFFER_MAX_SIZE': '50000'}})

class TracingSetupError(RuntimeError):
    """トレーシングを設定できない(設定の誤り、または ``strict=True`` でサーバーに届かない)。"""

@dataclass(frozen=True)
class TracingStatus:
    """いまのトレーシングの状態。"""
    experiment_id: str
    'エクスペリメントの ID。サーバーに届くまでは空文字列。'
    experiment_name: str
    tracking_uri: str
    backend: Backend
    export_profile: ExportProfile
    applied: Mapping[str, str]
    'この設定が書いた環境変数。利用者が先に設定していたものは含まない。'
    warnings: tuple[str, ...]
    ready: bool
    '``False`` はサーバーに届かず記録を止めている状態。届きしだい自動で始まる。'

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
        ...

    def _check(self, name: str, valid: Callable[[Any], bool], expected: str) -> None:
        ...

    def differences(self, other: TracingOptions) -> str:
        """``other`` と値が違う引数の一覧(エラーの文面に使う)。"""

    def resource_attributes(self) -> dict[str, str]:
        """OpenTelemetry のリソース属性(OTLP で送るときに全スパンへ付く)。"""

def hide_secrets(text: str) -> str:
    """URL の中の利用者名とパスワードを隠す(ログと例外の文面に出さないため)。

    >>> hide_secrets("http://admin:pass@mlflow:5000/health did not answer")
    'http://***@mlflow:5000/health did not answer'
    """

def backend_of(uri: str) -> Backend:
    """トラッキング URI の種類。

    Raises:
        TracingSetupError: 本番のトレースに使えない URI、または ``mlflow-tracing`` だけでの SQLite。
    """

def default_tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``、なければ MLflow の既定(カレントディレクトリーの SQLite)。

    Raises:
        TracingSetupError: ``mlflow-tracing`` だけの環境で、接続先が決まっていない。
    """

def export_environment(profile: ExportProfile, backend: Backend, *, http_timeout_seconds: int, http_max_retries: int) -> dict[str, str]:
    """送信に使う環境変数。MLflow が最初のスパンで読むので、その前に書く。"""

def otlp_environment(tracking_uri: str, backend: Backend, experiment_id: str) -> dict[str, str]:
    """``otlp`` で送る先。

    Raises:
        TracingSetupError: MLflow サーバー以外(``/v1/traces`` がない)。
    """

class EnvironmentPatch:
    """環境変数を書き、後で元に戻す。利用者が先に決めた値は変えない。"""

    def __init__(self, *remember: str) -> None:
        """``remember`` は、MLflow 自身が書き換えるので覚えておく変数。"""
        self.applied: dict[str, str] = {}
        self.warnings: list[str] = []
        self._previous = {name: os.environ.get(name) for name in remember}

    def set(self, values: Mapping[str, str]) -> None:
        """書き込む。利用者の値と違うときは、そちらを残して ``warnings`` に書く。"""

    def set_service_name(self, name: str) -> None:
        """``OTEL_SERVICE_NAME`` は強いので、利用者がリソース属性で決めた名前があれば書かない。"""

    def add_resource(self, attributes: Mapping[str, str]) -> None:
        """``OTEL_RESOURCE_ATTRIBUTES`` に足す(同じ名前は利用者の値が優先)。"""

    def restore(self) -> None:
        """書く前の値に戻す。"""

    def _write(self, name: str, value: str) -> None:
        ...

def main() -> None:
    """送信の設定の一覧を見る。"""
