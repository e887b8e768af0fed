"""8.3.4 サーバーに採点させるための、ジャッジの接続先(AI Gateway エンドポイント)を作る。

OSS の MLflow サーバーが自動で採点するジャッジは、モデルが ``gateway:/名前`` のものだけである。
その接続先をコードから作る。API キーはサーバーが暗号化して持ち、アプリには要らなくなる。

Databricks のジャッジは最初から用意されているので、この手順は要らない。本番のサーバーは、保存した
API キーを守るために ``MLFLOW_CRYPTO_KEK_PASSPHRASE`` を設定して起動すること。
"""

from __future__ import annotations

import os
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

# 認証や証明書の設定を MLflow のクライアントと共有する
from mlflow.utils.credentials import (
    get_default_host_creds,  # pyright: ignore[reportUnknownVariableType]
)
from mlflow.utils.rest_utils import http_request  # pyright: ignore[reportUnknownVariableType]

from .judges import DEFAULT_JUDGE
from .registry import ScorerSetupError, detect_backend

_NAME = "judge"
_HINTS = {
    "scheme": "; start the server with MLFLOW_GATEWAY_API_BASE_ALLOWED_SCHEMES=http,https",
    "private": "; start the server with MLFLOW_GATEWAY_API_BASE_ALLOW_PRIVATE_IPS=true",
}


class JudgeEndpointError(Exception):
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
        raise JudgeEndpointError("api_key must not be empty")
    if judge_endpoint_exists(name):
        return f"gateway:/{name}"
    auth = {"api_base": api_base} if api_base else {}
    secret = {"secret_value": {"api_key": api_key}, "auth_config": auth}
    secret_id = _ensure("secrets", "secret_name", f"{name}-key", provider, secret)["secret_id"]
    use = {"secret_id": secret_id, "model_name": model}
    used = _ensure("model-definitions", "name", f"{name}-model", provider, use)
    link = {"model_definition_id": used["model_definition_id"], "linkage_type": "PRIMARY"}
    # usage_tracking を有効にすると、ジャッジの呼び出しを記録するエクスペリメントが増える
    endpoint = {"model_configs": [{**link, "weight": 1.0}], "usage_tracking": False}
    _call("POST", "endpoints/create", {"name": name, **endpoint})
    return f"gateway:/{name}"


def judge_endpoint_exists(name: str = _NAME) -> bool:
    """接続先の MLflow サーバーに、その名前のジャッジの接続先があるか。"""
    return _find("endpoints", "name", name) is not None


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
    return (backend == "oss_http" and _server_judge(create_judge_endpoint)) or DEFAULT_JUDGE


def _server_judge(create: bool) -> str | None:
    key, base = os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")
    try:
        if judge_endpoint_exists():
            return f"gateway:/{_NAME}"
        if create and not key:
            raise ScorerSetupError("create_judge_endpoint=True needs OPENAI_API_KEY")
        if create and key:
            return ensure_judge_endpoint(api_key=key, api_base=base)
    except JudgeEndpointError as error:
        raise ScorerSetupError(str(error)) from error
    return None


def _ensure(
    kind: str, key: str, name: str, provider: str, fields: dict[str, Any]
) -> dict[str, Any]:
    if found := _find(kind, key, name):
        ids = {key: v for key, v in found.items() if key in ("secret_id", "model_definition_id")}
        return _call("POST", f"{kind}/update", {**ids, **fields})
    return _call("POST", f"{kind}/create", {key: name, "provider": provider, **fields})


def _find(kind: str, key: str, name: str) -> dict[str, Any] | None:
    return next((item for item in _call("GET", f"{kind}/list") or [] if item[key] == name), None)


def _call(method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """AI Gateway の API を呼び、応答のただ 1 つの値を返す。"""
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("http"):
        raise JudgeEndpointError(
            f"{uri} is not an MLflow server: set MLFLOW_TRACKING_URI=http://HOST:PORT"
        )
    try:
        creds = get_default_host_creds(uri)
        response: Any = http_request(creds, f"/api/3.0/mlflow/gateway/{path}", method, json=body)
    except MlflowException as error:
        raise JudgeEndpointError(f"cannot reach {uri}: {error.message}") from error
    if response.status_code != 200:
        hint = next((text for word, text in _HINTS.items() if word in response.text), "")
        raise JudgeEndpointError(f"the server refused gateway/{path}: {response.text}{hint}")
    return next(iter(response.json().values()), None)
