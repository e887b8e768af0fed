"""8.4.5 Databricks のモデルサービングで、トラフィックを前の版に戻す。

エイリアスを戻しても、サービングのエンドポイントは同じ版を配り続ける。前の版を 0% で残しておけば、
割合を入れ替えるだけで戻せる。残っていない相手、準備のできていない相手、更新中のエンドポイントは断る。

Databricks では ``workspace`` を省略し、環境の認証を使う(``databricks-sdk`` が要る)。休止している版
(scale-to-zero)に切り替えると、最初のリクエストは起動を待つ。
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.service.serving import ServingEndpointDetailed, TrafficConfig

Shares = dict[str, int]
"""配信中の名前 -> トラフィックの割合(%)。"""


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
        ServingTrafficError: 断る理由、または Databricks の答え。
    """
    from databricks.sdk import WorkspaceClient
    from databricks.sdk.errors import OperationFailed
    from databricks.sdk.errors.base import DatabricksError

    try:
        client = workspace or WorkspaceClient()
        found = client.serving_endpoints.get(endpoint)
        before = _shares(found)
        _refuse(found, endpoint, to_entity, list(before))
        after = {name: 100 * (name == to_entity) for name in before}
        result = {"endpoint": endpoint, "changed": after != before, "before": before}
        if after != before:
            _update(client, endpoint, _traffic(found, after), timeout_seconds if wait else None)
        return {**result, "after": after}
    except (DatabricksError, OperationFailed, TimeoutError) as error:
        raise ServingTrafficError(
            f"endpoint {endpoint!r} was not shifted to {to_entity!r}: {error}"
        ) from error


def _entities(found: ServingEndpointDetailed) -> list[Any]:
    config = found.config
    return list((config.served_entities or config.served_models or []) if config else [])


def _routes(found: ServingEndpointDetailed) -> list[Any]:
    traffic = found.config.traffic_config if found.config else None
    return list((traffic.routes or []) if traffic else [])


def _shares(found: ServingEndpointDetailed) -> Shares:
    routed = {r.served_entity_name or r.served_model_name: r for r in _routes(found)}
    names = [str(entity.name) for entity in _entities(found)]
    return {name: routed[name].traffic_percentage if name in routed else 0 for name in names}


def _refuse(
    found: ServingEndpointDetailed, endpoint: str, to_entity: str, served: list[str]
) -> None:
    if to_entity not in served:
        raise ServingTrafficError(
            f"{to_entity!r} is not served by endpoint {endpoint!r}; served: {', '.join(served)}"
        )
    update = found.state.config_update if found.state else None
    if found.pending_config or (update and update.value == "IN_PROGRESS"):
        raise ServingTrafficError(
            f"endpoint {endpoint!r} is being updated; wait until it is NOT_UPDATING and try again"
        )
    target = next(entity for entity in _entities(found) if entity.name == to_entity)
    deployment = target.state.deployment.value if target.state and target.state.deployment else ""
    if deployment not in ("", "DEPLOYMENT_READY"):
        raise ServingTrafficError(
            f"{to_entity!r} of endpoint {endpoint!r} is {deployment}, not DEPLOYMENT_READY"
        )


def _traffic(found: ServingEndpointDetailed, shares: Shares) -> TrafficConfig:
    from databricks.sdk.service.serving import Route, TrafficConfig

    # 古いエンドポイントは served_model_name で経路を持つ。相手が使っている呼び名に合わせる
    legacy = any(r.served_entity_name is None for r in _routes(found))
    key = "served_model_name" if legacy else "served_entity_name"
    routes = [
        Route.from_dict({key: name, "traffic_percentage": share}) for name, share in shares.items()
    ]
    return TrafficConfig(routes=routes)


def _update(
    client: WorkspaceClient, endpoint: str, traffic: TrafficConfig, timeout_seconds: float | None
) -> None:
    api = client.serving_endpoints
    if timeout_seconds is None:
        api.update_config(endpoint, traffic_config=traffic)
        return
    timeout = timedelta(seconds=timeout_seconds)
    updated = api.update_config_and_wait(endpoint, traffic_config=traffic, timeout=timeout)
    wanted = {r.served_entity_name or r.served_model_name: r for r in traffic.routes or []}
    now = _shares(updated)
    if now != {name: route.traffic_percentage for name, route in wanted.items()}:
        raise ServingTrafficError(f"endpoint {endpoint!r} routes {now} after the update")
