"""8.1.4 MLflow サーバーの ``/v1/traces`` へ OTLP で送る設定(``export_profile="otlp"``)。

OTLP の送信は MLflow の HTTP クライアントを通らないので、同じ認証と証明書を
OpenTelemetry の変数でも渡す。
"""

from __future__ import annotations

import os
from base64 import b64encode
from urllib.parse import quote

from .settings import Backend, TracingSetupError, hide_secrets

# MLflow の変数 -> OpenTelemetry の変数
_CERTIFICATES = {
    "MLFLOW_TRACKING_SERVER_CERT_PATH": "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH": "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE",
}


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
    if os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1"):
        raise TracingSetupError(
            "export_profile='otlp' always verifies TLS, but MLFLOW_TRACKING_INSECURE_TLS is set; "
            "set MLFLOW_TRACKING_SERVER_CERT_PATH instead or use export_profile='burst'"
        )


def otlp_environment(tracking_uri: str, experiment_id: str) -> dict[str, str]:
    """OTLP の送り先・認証・証明書を表す環境変数。"""
    headers = {"x-mlflow-experiment-id": experiment_id, **_authorization()}
    return {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{tracking_uri.rstrip('/')}/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": ",".join(
            f"{name}={quote(value, safe='')}" for name, value in headers.items()
        ),
        **{otel: os.environ[name] for name, otel in _CERTIFICATES.items() if name in os.environ},
    }


def _authorization() -> dict[str, str]:
    user = os.environ.get("MLFLOW_TRACKING_USERNAME")
    password = os.environ.get("MLFLOW_TRACKING_PASSWORD")
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    if user and password:
        return {"authorization": f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"}
    return {"authorization": f"Bearer {token}"} if token else {}
