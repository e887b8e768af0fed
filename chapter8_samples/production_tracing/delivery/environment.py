"""8.1.4 トレーシングの設定を、環境変数に書いて、後で元に戻す(basic_setup.py の土台)。

MLflow も OpenTelemetry も、プロバイダーを作るときに環境変数を読む。利用者が先に決めた値は変えない。
"""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from mlflow.utils.credentials import get_default_host_creds

from .settings import Backend, TracingOptions, TracingSetupError, hide_secrets

_WORKERS = "MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS"
_RESOURCE = "OTEL_RESOURCE_ATTRIBUTES"
# 止まっているサーバーへの 1 回の送信を、30 秒ほどであきらめる(MLflow の既定では、数分から 30 分)
_HTTP_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # 従うと、1 時間でも眠る
}


class EnvironmentPatch:
    """環境変数を書き、後で元に戻す。利用者が先に決めた値は変えず、``warnings`` に書く。"""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._before = dict(os.environ)
        self._written = ["MLFLOW_EXPERIMENT_ID", "MLFLOW_TRACKING_URI"]  # 書くのは MLflow

    def set(self, values: Mapping[str, str]) -> None:
        """まだない環境変数を書く。"""
        for name, value in values.items():
            if name not in os.environ:
                self._written.append(name)
            self._compare(name, os.environ.setdefault(name, value), value)

    def set_resource(self, options: TracingOptions) -> None:
        """サービス名とリソース属性。``OTEL_RESOURCE_ATTRIBUTES`` の利用者の値が優先する。"""
        wanted = {
            "deployment.environment.name": options.environment,
            "service.version": options.service_version,
            "cloud.region": options.deployment_region,
        }
        items = os.environ.get(_RESOURCE, "").split(",")
        pairs = [item.split("=", 1) for item in items if "=" in item]
        given = {key.strip(): value.strip() for key, value in pairs}
        if "service.name" in given:
            self._compare("service.name", given["service.name"], options.service_name)
        else:
            self.set({"OTEL_SERVICE_NAME": options.service_name})
        merged = {**{key: value for key, value in wanted.items() if value}, **given}
        os.environ[_RESOURCE] = ",".join(f"{key}={value}" for key, value in merged.items())
        self._written.append(_RESOURCE)

    def restore(self) -> None:
        """書く前の値に戻す。"""
        for name in self._written:
            os.environ.pop(name, None)
            if name in self._before:
                os.environ[name] = self._before[name]

    def _compare(self, name: str, given: str, wanted: str) -> None:
        if given != wanted:
            if name.endswith("_HEADERS"):  # 鍵が入る
                given = wanted = "(hidden)"
            text = f"{name}={given} from the environment is kept (wanted {wanted})"
            self.warnings.append(hide_secrets(text))


def limits_of(
    options: TracingOptions, backend: Backend, profile: Mapping[str, str]
) -> dict[str, str]:
    """引数と保存先による設定を、プロファイルに足したもの。"""
    values = {**profile, "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING": str(options.enable_async).lower()}
    if backend == "sqlite" and _WORKERS in values:
        values[_WORKERS] = "1"  # 書き手が 1 人のほうが衝突の再試行がなく、失わない
    if backend == "server":
        values |= _HTTP_LIMITS
    return values


# ---- MLflow サーバーの /v1/traces へ OTLP で送る(export_profile="otlp") ----


def check_otlp(tracking_uri: str, backend: Backend) -> None:
    """OTLP で送れる接続先かを確かめる。

    Raises:
        TracingSetupError: ``/v1/traces`` がない接続先、または証明書を確かめない設定。
    """
    if backend != "server":
        raise TracingSetupError(
            "export_profile='otlp' needs an MLflow server (http://...), not "
            f"{hide_secrets(tracking_uri)!r}; use export_profile='burst'"
        )
    if get_default_host_creds(tracking_uri).ignore_tls_verification:
        raise TracingSetupError(
            "export_profile='otlp' always verifies TLS, but MLFLOW_TRACKING_INSECURE_TLS is set; "
            "set MLFLOW_TRACKING_SERVER_CERT_PATH instead or use export_profile='burst'"
        )


def otlp_environment(tracking_uri: str, experiment_id: str) -> dict[str, str]:
    """OTLP の送り先と、MLflow の HTTP クライアントと同じ認証・証明書を表す環境変数。"""
    creds: Any = get_default_host_creds(tracking_uri)
    headers = {"x-mlflow-experiment-id": experiment_id}
    if creds.username and creds.password:
        user = f"{creds.username}:{creds.password}"
        headers["authorization"] = f"Basic {b64encode(user.encode()).decode()}"
    elif creds.token:
        headers["authorization"] = f"Bearer {creds.token}"
    values = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{tracking_uri.rstrip('/')}/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": ",".join(
            f"{name}={quote(value, safe='')}" for name, value in headers.items()
        ),
        "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE": creds.server_cert_path,
        "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE": creds.client_cert_path,
    }
    return {name: value for name, value in values.items() if value}
