"""metadata_tagging: 検証、検索、スレッドと HTTP での引き継ぎ。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import mlflow
import pytest

from chapter8_samples.production_tracing.metadata_tagging import (
    RequestContext,
    RequestContextMiddleware,
    add_trace_metadata,
    context_from_headers,
    find_traces,
    request_scope,
)
from chapter8_samples.production_tracing.propagation import incoming_trace
from chapter8_samples.production_tracing.spans import traced_stream


@mlflow.trace
def chat(context: RequestContext) -> bool:
    return add_trace_metadata(context)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"session_id": "s" * 251}, "251 characters"),
        ({"user_id": ""}, "non-empty string"),
        ({"user_id": 5}, "non-empty string"),
        ({"request_id": None}, "non-empty string"),
        ({"environment": "e" * 4097}, "4097 characters"),
        ({"extra_tags": {"mlflow.x": "1"}}, "reserved"),
        ({"extra_tags": {"k": None}}, "non-empty string"),
        ({"extra_tags": {None: "v"}}, "non-empty string"),
        ({"user_id": "\ud83d"}, "surrogate"),
        ({"extra_tags": {"k": "\ude00"}}, "surrogate"),
    ],
)
def test_bad_context_is_refused_when_made(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RequestContext(**values)


def test_context_is_frozen_and_makes_its_own_request_id() -> None:
    first, second = RequestContext(), RequestContext()
    assert first.request_id != second.request_id
    with pytest.raises(AttributeError):
        first.user_id = "x"  # type: ignore[misc]
    assert RequestContext(session_id="s" * 250).session_id


@pytest.mark.slow
def test_user_and_session_are_where_mlflow_groups_them(tracking_uri: str, stored: Any) -> None:
    mlflow.set_experiment("group")
    for session in ("s1", "s1", "s2"):
        assert chat(RequestContext(user_id="u", session_id=session, request_id=f"r-{session}"))
    traces = stored("group")
    assert {t.info.trace_metadata["mlflow.trace.user"] for t in traces} == {"u"}
    assert {t.info.client_request_id for t in traces} == {"r-s1", "r-s2"}
    sessions = mlflow.search_sessions(locations=[traces[0].info.experiment_id])
    assert sorted(len(list(session)) for session in sessions) == [1, 2]


def test_unsampled_or_outside_is_false_without_a_warning(
    tracking_uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    mlflow.set_experiment("unsampled")
    caplog.clear()
    assert chat(RequestContext(user_id="u")) is False
    assert add_trace_metadata(RequestContext(user_id="u")) is False
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_over_otlp_the_context_is_in_the_attributes_of_the_root(
    collected: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """OTLP だけの送信では、トレースのタグとメタデータは届かない。"""
    mlflow.set_experiment("otlp")
    headers = {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-00"}
    mlflow.tracing.get_bridged_tracer_provider()  # 送り先は、この後の変数では変わらない
    with monkeypatch.context() as only_otlp, incoming_trace(headers), mlflow.start_span("root"):
        only_otlp.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
        assert add_trace_metadata(RequestContext(user_id="u", request_id="r", region="jp"))
        with mlflow.start_span("child"):
            assert add_trace_metadata(RequestContext(user_id="u")) is False
    (trace,) = collected()
    found = trace.data.spans[0].attributes
    wanted = {
        "user.id": "u",
        "mlflow.traceTag.request_id": "r",
        "mlflow.traceTag.deployment.region": "jp",
        "caller.trace_id": "ab" * 16,
    }
    assert wanted.items() <= found.items() and "session.id" not in found
    assert "in the root span, not 'child'" in caplog.text
    assert not trace.info.tags.keys() & {"request_id", "deployment.region"}


@pytest.mark.slow
def test_find_traces(tracking_uri: str, stored: Any) -> None:
    mlflow.set_experiment("find")
    chat(RequestContext(user_id="o'neil", session_id='say "hi"', request_id="r1"))
    chat(
        RequestContext(
            user_id="b", request_id="r2", environment="prod", region="jp", extra_tags={"ch": "w'b"}
        )
    )
    with pytest.raises(ZeroDivisionError), mlflow.start_span("slow"):
        _ = 1 / 0
    stored()

    def ids(**conditions: Any) -> list[str | None]:
        return [trace.info.client_request_id for trace in find_traces(**conditions)]

    assert ids(user="o'neil") == ["r1"] == ids(session='say "hi"') == ids(request_id="r1")
    assert ids(environment="prod", tags={"ch": "w'b", "deployment.region": "jp"}) == ["r2"]
    assert ids(status="ERROR") == [None] == ids(name="slow")
    assert ids(min_latency_ms=60_000) == [] == ids(user="' OR user = 'b")
    assert len(find_traces()) == 3 and len(find_traces(max_results=1)) == 1
    with pytest.raises(ValueError, match="both quotes"):
        find_traces(user="'\"")
    with pytest.raises(ValueError, match="backquote"):
        find_traces(tags={"a`b": "1"})


def test_one_experiment_written_as_a_string_is_refused() -> None:
    with pytest.raises(ValueError, match="experiment_ids='12' must be a list"):
        find_traces(experiment_ids="12")
    with pytest.raises(ValueError, match="takes ids, not names: '/production/app'"):
        find_traces(experiment_ids=["/production/app"])


def test_a_value_that_is_no_string_is_refused() -> None:
    number: Any = 5
    with pytest.raises(ValueError, match="5 must be a string"):
        find_traces(user=number)


@mlflow.trace
def step() -> None: ...


def test_headers_are_cut_not_refused() -> None:
    context = context_from_headers({"X-User-Id": "u" * 300, "X-Session-ID": " s "})
    assert (len(context.user_id or ""), context.session_id) == (250, "s")
    assert context.request_id.startswith("req-")


@pytest.mark.slow
def test_fastapi_middleware(tracking_uri: str, stored: Any) -> None:
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    from fastapi.testclient import TestClient

    mlflow.set_experiment("fastapi")
    app = FastAPI()
    app.add_middleware(RequestContextMiddleware)  # type: ignore[arg-type]

    @app.get("/sync")
    def sync_endpoint() -> str:
        step()
        return "ok"

    @app.get("/async")
    async def async_endpoint() -> str:
        step()
        return "ok"

    @app.get("/stream")
    async def stream_endpoint() -> StreamingResponse:
        async def body() -> AsyncGenerator[str, None]:
            step()
            yield "ok"

        return StreamingResponse(body())

    @app.get("/traced")
    def traced_endpoint() -> StreamingResponse:
        def body() -> Iterator[str]:
            step()
            yield "ok"

        return StreamingResponse(traced_stream("chat", body()))

    with TestClient(app) as client:
        for path in ("sync", "async", "stream", "traced"):
            assert client.get(f"/{path}", headers={"x-user-id": path}).status_code == 200
        client.get("/sync")
    stored()
    assert [len(find_traces(user=name)) for name in ("sync", "async", "stream")] == [1, 1, 1]
    (traced,) = find_traces(user="traced")
    assert [span.name for span in traced.data.spans] == ["chat", "step"]
    assert len(find_traces()) == 5


def test_scopes_of_concurrent_requests_do_not_mix(collected: Any) -> None:
    mlflow.set_experiment("mix")

    def request(number: int) -> None:
        with request_scope(RequestContext(user_id=f"u{number}")):
            for _ in range(5):
                step()

    threads = [threading.Thread(target=request, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    users = Counter(trace.info.trace_metadata["mlflow.trace.user"] for trace in collected())
    assert users == {f"u{number}": 5 for number in range(6)}
