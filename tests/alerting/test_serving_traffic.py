"""サービングの切り替え: 本物の SDK が、手元のワークスペースに送るリクエストを確かめる。"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

pytest.importorskip("databricks.sdk", reason="databricks-sdk is not installed")

from databricks.sdk import WorkspaceClient

from chapter8_samples.alerting.releases.traffic import ServingTrafficError, shift_serving_traffic

PATH = "/api/2.0/serving-endpoints/bot"


class FakeWorkspace:
    """エンドポイントが 1 つだけのワークスペース。"""

    def __init__(self) -> None:
        self.entities: list[dict[str, Any]] = [{"name": "m-2"}, {"name": "m-1"}]
        self.routes: list[dict[str, Any]] = [
            {"served_entity_name": "m-2", "traffic_percentage": 100},
            {"served_entity_name": "m-1", "traffic_percentage": 0},
        ]
        self.update = "NOT_UPDATING"
        self.busy_polls = 0
        """PUT の後、更新中と答える回数。"""
        self.ends_as = "NOT_UPDATING"
        self.ignores = False
        self.pending = False
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.puts: list[tuple[str, Any]] = []
        self.token = ""

    def route(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        if not path.startswith("/api"):  # SDK が最初に聞く、ホストの情報
            return 200, {}
        if not path.startswith(PATH):
            missing = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": f"no {path}"}
            return 404, missing
        if method == "PUT":
            self.puts.append((path, body))
            if self.refusal:
                return self.refusal
            if not self.ignores:
                self.routes = body["traffic_config"]["routes"]
            self.update = "IN_PROGRESS" if self.busy_polls else self.ends_as
        elif self.puts and self.busy_polls:
            self.busy_polls -= 1
        elif self.puts:
            self.update = self.ends_as
        return 200, self.endpoint()

    def endpoint(self) -> dict[str, Any]:
        config = {"served_entities": self.entities, "traffic_config": {"routes": self.routes}}
        found: dict[str, Any] = {
            "name": "bot",
            "state": {"config_update": self.update, "ready": "READY"},
            "config": config,
        }
        return {**found, "pending_config": {"config_version": 2}} if self.pending else found


@pytest.fixture
def fake() -> FakeWorkspace:
    return FakeWorkspace()


@pytest.fixture
def client(fake: FakeWorkspace) -> Iterator[WorkspaceClient]:
    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            raw = self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.path.startswith("/api"):
                fake.token = self.headers.get("authorization", "")
            status, data = fake.route(self.command, self.path, json.loads(raw or b"null"))
            payload = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_PUT = answer

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield WorkspaceClient(host=f"http://127.0.0.1:{server.server_port}", token="dapi-test")
        server.shutdown()


def test_all_traffic_goes_to_the_entity_that_is_already_served(
    fake: FakeWorkspace, client: WorkspaceClient
) -> None:
    done = shift_serving_traffic("bot", "m-1", workspace=client)
    assert done == {
        "endpoint": "bot",
        "changed": True,
        "before": {"m-2": 100, "m-1": 0},
        "after": {"m-2": 0, "m-1": 100},
    }
    assert fake.puts == [
        (
            f"{PATH}/config",
            {
                "traffic_config": {
                    "routes": [
                        {"served_entity_name": "m-2", "traffic_percentage": 0},
                        {"served_entity_name": "m-1", "traffic_percentage": 100},
                    ]
                }
            },
        )
    ]
    assert fake.token == "Bearer dapi-test"


def test_nothing_is_sent_when_the_traffic_is_already_there(
    fake: FakeWorkspace, client: WorkspaceClient
) -> None:
    assert shift_serving_traffic("bot", "m-2", workspace=client)["changed"] is False
    assert fake.puts == []


def test_an_entity_without_a_route_gets_one(fake: FakeWorkspace, client: WorkspaceClient) -> None:
    del fake.routes[1]
    done = shift_serving_traffic("bot", "m-1", workspace=client)
    assert (done["before"], done["after"]) == ({"m-2": 100, "m-1": 0}, {"m-2": 0, "m-1": 100})


def test_an_old_endpoint_keeps_its_old_names(fake: FakeWorkspace, client: WorkspaceClient) -> None:
    fake.routes = [
        {
            "served_model_name": r["served_entity_name"],
            "traffic_percentage": r["traffic_percentage"],
        }
        for r in fake.routes
    ]
    shift_serving_traffic("bot", "m-1", workspace=client)
    assert fake.puts[0][1]["traffic_config"]["routes"] == [
        {"served_model_name": "m-2", "traffic_percentage": 0},
        {"served_model_name": "m-1", "traffic_percentage": 100},
    ]


@pytest.mark.parametrize(
    ("fields", "entity", "reason"),
    [
        ({}, "m-9", r"'m-9' is not served by endpoint 'bot'; served: m-2, m-1"),
        ({"update": "IN_PROGRESS"}, "m-1", "is being updated; wait"),
        ({"pending": True}, "m-1", "is being updated; wait"),
        (
            {
                "entities": [
                    {"name": "m-2"},
                    {"name": "m-1", "state": {"deployment": "DEPLOYMENT_FAILED"}},
                ]
            },
            "m-1",
            "is DEPLOYMENT_FAILED, not DEPLOYMENT_READY",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    fake: FakeWorkspace, client: WorkspaceClient, fields: dict[str, Any], entity: str, reason: str
) -> None:
    vars(fake).update(copy.deepcopy(fields))
    with pytest.raises(ServingTrafficError, match=reason):
        shift_serving_traffic("bot", entity, workspace=client)
    assert fake.puts == []


def test_an_unknown_endpoint_is_named(client: WorkspaceClient) -> None:
    with pytest.raises(ServingTrafficError, match="endpoint 'nobody' was not shifted"):
        shift_serving_traffic("nobody", "m-1", workspace=client)


def test_a_lost_race_is_an_error(fake: FakeWorkspace, client: WorkspaceClient) -> None:
    conflict = {"error_code": "RESOURCE_CONFLICT", "message": "an update is in progress"}
    fake.refusal = (409, conflict)
    with pytest.raises(ServingTrafficError, match="an update is in progress"):
        shift_serving_traffic("bot", "m-1", workspace=client)


@pytest.mark.slow
def test_it_waits_for_the_end_of_the_update(fake: FakeWorkspace, client: WorkspaceClient) -> None:
    fake.busy_polls = 1
    assert shift_serving_traffic("bot", "m-1", workspace=client)["changed"]
    assert fake.update == "NOT_UPDATING"


@pytest.mark.parametrize("end", ["UPDATE_FAILED", "UPDATE_CANCELED"])
def test_a_failed_update_is_an_error(
    fake: FakeWorkspace, client: WorkspaceClient, end: str
) -> None:
    fake.ends_as = end
    with pytest.raises(ServingTrafficError, match=f"was not shifted to 'm-1': .*{end}"):
        shift_serving_traffic("bot", "m-1", workspace=client)


def test_an_update_without_effect_is_noticed(fake: FakeWorkspace, client: WorkspaceClient) -> None:
    fake.ignores = True
    with pytest.raises(ServingTrafficError, match=r"routes \{'m-2': 100, 'm-1': 0\} after"):
        shift_serving_traffic("bot", "m-1", workspace=client)
