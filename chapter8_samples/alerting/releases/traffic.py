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
    from databricks.sdk.service.serving import ServingEndpointDetailed


class ServingTrafficError(RuntimeError):
    """トラフィックを切り替えられない(相手がない、準備ができていない、更新中、更新に失敗)。"""


def shift_serving_traffic(
    endpoint: str,
    to_entity: str,
    *,
    workspace: WorkspaceClient | None = None,
    wait: bool = True,
    timeout_seconds: float = 1200.0,
) -> dict[str, Any]:
    """すべてのトラフィックを、すでに配信中の ``to_entity`` に向ける。

    Args:
        to_entity: 配信中のエンティティの名前(モデルの名前ではなく、エンドポイントの中での名前)。
        wait: 切り替えが終わるまで待ち、結果を確かめる。``False`` なら頼むだけで戻る。

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
        client = workspace or WorkspaceClient()
        found = client.serving_endpoints.get(endpoint)
        before = _shares(found)
        if refusal := _refusal(found, endpoint, to_entity, list(before)):
            raise ServingTrafficError(refusal)
        after = {name: 100 * (name == to_entity) for name in before}
        if after != before:
            _update(client, found, after, timedelta(seconds=timeout_seconds) if wait else None)
        return {"endpoint": endpoint, "changed": after != before, "before": before, "after": after}
    except (DatabricksError, OperationFailed, TimeoutError) as error:
        raise ServingTrafficError(
            f"endpoint {endpoint!r} was not shifted to {to_entity!r}: {error}"
        ) from error


def _entities(found: ServingEndpointDetailed) -> list[Any]:
    config = found.config
    return list((config.served_entities or config.served_models or []) if config else [])


def _routes(found: ServingEndpointDetailed) -> dict[str, Any]:
    traffic = found.config.traffic_config if found.config else None
    routes = (traffic.routes or []) if traffic else []
    return {str(route.served_entity_name or route.served_model_name): route for route in routes}


def _shares(found: ServingEndpointDetailed) -> dict[str, int]:
    routes, names = _routes(found), [str(entity.name) for entity in _entities(found)]
    return {name: routes[name].traffic_percentage if name in routes else 0 for name in names}


def _refusal(
    found: ServingEndpointDetailed, endpoint: str, to_entity: str, served: list[str]
) -> str:
    where = f"endpoint {endpoint!r}"
    if to_entity not in served:
        return f"{to_entity!r} is not served by {where}; served: {', '.join(served)}"
    update = found.state.config_update if found.state else None
    if found.pending_config or (update and update.value == "IN_PROGRESS"):
        return f"{where} is being updated; wait until it is NOT_UPDATING and try again"
    state = next(entity for entity in _entities(found) if entity.name == to_entity).state
    deployment = state.deployment.value if state and state.deployment else "DEPLOYMENT_READY"
    ready = deployment == "DEPLOYMENT_READY"
    return "" if ready else f"{to_entity!r} of {where} is {deployment}, not DEPLOYMENT_READY"


def _update(
    client: WorkspaceClient,
    found: ServingEndpointDetailed,
    shares: dict[str, int],
    timeout: timedelta | None,
) -> None:
    from databricks.sdk.service.serving import Route, TrafficConfig

    # 古いエンドポイントは served_model_name で経路を持つ。相手が使っている呼び名に合わせる
    legacy = any(route.served_entity_name is None for route in _routes(found).values())
    key = "served_model_name" if legacy else "served_entity_name"
    routes = [Route.from_dict({key: name, "traffic_percentage": n}) for name, n in shares.items()]
    api, name, traffic = client.serving_endpoints, str(found.name), TrafficConfig(routes=routes)
    if timeout is None:
        api.update_config(name, traffic_config=traffic)
        return
    now = _shares(api.update_config_and_wait(name, traffic_config=traffic, timeout=timeout))
    if now != shares:
        raise ServingTrafficError(f"endpoint {name!r} routes {now} after the update")
