"""log_context: アプリのログの trace_id と request_id。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import asyncio
import io
import logging
import logging.config
import logging.handlers
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlflow
import pytest
from mlflow.entities.trace_location import MlflowExperimentLocation

from chapter8_samples.production_tracing import (
    RequestContext,
    add_trace_metadata,
    atraced_stream,
    log_context,
    request_scope,
    run_with_context,
    traced_stream,
)

FILTER = {"()": "chapter8_samples.production_tracing.TraceContextFilter"}
app_log = logging.getLogger("shop.orders")


@pytest.fixture(autouse=True)
def destination(collected: Any) -> None:
    mlflow.tracing.set_destination(MlflowExperimentLocation("1"))


@pytest.fixture
def logged() -> Iterator[Callable[[], list[str]]]:
    """``dictConfig`` で設定した、アプリのログ。"""
    output = io.StringIO()
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "filters": {"trace": FILTER},
            "formatters": {"line": {"format": "%(trace_id)s %(request_id)s %(message)s"}},
            "handlers": {
                "memory": {
                    "class": "logging.StreamHandler",
                    "stream": output,
                    "filters": ["trace"],
                    "formatter": "line",
                }
            },
            "loggers": {"shop": {"level": "INFO", "handlers": ["memory"], "propagate": False}},
        }
    )
    yield lambda: output.getvalue().splitlines()
    logging.getLogger("shop").handlers.clear()


@mlflow.trace
def step(message: str) -> str:
    app_log.info(message)
    return str(mlflow.get_active_trace_id())


def test_trace_and_request_of_a_scope(logged: Any) -> None:
    with request_scope(RequestContext(request_id="r1")):
        app_log.info("before")
        trace_id = step("in")
    app_log.info("after")
    assert trace_id.startswith("tr-")
    assert logged() == ["- r1 before", f"{trace_id} r1 in", "- - after"]


def test_request_of_a_trace_ends_with_the_trace(logged: Any) -> None:
    with mlflow.start_span("first") as span:
        assert add_trace_metadata(RequestContext(request_id="r1"))
        app_log.info("in")
        with mlflow.start_span("below"):
            app_log.info("below")
    app_log.info("between")
    second = step("other")
    first = span.trace_id
    assert logged() == [f"{first} r1 in", f"{first} r1 below", "- - between", f"{second} - other"]


def test_request_of_the_trace_wins_over_that_of_the_scope(logged: Any) -> None:
    with request_scope(RequestContext(request_id="scope")):
        with mlflow.start_span("chat") as span:
            add_trace_metadata(RequestContext(request_id="trace"))
            app_log.info("in")
        app_log.info("after")
    assert logged() == [f"{span.trace_id} trace in", "- scope after"]


def test_threads(logged: Any) -> None:
    with (
        request_scope(RequestContext(request_id="r1")),
        mlflow.start_span("chat") as span,
        ThreadPoolExecutor(1) as pool,
    ):
        run_with_context(pool, app_log.info, "kept").result()
        pool.submit(app_log.info, "lost").result()
    assert logged() == [f"{span.trace_id} r1 kept", "- - lost"]


def test_concurrent_tasks_do_not_mix(logged: Any) -> None:
    async def request(number: int) -> str:
        scope = request_scope(RequestContext(request_id=f"r{number}"))
        with scope, mlflow.start_span("chat") as span:
            await asyncio.sleep(0)
            app_log.info("n%d", number)
            return f"{span.trace_id} r{number} n{number}"

    async def main() -> list[str]:
        return await asyncio.gather(*map(request, range(5)))

    assert sorted(asyncio.run(main())) == sorted(logged())


@pytest.mark.parametrize("in_trace", [False, True])
def test_inside_of_streams(logged: Any, in_trace: bool) -> None:
    """ストリームは、リクエストの文脈のないスレッドやタスクから読まれる。"""
    ids: list[str] = []

    def chunks() -> Iterator[str]:
        if in_trace:
            add_trace_metadata(RequestContext(request_id="r1"))
        for word in ("a", "b"):
            app_log.info(word)
            ids.append(str(mlflow.get_active_trace_id()))
            yield word

    async def achunks() -> AsyncGenerator[str, None]:
        for word in chunks():
            yield word

    async def read(stream: Any) -> None:
        while await asyncio.create_task(anext(stream, None)):
            pass

    with request_scope(RequestContext(request_id="scope" if in_trace else "r1")):
        stream, astream = traced_stream("s", chunks()), atraced_stream("s", achunks())
    for _ in range(3):
        thread = threading.Thread(target=next, args=(stream, None))
        thread.start()
        thread.join()
    asyncio.run(read(astream))
    app_log.info("after")
    words = zip(ids, "abab", strict=True)
    assert logged() == [*(f"{trace_id} r1 {word}" for trace_id, word in words), "- - after"]


def test_what_is_true_inside_a_stream_does_not_leak_to_its_reader(logged: Any) -> None:
    with request_scope(RequestContext(request_id="r1")):
        stream = traced_stream("s", iter("ab"))
    for _ in stream:
        app_log.info("reader")
    assert logged() == ["- - reader"] * 2


def test_a_queue_handler_keeps_what_was_true_in_the_request(logged: Any) -> None:
    """``QueueListener`` のスレッドで書いても、付けた値は変わらない。"""
    memory = logging.getLogger("shop").handlers[0]
    waiting: queue.Queue[Any] = queue.Queue()
    handler = logging.handlers.QueueHandler(waiting)
    handler.addFilter(log_context.TraceContextFilter())
    logging.getLogger("shop").handlers = [handler]
    listener = logging.handlers.QueueListener(waiting, memory)
    listener.start()
    with request_scope(RequestContext(request_id="r1")):
        trace_id = step("in")
    listener.stop()
    assert logged() == [f"{trace_id} r1 in"]


def test_own_values_and_the_name_of_the_filter_are_respected(logged: Any) -> None:
    app_log.info("given", extra={"trace_id": "mine", "request_id": "too"})
    assert logged() == ["mine too given"]
    only = log_context.TraceContextFilter("shop.payments")
    record = logging.LogRecord("shop.orders", logging.INFO, "", 0, "", (), None)
    assert only.filter(record) is False and vars(record)["trace_id"] == "-"


def test_it_never_raises(logged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """壊れた MLflow は実物で作れないので、読む関数を替える。"""

    def broken() -> str:
        raise RuntimeError("no provider")

    monkeypatch.setattr(log_context, "active_trace_id", broken)
    app_log.info("still logged")
    assert logged() == ["- - still logged"]


def test_unsampled_and_disabled_traces_have_no_id(
    logged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0")
    mlflow.tracing.reset()
    with request_scope(RequestContext(request_id="r1")):
        step("unsampled")
        mlflow.tracing.disable()
        step("disabled")
        mlflow.tracing.enable()
    assert logged() == ["- r1 unsampled", "- r1 disabled"]
