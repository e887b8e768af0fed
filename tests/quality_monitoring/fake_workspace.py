"""本物の Databricks クライアントが話す相手。採点はせず、届いたリクエストを記録する。"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]
Answer = tuple[int, Json]
EVALS = "/api/2.0/managed-evals"


@dataclass(frozen=True)
class Call:
    """届いたリクエスト 1 件。"""

    method: str
    path: str
    body: Json
    status: int
    token: str


class FakeWorkspace:
    """``with FakeWorkspace() as workspace:`` の間だけ、``workspace.url`` で待ち受ける。"""

    def __init__(self) -> None:
        self.experiments: dict[str, Json] = {}
        self.scorers: dict[str, list[Json]] = {}
        self.backfills: list[Json] = []
        self.archives: dict[str, str] = {}
        self.calls: list[Call] = []
        self.refuse_backfill = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeWorkspace:
        serve = partial(self._server.serve_forever, poll_interval=0.01)  # すぐに止まるように
        threading.Thread(target=serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def sent(self, method: str, ending: str) -> list[Json]:
        """そのリクエストの本文。"""
        return [c.body for c in self.calls if c.method == method and c.path.endswith(ending)]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        workspace = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def _any(self) -> None:
                raw = self.rfile.read(int(self.headers.get("content-length") or 0))
                body: Json = json.loads(raw) if raw.startswith(b"{") else {}
                url = urlsplit(self.path)
                query = {key: values[0] for key, values in parse_qs(url.query).items()}
                status, answer = workspace.route(self.command, url.path, {**query, **body})
                token = self.headers.get("authorization", "")
                workspace.calls.append(Call(self.command, url.path, body, status, token))
                payload = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            do_GET = do_POST = do_PATCH = do_DELETE = do_PUT = _any

        return Handler

    def route(self, method: str, path: str, data: Json) -> Answer:
        """リクエストを、担当する処理に渡す。"""
        if path == "/.well-known/databricks-config":
            return 200, {"oidc_endpoint": f"{self.url}/oidc", "workspace_id": "1", "host": self.url}
        if "/mlflow/experiments/" in path:
            return self._experiments(path.rpartition("/")[2], data)
        if match := re.fullmatch(f"{EVALS}/scheduled-scorers/([^/]+)", path):
            return self._scheduled(method, match[1], data)
        if match := re.fullmatch(f"{EVALS}/scheduled-scorers/([^/]+)/backfill", path):
            return self._backfill(data)
        if path == f"{EVALS}/monitors":
            return self._monitors(str(data["experiment_id"]))
        if match := re.fullmatch(f"{EVALS}/experiments/([^/]+)/trace-archival", path):
            return self._archival(method, match[1], data)
        if path.endswith("/traces/search"):
            return 200, {"traces": []}
        return _refused(404, "ENDPOINT_NOT_FOUND", path)

    def _experiments(self, action: str, data: Json) -> Answer:
        if action == "get-by-name":
            for experiment in self.experiments.values():
                if experiment["name"] == data["experiment_name"]:
                    return 200, {"experiment": experiment}
            return _refused(404, "RESOURCE_DOES_NOT_EXIST", "no experiment")
        if action == "create":
            new_id = str(len(self.experiments) + 1)
            self.experiments[new_id] = {
                "experiment_id": new_id,
                "name": data["name"],
                "lifecycle_stage": "active",
                "artifact_location": f"dbfs:/databricks/mlflow-tracking/{new_id}",
                "tags": [],
            }
            return 200, {"experiment_id": new_id}
        experiment = self.experiments[str(data["experiment_id"])]
        if action == "set-experiment-tag":
            kept = [tag for tag in experiment["tags"] if tag["key"] != data["key"]]
            experiment["tags"] = [*kept, {"key": data["key"], "value": data["value"]}]
            return 200, {}
        return 200, {"experiment": experiment}

    def _scheduled(self, method: str, experiment_id: str, data: Json) -> Answer:
        exists = experiment_id in self.scorers
        if method == "PATCH" and not exists:
            return _refused(404, "NOT_FOUND", "no scheduled scorers")
        if method == "POST" and exists:
            return _refused(409, "ALREADY_EXISTS", "scheduled scorers exist")
        if method != "GET":
            scorers: list[Json] = data["scheduled_scorers"]["scorers"]
            self.scorers[experiment_id] = [{"scorer_version": 1, **scorer} for scorer in scorers]
        stored = self.scorers.get(experiment_id, [])
        return 200, {"experiment_id": experiment_id, "scheduled_scorers": {"scorers": stored}}

    def _backfill(self, data: Json) -> Answer:
        if self.refuse_backfill:
            return _refused(400, "INVALID_PARAMETER_VALUE", "no warehouse")
        self.backfills.append(data)
        return 200, {"job_id": f"job-{len(self.backfills)}"}

    def _monitors(self, experiment_id: str) -> Answer:
        monitor = {"experiment_id": experiment_id, "is_agent_external": True}
        found = (
            [{"endpoint_name": "m", "monitor": monitor}] if experiment_id in self.scorers else []
        )
        return 200, {"monitor_infos": found}

    def _archival(self, method: str, experiment_id: str, data: Json) -> Answer:
        if method == "POST":
            if experiment_id in self.archives:
                return _refused(409, "ALREADY_EXISTS", "already archived")
            self.archives[experiment_id] = data["archive_table_fullname"]
            return 200, {"job_id": "777"}
        if self.archives.pop(experiment_id, None):
            return 200, {}
        return _refused(404, "NOT_FOUND", "not archived")


def _refused(status: int, code: str, message: str) -> Answer:
    return status, {"error_code": code, "message": message}
