"""8.3.4 サーバーに採点させるための、ジャッジの接続先(AI Gateway エンドポイント)を作る。

OSS の MLflow サーバーが自動で採点するのは、モデルが ``gateway:/名前`` のジャッジだけで
ある。その接続先をコードから作る。API キーはサーバーが暗号化して持ち、アプリには要らなくなる。

Databricks のジャッジは最初から用意されているので、この手順は要らない。本番のサーバーは、保存した
API キーを守るために ``MLFLOW_CRYPTO_KEK_PASSPHRASE`` を設定して起動すること。
"""

from __future__ import annotations

from typing import Any

import mlflow
from mlflow.exceptions import MlflowException

# 認証や証明書の設定を MLflow のクライアントと共有する
from mlflow.utils.credentials import (
    get_default_host_creds,  # pyright: ignore[reportUnknownVariableType]
)
from mlflow.utils.rest_utils import http_request  # pyright: ignore[reportUnknownVariableType]

_HINTS = {
    "scheme": "start the server with MLFLOW_GATEWAY_API_BASE_ALLOWED_SCHEMES=http,https",
    "private": "start the server with MLFLOW_GATEWAY_API_BASE_ALLOW_PRIVATE_IPS=true",
}


class JudgeEndpointError(Exception):
    """ジャッジの接続先を作れない。"""


def ensure_judge_endpoint(
    name: str = "judge",
    *,
    api_key: str,
    model: str = "gpt-4.1-mini",
    provider: str = "openai",
    api_base: str | None = None,
) -> str:
    """ジャッジの接続先がなければ作り、モデルの URI(``gateway:/judge`` の形)を返す。

    同じ名前の接続先があれば、そのまま使う(モデルやキーは変えない)。

    Args:
        name: 接続先の名前。
        api_key: プロバイダーの API キー。サーバーに送って保存する。
        model: ジャッジに使うモデル。
        api_base: 互換サーバーの URL。省略するとプロバイダーの公式の URL。

    Raises:
        JudgeEndpointError: 接続先が MLflow サーバーでない、サーバーが断った、など。
    """
    if not api_key:  # サーバーは空の鍵も保存し、採点のたびに失敗する
        raise JudgeEndpointError("api_key must not be empty")
    if not judge_endpoint_exists(name):
        key = {
            "secret_value": {"api_key": api_key},
            "provider": provider,
            "auth_config": {"api_base": api_base} if api_base else {},
        }
        secret = _ensure("secrets", {"secret_name": f"{name}-key"}, key)
        use = {"secret_id": secret["secret_id"], "provider": provider, "model_name": model}
        definition = _ensure("model-definitions", {"name": f"{name}-model"}, use)
        _ensure("endpoints", {"name": name}, _only_model(definition["model_definition_id"]))
    return f"gateway:/{name}"


def _only_model(model_definition_id: str) -> dict[str, Any]:
    link = {
        "model_definition_id": model_definition_id,
        "linkage_type": "PRIMARY",
        "weight": 1.0,
    }
    # usage_tracking を有効にすると、ジャッジの呼び出しを記録するエクスペリメントが増える
    return {"model_configs": [link], "usage_tracking": False}


def judge_endpoint_exists(name: str = "judge") -> bool:
    """接続先の MLflow サーバーに、その名前のジャッジの接続先があるか。"""
    return _find("endpoints", {"name": name}) is not None


def _ensure(kind: str, key: dict[str, str], fields: dict[str, Any]) -> dict[str, Any]:
    found = _find(kind, key)
    return found or _only_value(_call("POST", f"{kind}/create", {**key, **fields}))


def _find(kind: str, key: dict[str, str]) -> dict[str, Any] | None:
    answer = _call("GET", f"{kind}/list")
    items: list[dict[str, Any]] = _only_value(answer) if answer else []
    return next((item for item in items if key.items() <= item.items()), None)


def _only_value(answer: dict[str, Any]) -> Any:
    return next(iter(answer.values()))


def _call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
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
        raise JudgeEndpointError(
            f"the server refused gateway/{path}: {response.text}" + (f"; {hint}" if hint else "")
        )
    answer: dict[str, Any] = response.json()
    return answer
