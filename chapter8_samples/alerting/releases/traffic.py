"""8.4.5 Databricks のモデルサービングで、トラフィックを前の版に戻す。

エイリアスを戻しても、サービングのエンドポイントは同じ版を配り続ける。前の版を 0% で残しておけば、
割合を入れ替えるだけで戻せる。残っていない相手、準備のできていない相手、更新中のエンドポイントは拒否する。

Databricks では ``workspace`` を省略し、環境の認証を使う(``databricks-sdk`` が要る)。休止している版
(scale-to-zero)に切り替えると、最初のリクエストは起動を待つ。
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.serving import ServingEndpointsAPI


class ServingTrafficError(RuntimeError):
    """トラフィックを切り替えられない(相手がない、準備ができていない、更新中、更新に失敗)。"""


def shift_serving_traffic(
    endpoint: str,
    to_entity: str,
    *,
    workspace: WorkspaceClient | None = None,
    timeout_seconds: float = 1200.0,
) -> dict[str, Any]:
    """すべてのトラフィックを、すでに配信中の ``to_entity`` に向け、切り替わるまで待つ。

    Args:
        to_entity: 配信中のエンティティの名前(モデルの名前ではなく、エンドポイントの中での名前)。

    Returns:
        ``endpoint``、``changed``、``before``、``after``(名前 -> 割合)。
        すでに 100% なら、何も送らず ``changed`` が ``False`` になる。

    Raises:
        ServingTrafficError: 拒否する理由、または Databricks の答え。
    """
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.errors import OperationFailed
    from databricks.sdk.errors.base import DatabricksError

    try:
        api = (workspace or WorkspaceClient()).serving_endpoints
        return _shift(api, endpoint, to_entity, timedelta(seconds=timeout_seconds))
    except (DatabricksError, OperationFailed, TimeoutError) as error:
        raise ServingTrafficError(
            f"endpoint {endpoint!r} was not shifted to {to_entity!r}: {error}"
        ) from error


def _shift(
    api: ServingEndpointsAPI, endpoint: str, to_entity: str, timeout: timedelta
) -> dict[str, Any]:
    from databricks.sdk.service.serving import Route, TrafficConfig

    found = api.get(endpoint).as_dict()
    if refusal := _refusal(found, f"endpoint {endpoint!r}", to_entity):
        raise ServingTrafficError(refusal)
    before = _shares(found)
    after = {name: 100 if name == to_entity else 0 for name in before}
    if after != before:
        key = _name_key(found)
        routes = [Route.from_dict({key: n, "traffic_percentage": after[n]}) for n in after]
        traffic = TrafficConfig(routes=routes)
        done = api.update_config_and_wait(endpoint, traffic_config=traffic, timeout=timeout)
        now = _shares(done.as_dict())
        if now != after:
            raise ServingTrafficError(f"endpoint {endpoint!r} routes {now} after the update")
    return {"endpoint": endpoint, "changed": after != before, "before": before, "after": after}


def _entities(found: dict[str, Any]) -> list[dict[str, Any]]:
    config: dict[str, Any] = found.get("config", {})
    return config.get("served_entities") or config.get("served_models") or []


def _routes(found: dict[str, Any]) -> list[dict[str, Any]]:
    return found.get("config", {}).get("traffic_config", {}).get("routes", [])


def _shares(found: dict[str, Any]) -> dict[str, int]:
    """配信中の名前 -> 割合。経路のない相手は 0%。"""
    shares = {str(entity["name"]): 0 for entity in _entities(found)}
    for route in _routes(found):
        name = route.get("served_entity_name") or route.get("served_model_name")
        if name in shares:
            shares[name] = route["traffic_percentage"]
    return shares


def _name_key(found: dict[str, Any]) -> str:
    """古いエンドポイントの経路は served_model_name を使う。相手の呼び名に合わせる。"""
    legacy = any("served_entity_name" not in route for route in _routes(found))
    return "served_model_name" if legacy else "served_entity_name"


def _refusal(found: dict[str, Any], where: str, to_entity: str) -> str:
    """切り替えられない理由。切り替えられるなら空。"""
    served = {entity["name"]: entity for entity in _entities(found)}
    if to_entity not in served:
        return f"{to_entity!r} is not served by {where}; served: {', '.join(served)}"
    updating = found.get("state", {}).get("config_update") == "IN_PROGRESS"
    if updating or "pending_config" in found:
        return f"{where} is being updated; wait until it is NOT_UPDATING and try again"
    deployment = served[to_entity].get("state", {}).get("deployment", "DEPLOYMENT_READY")
    if deployment != "DEPLOYMENT_READY":
        return f"{to_entity!r} of {where} is {deployment}, not DEPLOYMENT_READY"
    return ""
