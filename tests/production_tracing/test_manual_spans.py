"""spans: スパンの手書きと、途中で切れるストリーミング。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import mlflow
import pytest
from mlflow.tracing.trace_manager import InMemoryTraceManager

from chapter8_samples.production_tracing.spans import (
    atraced_stream,
    record_error,
    traced_step,
    traced_stream,
)


@pytest.fixture(autouse=True)
def experiment(tracking_uri: str) -> None:
    mlflow.set_experiment("spans")


def nothing_is_open() -> bool:
    return not InMemoryTraceManager.get_instance()._traces


def words(fail: bool = False) -> Iterator[str]:
    yield "a"
    yield "b"
    if fail:
        raise OSError("broken pipe")


async def awords(fail: bool = False) -> AsyncGenerator[str, None]:
    for word in words(fail):
        await asyncio.sleep(0)
        yield word


def describe(trace: Any) -> tuple[str, Any, Any]:
    (span,) = trace.data.spans
    return str(trace.info.state), span.outputs, span.get_attribute("stream.aborted")


def test_full_aborted_and_failed_streams(stored: Any) -> None:
    assert list(traced_stream("full", words())) == ["a", "b"]
    cut = traced_stream("cut", words())
    assert next(cut) == "a"
    cut.close()
    abandoned = traced_stream("abandoned", words())
    next(abandoned)
    del abandoned
    with pytest.raises(OSError, match="broken pipe"):
        list(traced_stream("failed", words(fail=True)))
    traces = {trace.data.spans[0].name: trace for trace in stored("spans")}
    assert describe(traces["full"]) == ("OK", "ab", None)
    assert describe(traces["cut"]) == describe(traces["abandoned"]) == ("OK", "a", True)
    assert describe(traces["failed"]) == ("ERROR", "ab", None)
    (event,) = traces["failed"].data.spans[0].events
    assert event.attributes["exception.message"] == "broken pipe"
    assert nothing_is_open()


@pytest.mark.slow
def test_async_streams_and_cancellation(stored: Any) -> None:
    async def main() -> None:
        assert [word async for word in atraced_stream("full", awords())] == ["a", "b"]
        cut = atraced_stream("cut", awords())
        await anext(cut)
        await cut.aclose()
        with pytest.raises(OSError, match="broken pipe"):
            _ = [word async for word in atraced_stream("failed", awords(fail=True))]

        async def consume() -> None:
            async def endless() -> AsyncGenerator[str, None]:
                yield "a"
                await asyncio.sleep(1000)

            async for _ in atraced_stream("cancelled", endless()):
                started.set()

        started = asyncio.Event()
        task = asyncio.create_task(consume())
        await started.wait()
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    traces = {trace.data.spans[0].name: describe(trace) for trace in stored("spans")}
    assert traces == {
        "full": ("OK", "ab", None),
        "cut": ("OK", "a", True),
        "cancelled": ("OK", "a", True),
        "failed": ("ERROR", "ab", None),
    }
    assert nothing_is_open()


def test_stream_is_a_child_of_the_active_trace(stored: Any) -> None:
    with mlflow.start_span("request"):
        list(traced_stream("stream", words(), join=len))
    (trace,) = stored("spans")
    assert {span.name: span.outputs for span in trace.data.spans} == {"request": None, "stream": 2}


def test_join_that_fails_breaks_neither_the_stream_nor_the_trace(
    stored: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def join(chunks: list[Any]) -> str:
        return "".join(chunk["text"] for chunk in chunks)

    assert list(traced_stream("stream", words(), join=join)) == ["a", "b"]
    (trace,) = stored("spans")
    assert describe(trace) == ("OK", ["a", "b"], None)
    assert "join of 'stream' failed (TypeError)" in caplog.text
    assert nothing_is_open()


def test_fastapi_client_that_disconnects(stored: Any) -> None:
    """応答の途中で切断されても、トレースは 1 件保存される。"""
    from starlette.responses import StreamingResponse

    response = StreamingResponse(atraced_stream("chat", awords()))
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        if sent and sent[-1].get("body"):
            raise OSError("client disconnected")
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(1000)

    async def main() -> None:
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        with pytest.raises(Exception):  # noqa: B017
            await response(scope, receive, send)

    asyncio.run(main())
    assert len(stored("spans")) == 1 and nothing_is_open()


@pytest.mark.slow
def test_steps_attributes_and_errors(stored: Any) -> None:
    with pytest.raises(ConnectionResetError), traced_step("a", span_type="LLM", inputs={"q": 1}):
        raise ConnectionResetError("reset")
    with traced_step("b", attributes={"retrieval.top_k": 3}) as span:
        record_error(span, KeyError("k"), fallback="cache")
    found = {trace.data.spans[0].name: trace for trace in stored("spans")}
    a, b = found["a"].data.spans[0], found["b"].data.spans[0]
    assert (a.span_type, a.inputs, str(found["a"].info.state)) == ("LLM", {"q": 1}, "ERROR")
    assert (a.get_attribute("error.type"), a.get_attribute("error.retryable")) == (
        "ConnectionResetError",
        True,
    )
    assert str(found["b"].info.state) == "OK" and b.get_attribute("retrieval.top_k") == 3
    assert (b.get_attribute("error.retryable"), b.get_attribute("error.fallback")) == (
        False,
        "cache",
    )
