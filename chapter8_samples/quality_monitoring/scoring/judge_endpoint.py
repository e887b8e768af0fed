"""8.3.4 サーバーに採点させるための、ジャッジの接続先(AI Gateway エンドポイント)を作る。

OSS の MLflow サーバーが自動で採点するジャッジは、モデルが ``gateway:/名前`` のものだけである。
その接続先をコードから作る。API キーはサーバーが暗号化して持ち、アプリには要らなくなる。

Databricks のジャッジは最初から用意されているので、この手順は要らない。本番のサーバーは、保存した
API キーを守るために ``MLFLOW_CRYPTO_KEK_PASSPHRASE`` を設定して起動すること。
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import mlflow
from mlflow.entities import GatewayEndpointModelConfig, GatewayModelLinkageType
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient

from .judges import DEFAULT_JUDGE, ScorerSetupError
from .registry import detect_backend

_NAME = "judge"
_HINTS = {
    "scheme": "; start the server with MLFLOW_GATEWAY_API_BASE_ALLOWED_SCHEMES=http,https",
    "private": "; start the server with MLFLOW_GATEWAY_API_BASE_ALLOW_PRIVATE_IPS=true",
}


class JudgeEndpointError(ScorerSetupError):
    """ジャッジの接続先を作れない。"""


def ensure_judge_endpoint(
    name: str = _NAME,
    *,
    api_key: str,
    model: str = "gpt-4.1-mini",
    provider: str = "openai",
    api_base: str | None = None,
) -> str:
    """ジャッジの接続先がなければ作り、モデルの URI(``gateway:/judge`` の形)を返す。

    同じ名前の接続先があれば、そのまま使う(モデルやキーは変えない)。前の呼び出しが途中で失敗していたら、
    残っているキーやモデルを、今回のものに直して続ける。``api_base`` は互換サーバーの URL。

    Raises:
        JudgeEndpointError: 接続先が MLflow サーバーでない、サーバーが拒否した、など。
    """
    if not api_key:  # サーバーは空の鍵も保存し、採点のたびに失敗する
        raise JudgeEndpointError("api_key must not be empty: set OPENAI_API_KEY")
    if judge_endpoint_exists(name):
        return f"gateway:/{name}"
    secret: dict[str, Any] = {
        "secret_value": {"api_key": api_key},
        "auth_config": {"api_base": api_base} if api_base else {},
    }
    server = _server()
    try:
        key = _named(f"{name}-key", "secret_name", server.list_secret_infos())
        if key:
            server.update_gateway_secret(key.secret_id, **secret)
        else:
            key = server.create_gateway_secret(f"{name}-key", provider=provider, **secret)
        use = {"secret_id": key.secret_id, "model_name": model, "provider": provider}
        used = _named(f"{name}-model", "name", server.list_gateway_model_definitions())
        if used:
            server.update_gateway_model_definition(used.model_definition_id, **use)
        else:
            used = server.create_gateway_model_definition(f"{name}-model", **use)
        primary = GatewayModelLinkageType.PRIMARY
        config = GatewayEndpointModelConfig(used.model_definition_id, primary, weight=1.0)
        # usage_tracking を有効にすると、ジャッジの呼び出しを記録するエクスペリメントが増える
        server.create_gateway_endpoint(name, [config], usage_tracking=False)
    except MlflowException as error:
        raise _refused(error) from error
    return f"gateway:/{name}"


def judge_endpoint_exists(name: str = _NAME) -> bool:
    """接続先の MLflow サーバーに、その名前のジャッジの接続先があるか。"""
    try:
        return _named(name, "name", _server().list_gateway_endpoints()) is not None
    except MlflowException as error:
        raise _refused(error) from error


def resolve_judge_model(
    judge_model: str | None = None, *, create_judge_endpoint: bool = False
) -> str | None:
    """使うジャッジのモデル。Databricks では ``None``(用意されたジャッジ)。

    省くと、``MLFLOW_GENAI_JUDGE_DEFAULT_MODEL``、サーバーの接続先 ``judge``、既定の順。
    """
    backend = detect_backend()
    if backend == "databricks" or judge_model:
        return judge_model
    if override := os.environ.get("MLFLOW_GENAI_JUDGE_DEFAULT_MODEL"):
        return override
    if backend == "oss_local":
        return DEFAULT_JUDGE
    if judge_endpoint_exists():
        return f"gateway:/{_NAME}"
    if not create_judge_endpoint:
        return DEFAULT_JUDGE
    key, base = os.environ.get("OPENAI_API_KEY", ""), os.environ.get("OPENAI_BASE_URL")
    return ensure_judge_endpoint(api_key=key, api_base=base)


def _server() -> Any:
    """MLflow サーバーのクライアント。認証や証明書の設定も、MLflow のものを使う。"""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("http"):
        raise JudgeEndpointError(
            f"{uri} is not an MLflow server: set MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    return TracingClient().store


def _named(name: str, key: str, items: Sequence[Any]) -> Any:
    return next((item for item in items if getattr(item, key) == name), None)


def _refused(error: MlflowException) -> JudgeEndpointError:
    hint = next((text for word, text in _HINTS.items() if word in error.message), "")
    uri = mlflow.get_tracking_uri()
    return JudgeEndpointError(f"cannot use the AI Gateway of {uri}: {error.message}{hint}")
