"""軽いスパン(native)が、MLflow のスパンと同じに見え、失われた数が分かること。"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import json
import multiprocessing
import os
import re
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import context, propagate, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from ports import free_port
from relay import relay
from samples import ROOT, run_as_reader

from chapter8_samples._lab.servers.receivers import OtlpReceiver, ReceivedSpan
from chapter8_samples.cost_tracking import price_trace
from chapter8_samples.opentelemetry import native_delivery
from chapter8_samples.opentelemetry.native import (
    NativeStatus,
    NativeTracing,
    annotate_span,
    setup_native_tracing,
    traced,
)
from chapter8_samples.production_tracing import mask_pii

from .conftest import wait_until

Setup = Callable[..., NativeTracing]


@pytest.fixture
def setup() -> Iterator[Setup]:
    """``setup_native_tracing`` を呼び、テストの後で終える。"""
    started: list[NativeTracing] = []

    def start(url: str, experiment: str | None = None, **options: Any) -> NativeTracing:
        started.append(setup_native_tracing(url, experiment, "bot", **options))
        return started[-1]

    yield start
    for tracing in started:
        tracing.shutdown(1)


def only(tracing: NativeTracing, seconds: float = 10) -> NativeStatus:
    """書き出した後の、1 つしかない送り先の数。"""
    (status,) = tracing.flush(seconds).values()
    return status


def inputs(span: ReceivedSpan) -> Any:
    return json.loads(span.attributes["mlflow.spanInputs"])


def outputs(span: ReceivedSpan) -> Any:
    return json.loads(span.attributes["mlflow.spanOutputs"])


def by_name(otlp: OtlpReceiver) -> dict[str, ReceivedSpan]:
    return {span.name: span for span in otlp.spans}


# ---- MLflow のサーバーでの見え方


@traced(span_type="CHAT_MODEL", name="llm")
def ask_model(question: str) -> str:
    annotate_span(provider="openai", model="gpt-4o-mini", input_tokens=1_000, output_tokens=500)
    if "fail" in question:
        raise TimeoutError("the model did not answer")
    return f"回答: {question}"


@traced(span_type="AGENT")
def answer(question: str, top_k: int = 3) -> str:
    annotate_span(session="s-1", user="taro", **{"mlflow.traceTag.release": "v1"})
    with traced(span_type="RETRIEVER", name="retrieve"):
        annotate_span(inputs={"k": top_k}, outputs=[{"page_content": "14 日以内"}])
    return ask_model(question)


@pytest.fixture
def answered(mlflow_server_url: str, setup: Setup, request: pytest.FixtureRequest) -> Any:
    """成功と失敗のトレースが 1 件ずつあるエクスペリメント。"""
    os.environ["OTEL_EXPORTER_OTLP_TIMEOUT"] = "60"  # サーバーは、最初に litellm を読み込む
    tracing = setup(mlflow_server_url, f"native {request.node.name}")
    answer("返品したい")
    with pytest.raises(TimeoutError):
        answer("fail")
    (status,) = tracing.flush(60).values()
    assert (status.ended, status.delivered) == (6, 6)
    return tracing


def search(tracing: NativeTracing, filter_string: str | None = None) -> list[Any]:
    ids = [str(tracing.experiment_id)]
    return mlflow.search_traces(ids, filter_string=filter_string, return_type="list")  # type: ignore[return-value]


@pytest.mark.slow
def test_in_mlflow_a_trace_looks_as_if_mlflow_had_made_it(answered: NativeTracing) -> None:
    failed, good = sorted(search(answered), key=lambda one: one.info.state.value)
    info = good.info
    assert info.request_preview == '{"question": "返品したい", "top_k": 3}'
    assert info.response_preview == '"回答: 返品したい"'
    assert (info.state.value, failed.info.state.value) == ("OK", "ERROR")
    assert info.token_usage == {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}
    assert info.cost and set(info.cost) == {"input_cost", "output_cost", "total_cost"}
    assert info.trace_metadata["mlflow.trace.session"] == "s-1"
    assert info.trace_metadata["mlflow.trace.user"] == "taro"
    assert (info.tags["mlflow.traceName"], info.tags["release"]) == ("answer", "v1")
    spans = {span.name: span for span in good.data.spans}
    types = {name: span.span_type for name, span in spans.items()}
    assert types == {"answer": "AGENT", "retrieve": "RETRIEVER", "llm": "CHAT_MODEL"}
    assert {span.parent_id for span in spans.values()} == {None, spans["answer"].span_id}
    assert {span.status.status_code.value for span in spans.values()} == {"OK"}
    assert spans["retrieve"].outputs == [{"page_content": "14 日以内"}]
    (event,) = failed.data.spans[0].events
    assert event.attributes["exception.message"] == "the model did not answer"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("filter_string", "found"),
    [
        ("trace.status = 'ERROR'", 1),
        ("tag.release = 'v1'", 2),
        ("metadata.`mlflow.trace.session` = 's-1'", 2),
        ("metadata.`mlflow.trace.user` = 'jiro'", 0),
        ("trace.name = 'answer'", 2),
        ("span.type = 'RETRIEVER'", 2),
        ("span.name = 'llm' AND trace.status = 'OK'", 1),
        ("trace.text LIKE '%返品したい%'", 1),
    ],
)
def test_filters_of_search_traces_find_it(
    answered: NativeTracing, filter_string: str, found: int
) -> None:
    assert len(search(answered, filter_string)) == found


@pytest.mark.slow
def test_prices_of_8_2_are_read_from_what_arrives(answered: NativeTracing) -> None:
    priced = price_trace(search(answered, "trace.status = 'OK'")[0])
    assert (priced.total_usd, priced.complete) == (Decimal("0.00045"), True)


@pytest.mark.slow
def test_feedback_finds_the_trace_by_the_id_of_the_span(
    mlflow_server_url: str, setup: Setup
) -> None:
    tracing = setup(mlflow_server_url, "native feedback")
    with traced(name="answer") as span:
        trace_id = f"tr-{span.get_span_context().trace_id:032x}"
    tracing.flush()
    mlflow.log_feedback(trace_id=trace_id, name="thumbs", value=True)
    assert [one.name for one in mlflow.get_trace(trace_id).info.assessments] == ["thumbs"]  # type: ignore[union-attr]


@pytest.mark.slow
def test_what_does_not_carry_over(mlflow_server_url: str, setup: Setup) -> None:
    """docstring に書いた違い: MLflow のスパンにあって、native のスパンにないもの。"""
    tracing = setup(mlflow_server_url, "native beside mlflow")
    mlflow.set_experiment("native beside mlflow")
    with mlflow.start_run():
        mlflow.trace(lambda question: question, name="mlflows")("q")
        with traced(name="native"):
            annotate_span(inputs={"question": "q"}, outputs="q")
            assert mlflow.get_current_active_span() is None
            with mlflow.start_span("inside"):  # 親子にならず、別のトレースになる
                pass
    mlflow.flush_trace_async_logging()
    tracing.flush()
    found = {one.info.tags["mlflow.traceName"]: one for one in search(tracing)}
    assert set(found) == {"mlflows", "native", "inside"}
    theirs, ours = found["mlflows"].info, found["native"].info
    missing = set(theirs.trace_metadata) - set(ours.trace_metadata)
    assert {"mlflow.source.name", "mlflow.source.type", "mlflow.user"} <= missing
    assert "mlflow.sourceRun" in missing
    attributes = [set(one.data.spans[0].attributes) for one in (found["mlflows"], found["native"])]
    assert attributes[0] - attributes[1] == {"mlflow.spanFunctionName", "mlflow.spanLogLevel"}


@pytest.mark.slow
def test_the_experiment_is_made_once_and_a_deleted_one_is_named(
    mlflow_server_url: str, setup: Setup
) -> None:
    ids = {setup(f"{mlflow_server_url}/", "native made").experiment_id for _ in range(2)}
    (experiment_id,) = ids
    assert mlflow.get_experiment(str(experiment_id)).name == "native made"
    mlflow.delete_experiment(str(experiment_id))
    with pytest.raises(ConnectionError, match=r"'native made' .*restore it if deleted"):
        setup(mlflow_server_url, "native made")


@pytest.mark.slow
def test_one_odd_span_does_not_make_the_server_refuse_the_others(
    mlflow_server_url: str, setup: Setup
) -> None:
    tracing = setup(mlflow_server_url, "native odd")
    with traced(name="long"):
        annotate_span(session="s" * 300, inputs="片割れ \ud83d")
    with traced(name="good"):
        pass
    assert only(tracing).delivered == 2
    long = search(tracing, "trace.name = 'long'")[0]
    assert long.info.trace_metadata["mlflow.trace.session"] == "s" * 250
    assert long.data.spans[0].inputs == "片割れ ?"  # 替えなければ、入力が消える


@pytest.mark.slow
def test_a_server_and_a_collector_get_the_same_ids(
    mlflow_server_url: str, otlp: OtlpReceiver, setup: Setup
) -> None:
    tracing = setup(
        mlflow_server_url, "native both", collector=otlp.http_endpoint, headers={"x-key": "secret"}
    )
    answer("両方")
    statuses = tracing.flush()
    assert {one.delivered for one in statuses.values()} == {3} and len(statuses) == 2
    (stored,) = search(tracing)
    assert {f"tr-{span.trace_id}" for span in otlp.spans} == {stored.info.trace_id}
    assert otlp.spans[0].resource["service.name"] == "bot"
    (request,) = otlp.requests
    assert "x-key" not in request.headers and "x-mlflow-experiment-id" not in request.headers


# ---- traced


class Box:
    @traced()
    def method(self, *args: int, flag: bool = False, **extra: str) -> int:
        return len(args)

    @classmethod
    @traced()
    def of_class(cls, value: int) -> int:
        return value

    @staticmethod
    @traced()
    def static(value: int) -> int:
        return value


def test_arguments_and_results_of_every_kind_of_function(otlp: OtlpReceiver, setup: Setup) -> None:
    @traced()
    async def coroutine(question: str) -> str:
        await asyncio.sleep(0)
        return question.upper()

    tracing = setup(otlp.http_endpoint)
    assert (Box().method(1, 2, note="x"), Box.of_class(3), Box.static(4)) == (2, 3, 4)
    assert asyncio.run(coroutine(question="q")) == "Q"
    assert only(tracing).delivered == 4
    found = {name: (inputs(span), outputs(span)) for name, span in by_name(otlp).items()}
    assert found == {
        "method": ({"args": [1, 2], "flag": False, "extra": {"note": "x"}}, 2),
        "of_class": ({"value": 3}, 3),
        "static": ({"value": 4}, 4),
        "coroutine": ({"question": "q"}, "Q"),
    }
    assert asyncio.iscoroutinefunction(coroutine) and coroutine.__name__ == "coroutine"


def test_what_a_decorator_below_injects_is_not_guessed(otlp: OtlpReceiver, setup: Setup) -> None:
    def with_database(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return function("db", *args)

        return call

    @traced()
    @with_database
    def ask(database: str, question: str) -> str:
        return database + question

    tracing = setup(otlp.http_endpoint)
    assert ask("q") == "dbq"
    assert only(tracing).delivered == 1
    assert inputs(otlp.spans[0]) == {}


def test_values_that_are_not_json(otlp: OtlpReceiver, setup: Setup) -> None:
    @dataclasses.dataclass
    class Page:
        number: int

    class Model:  # pydantic のモデルの形
        def __init__(self) -> None:
            self.name = "m"

        def model_dump(self) -> None: ...

    class Broken:
        def __str__(self) -> str:
            raise OSError("no text")

    @traced()
    def keep(value: Any) -> None: ...

    tracing, circle = setup(otlp.http_endpoint), [0]
    circle.append(circle)  # type: ignore[arg-type]
    values = (Page(1), Model(), Path("a"), circle, {(1, 2): 3}, Broken())
    for value in values:
        keep(value)
    assert only(tracing).delivered == len(values)
    assert [inputs(span) for span in otlp.spans] == [
        {"value": {"number": 1}},
        {"value": {"name": "m"}},
        {"value": "a"},
        "<dict is not JSON: ValueError>",
        "<dict is not JSON: TypeError>",
        "<dict is not JSON: OSError>",
    ]


def test_an_exception_is_an_error_with_its_event_and_still_raised(
    otlp: OtlpReceiver, setup: Setup
) -> None:
    @traced()
    def fail() -> None:
        raise KeyError("missing")

    tracing = setup(otlp.http_endpoint)
    with pytest.raises(KeyError):
        fail()
    with traced(name="handled") as span:
        span.set_status(trace.StatusCode.ERROR, "handled here")  # 利用者の状態は上書きしない
    assert only(tracing).delivered == 2
    failed, handled = otlp.spans
    assert (failed.status_code, failed.status_message) == (2, "KeyError: 'missing'")
    assert failed.events[0].attributes["exception.type"] == "KeyError"
    assert (handled.status_code, handled.status_message) == (2, "handled here")


def test_a_wrong_call_is_told_as_without_traced(otlp: OtlpReceiver, setup: Setup) -> None:
    tracing = setup(otlp.http_endpoint)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'question'"):
        answer()  # type: ignore[call-arg]
    assert only(tracing).delivered == 1 and otlp.spans[0].status_code == 2


def test_before_the_setup_nothing_is_recorded() -> None:
    program = """
from opentelemetry import trace
from chapter8_samples.opentelemetry import annotate_span, traced
with traced(name="a") as span:
    annotate_span(model="m")
    print(traced()(lambda x: x)(1), span.is_recording(), trace.get_current_span().is_recording())
"""
    run = run_as_reader(["-c", program], ROOT, environment={"PYTHONPATH": str(ROOT)})
    assert run.stdout == "1 False False\n", run.stderr


# ---- ジェネレーター


@traced(name="stream")
def stream(parts: list[str]) -> Iterator[str]:
    with traced(name="llm"):
        yield from parts
        annotate_span(model="gpt-4o-mini", output_tokens=len(parts))


@traced(name="astream")
async def astream(parts: list[str]) -> AsyncIterator[str]:
    with traced(name="llm"):
        for part in parts:
            await asyncio.sleep(0)
            yield part
        annotate_span(model="gpt-4o-mini", output_tokens=len(parts))


def test_a_stream_is_one_span_and_does_not_leak_to_its_reader(
    otlp: OtlpReceiver, setup: Setup
) -> None:
    tracing = setup(otlp.http_endpoint)
    with traced(name="request") as request:
        for _ in stream(["あ", "い"]):
            assert trace.get_current_span() is request
    assert only(tracing).delivered == 3
    spans = by_name(otlp)
    assert spans["stream"].parent_span_id == spans["request"].span_id
    assert spans["llm"].parent_span_id == spans["stream"].span_id
    assert (inputs(spans["stream"]), outputs(spans["stream"])) == (
        {"parts": ["あ", "い"]},
        ["あ", "い"],
    )
    assert spans["llm"].attributes["gen_ai.usage.output_tokens"] == 2
    assert {span.status_code for span in otlp.spans} == {1}


def test_an_async_stream_too(otlp: OtlpReceiver, setup: Setup) -> None:
    async def read() -> list[str]:
        with traced(name="request") as request:
            found = []
            async for part in astream(["a", "b"]):
                assert trace.get_current_span() is request
                found.append(part)
            return found

    tracing = setup(otlp.http_endpoint)
    assert asyncio.run(read()) == ["a", "b"] and only(tracing).delivered == 3
    spans = by_name(otlp)
    assert spans["llm"].parent_span_id == spans["astream"].span_id
    assert outputs(spans["astream"]) == ["a", "b"]
    assert spans["llm"].attributes["gen_ai.response.model"] == "gpt-4o-mini"


def test_an_abandoned_generator_ends_its_span(otlp: OtlpReceiver, setup: Setup) -> None:
    async def leave() -> None:
        async for _ in astream(["a", "b"]):
            break
        gc.collect()
        await asyncio.sleep(0.05)

    tracing, half = setup(otlp.http_endpoint), stream(["あ", "い"])
    next(half)
    del half
    gc.collect()
    asyncio.run(leave())
    assert only(tracing).delivered == 4
    assert {span.status_code for span in otlp.spans} == {1}  # 中で開いていた with も
    for name, first in (("stream", "あ"), ("astream", "a")):
        span = by_name(otlp)[name]
        assert (span.attributes["stream.aborted"], span.status_code) == (True, 1)
        assert outputs(span) == [first]
    assert trace.get_current_span() is trace.INVALID_SPAN


def test_a_stream_read_from_other_threads_stays_one_trace(
    otlp: OtlpReceiver, setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette は、同期のジェネレーターの断片を、毎回別のスレッドで作る。"""
    tracing, parts = setup(otlp.http_endpoint), stream(["a", "b", "c"])
    for _ in range(4):
        reader = threading.Thread(target=lambda: next(parts, None))
        reader.start()
        reader.join()
    assert only(tracing).delivered == 2 and caplog.records == []
    spans = by_name(otlp)
    assert spans["llm"].parent_span_id == spans["stream"].span_id
    assert spans["llm"].attributes["gen_ai.usage.output_tokens"] == 3


def test_send_throw_and_return_work_as_without_traced(otlp: OtlpReceiver, setup: Setup) -> None:
    @traced()
    def talk() -> Any:
        heard = []
        for _ in range(2):
            try:
                heard.append((yield len(heard)))
            except KeyError:
                heard.append("caught")
        return heard

    @contextlib.asynccontextmanager
    @traced()
    async def resource() -> AsyncIterator[str]:
        try:
            yield "open"
        except LookupError:
            closed.append("rolled back")

    async def use() -> None:
        async with resource():
            raise LookupError

    tracing, closed = setup(otlp.http_endpoint), list[str]()
    talking = talk()
    assert (next(talking), talking.send("hello")) == (0, 1)
    with pytest.raises(StopIteration) as stopped:
        talking.throw(KeyError())
    assert stopped.value.value == ["hello", "caught"]
    asyncio.run(use())
    assert closed == ["rolled back"]
    assert only(tracing).delivered == 2


def test_a_stream_that_fails_is_an_error(otlp: OtlpReceiver, setup: Setup) -> None:
    @traced()
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("half")

    tracing = setup(otlp.http_endpoint)
    with pytest.raises(ValueError, match="half"):
        list(broken())
    assert only(tracing).delivered == 1
    assert (otlp.spans[0].status_code, outputs(otlp.spans[0])) == (2, [1])


# ---- 親子


def test_a_span_that_outlives_its_parent(otlp: OtlpReceiver, setup: Setup) -> None:
    async def background() -> None:
        with traced(name="late"):
            await asyncio.sleep(0.01)

    async def handle() -> None:
        with traced(name="request"):
            task = asyncio.create_task(background())
            await asyncio.sleep(0)
        await task

    tracing = setup(otlp.http_endpoint)
    asyncio.run(handle())
    assert only(tracing).delivered == 2
    request, late = by_name(otlp)["request"], by_name(otlp)["late"]
    assert late.parent_span_id == request.span_id
    assert late.end_time_unix_nano > request.end_time_unix_nano


def test_a_trace_goes_on_in_another_process(otlp: OtlpReceiver, setup: Setup) -> None:
    tracing, headers = setup(otlp.http_endpoint), dict[str, str]()
    with traced(name="caller"):
        propagate.inject(headers)
    token = context.attach(propagate.extract(headers, context.Context()))
    with traced(name="callee"):
        pass
    context.detach(token)
    assert only(tracing).delivered == 2
    caller, callee = by_name(otlp)["caller"], by_name(otlp)["callee"]
    assert (callee.trace_id, callee.parent_span_id) == (caller.trace_id, caller.span_id)


@pytest.mark.parametrize("others_ratio", [0, 1])
def test_spans_of_other_instrumentation_and_native_ones_do_not_cut_each_other(
    otlp: OtlpReceiver, setup: Setup, others_ratio: int
) -> None:
    """ほかの計装のスパンは MLflow に届かない。その下でもルートから始まり、間にあれば飛ばす。"""
    tracing = setup(otlp.http_endpoint)
    other = TracerProvider(sampler=ParentBased(TraceIdRatioBased(others_ratio))).get_tracer("http")
    with other.start_as_current_span("GET /") as http, traced(name="root"):
        assert trace.get_current_span() is http
        with other.start_as_current_span("SELECT") as library, traced(name="child"):
            annotate_span(model="m")
            assert library.get_span_context().trace_id == http.get_span_context().trace_id
            assert trace.get_current_span() is library
    assert only(tracing).delivered == 2
    root, child = by_name(otlp)["root"], by_name(otlp)["child"]
    assert (root.parent_span_id, child.parent_span_id) == ("", root.span_id)
    assert "gen_ai.response.model" in child.attributes


def test_one_traced_is_used_again_after_it_ended(otlp: OtlpReceiver, setup: Setup) -> None:
    tracing, step = setup(otlp.http_endpoint), traced(name="step")
    for _ in range(2):
        with step:
            pass
    assert only(tracing).delivered == 2 and len({span.span_id for span in otlp.spans}) == 2


def test_sampling_keeps_or_drops_whole_traces(otlp: OtlpReceiver, setup: Setup) -> None:
    tracing = setup(otlp.http_endpoint, sampling_ratio=0.3)
    for _ in range(300):
        answer("q")
    kept = only(tracing).delivered
    assert kept % 3 == 0 and 150 < kept < 400  # 270 の前後
    counts = {span.trace_id: 0 for span in otlp.spans}
    for span in otlp.spans:
        counts[span.trace_id] += 1
    assert set(counts.values()) == {3}


# ---- マスキング


SECRET = "taro@example.jp"


def test_masking_reaches_every_text_and_runs_on_the_sending_thread(
    otlp: OtlpReceiver, setup: Setup
) -> None:
    threads: set[str] = set()

    def mask(text: str) -> str:
        threads.add(threading.current_thread().name)
        return mask_pii().text(text)

    @traced(span_type="TOOL", name=f"mail to {SECRET}")
    def send(to: Any) -> str:
        annotate_span(user=SECRET)
        trace.get_current_span().set_attribute("cc", [SECRET])
        trace.get_current_span().add_event("sent", {"to": SECRET})
        raise ValueError(f"cannot mail to {SECRET}")

    tracing = setup(otlp.http_endpoint, masking=mask)
    with pytest.raises(ValueError):
        send({SECRET: [f"改行\n{SECRET}", 9012345678, True, None]})
    assert only(tracing).delivered == 1
    (span,) = otlp.spans
    assert SECRET not in repr(span) and "[EMAIL]" in span.name
    assert inputs(span)["to"]["[EMAIL]"][0] == "改行\n[EMAIL]"
    assert inputs(span)["to"]["[EMAIL]"][2:] == [True, None]
    assert span.attributes["mlflow.spanType"] == "TOOL"
    assert span.attributes["cc"] == ["[EMAIL]"] and span.status_code == 2
    assert threading.current_thread().name not in threads


@given(st.recursive(st.text() | st.integers() | st.none() | st.booleans(), st.lists))
def test_masking_of_json_stays_json_and_an_idle_mask_changes_nothing(value: Any) -> None:
    text = json.dumps([value, "x"], ensure_ascii=False)
    assert json.loads(native_delivery.hidden(text, lambda one: one)) == [value, "x"]
    hidden = native_delivery.hidden(text, lambda _: "#")
    assert set(re.findall(r"[^\[\], ]+", hidden)) <= {'"#"', "null", "true", "false"}


def test_a_mask_that_fails_sends_nothing_and_is_counted(
    otlp: OtlpReceiver, setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    def mask(text: str) -> str:
        raise RuntimeError(SECRET)

    tracing = setup(otlp.http_endpoint, masking=mask)
    answer("q")
    status = only(tracing)
    assert (status.refused, status.pending, otlp.spans) == (3, 0, [])
    assert "RuntimeError" in caplog.text and SECRET not in caplog.text


# ---- 届いた数と失われた数


def test_what_the_queue_cannot_hold_is_dropped_and_counted(
    otlp: OtlpReceiver, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    tracing, otlp.delay_seconds = setup(otlp.http_endpoint, max_queue_spans=10), 0.2

    def many() -> None:
        for _ in range(50):
            with traced(name="one"):
                pass

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    status = only(tracing)
    assert status.ended == 200 and status.dropped > 0
    assert status.delivered == len(otlp.spans) == 200 - status.dropped
    assert (status.refused, status.pending) == (0, 0)


def test_spans_being_sent_take_no_room_in_the_queue(
    otlp: OtlpReceiver, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "10")
    tracing, otlp.delay_seconds = setup(otlp.http_endpoint, max_queue_spans=10), 1.0
    (destination,) = vars(tracing)["_destinations"].values()
    for _ in range(2):
        for _ in range(10):
            with traced(name="one"):
                pass
        wait_until(lambda: destination.exporter.taken >= 10, seconds=10)
    assert (only(tracing).delivered, only(tracing).dropped) == (20, 0)


def test_what_the_receiver_refuses_is_counted(otlp: OtlpReceiver, setup: Setup) -> None:
    tracing = setup(otlp.http_endpoint)
    otlp.fail_next(1, 400)
    answer("refused")
    assert only(tracing) == NativeStatus(ended=3, refused=3)
    otlp.fail_next(1, 503)
    answer("retried")
    assert only(tracing) == NativeStatus(ended=6, refused=3, delivered=3)


def test_flush_and_shutdown_return_at_their_deadline(otlp: OtlpReceiver, setup: Setup) -> None:
    tracing, otlp.delay_seconds = setup(otlp.http_endpoint), 3
    answer("q")
    started = time.monotonic()
    assert only(tracing, 0.2).pending == 3
    (status,) = tracing.shutdown(0.2).values()
    assert status.pending == 3 and time.monotonic() - started < 2.5
    otlp.delay_seconds = 0


def test_after_the_shutdown_spans_are_counted_as_dropped(otlp: OtlpReceiver, setup: Setup) -> None:
    tracing = setup(otlp.http_endpoint)
    answer("before")
    (status,) = tracing.shutdown().values()
    assert status.delivered == 3
    answer("after")
    (status,) = tracing.status().values()
    assert (status.ended, status.delivered, status.dropped, status.pending) == (6, 3, 3, 0)


def test_a_collector_that_comes_back_gets_what_waited(otlp: OtlpReceiver, setup: Setup) -> None:
    port = free_port()
    tracing = setup(f"http://127.0.0.1:{port}")
    answer("down")
    sender = threading.Thread(target=tracing.flush)
    sender.start()
    with relay(port, otlp.http_endpoint):
        sender.join()
        assert only(tracing).delivered == 3


def test_one_dead_destination_does_not_hold_the_other(otlp: OtlpReceiver, setup: Setup) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    tracing = setup(dead, collector=otlp.http_endpoint)
    answer("q")
    statuses = tracing.flush(0.5)
    assert statuses[dead].pending == 3
    assert statuses[otlp.http_endpoint.removesuffix("/v1/traces")].delivered == 3


# ---- fork とプロセスの終わり


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork のない OS")
def test_a_fork_neither_loses_nor_doubles_spans(
    otlp: OtlpReceiver, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """待っているもの、開いているもの、つながったままの接続があるときに fork する。"""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    connections, accept = list[Any](), otlp._http.process_request  # type: ignore[union-attr]
    monkeypatch.setattr(
        otlp._http, "process_request", lambda *of: (connections.append(of), accept(*of))
    )
    tracing = setup(otlp.http_endpoint)
    answer("first")
    assert only(tracing).delivered == 3
    answer("waiting")
    process = None
    with traced(name="open"):
        child = os.fork()
        if child == 0:
            with traced(name="in child"):
                pass
    if child == 0:
        status = only(tracing)
        process = (status.ended, status.delivered) == (1, 1)
        os._exit(0 if process else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert only(tracing).delivered == 7
    assert len(connections) == 2  # 親と子で、別の接続
    ids = [span.span_id for span in otlp.spans]
    assert len(ids) == len(set(ids)) == 8
    spans = by_name(otlp)
    assert spans["in child"].parent_span_id == spans["open"].span_id


def test_a_clock_that_is_set_back_after_a_fork_hides_no_span(
    otlp: OtlpReceiver, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracing = setup(otlp.http_endpoint)
    with traced(name="of the parent"):
        for destination in tracing._destinations.values():
            destination._restart_in_child()  # fork した子の中と同じ
        now = time.time_ns
        monkeypatch.setattr("opentelemetry.sdk.trace.time_ns", lambda: now() - 60 * 10**9)
    answer("q")
    status = only(tracing)
    assert (status.ended, status.delivered) == (3, 3)
    assert not any(one._open for one in tracing._destinations.values())


def _work(number: int) -> int:
    answer(f"q{number}")
    (status,) = _work.tracing.flush().values()  # type: ignore[attr-defined]
    return int(status.delivered)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork のない OS")
def test_children_of_multiprocessing_flush_their_own(otlp: OtlpReceiver, setup: Setup) -> None:
    _work.tracing = setup(otlp.http_endpoint)  # type: ignore[attr-defined]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.map(_work, range(6), chunksize=1)
    assert len(otlp.spans) == 18 and len({span.trace_id for span in otlp.spans}) == 6


def test_the_end_of_the_process_sends_what_waits(otlp: OtlpReceiver) -> None:
    program = f"""
from chapter8_samples.opentelemetry import setup_native_tracing, traced
setup_native_tracing({otlp.http_endpoint!r}, None, "bot")
with traced(name="last"):
    pass
"""
    run = run_as_reader(["-c", program], ROOT, environment={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    assert [span.name for span in otlp.spans] == ["last"]


def test_it_needs_neither_mlflow_nor_pydantic(otlp: OtlpReceiver) -> None:
    program = f"""
import sys
sys.modules.update(dict.fromkeys(["mlflow", "pydantic"]))  # import すると失敗する
from chapter8_samples.opentelemetry import setup_native_tracing, traced
tracing = setup_native_tracing({otlp.http_endpoint!r}, None, "bot")
traced()(lambda q: q)("q")
print([one.delivered for one in tracing.shutdown().values()])
"""
    run = run_as_reader(["-c", program], ROOT, environment={"PYTHONPATH": str(ROOT)})
    assert run.stdout == "[1]\n", run.stderr


# ---- 値の誤り


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("http://h", None, ""), {}, "service_name='', sampling"),
        (
            ("http://h", None, "s"),
            {"sampling_ratio": 1.5},
            "sampling_ratio=1.5, max_queue_spans=4096: write a name, a",
        ),
        (("http://h", None, "s"), {"max_queue_spans": 0}, "max_queue_spans=0: write"),
        (("h:4318", None, "s"), {}, "endpoint 'h:4318' is wrong; write http://HOST:PORT"),
        (("databricks", "e", "s"), {}, "endpoint 'databricks' is wrong"),
        (("http://h", None, "s"), {"collector": "h"}, "endpoint 'h' is wrong"),
    ],
)
def test_a_wrong_value_is_one_clear_error(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        setup_native_tracing(*arguments, **options)


@pytest.mark.parametrize(
    "url", ["http://user:sk-secret@h", "http://h/v1/traces?key=sk-secret", "http://h#sk-secret"]
)
def test_keys_in_the_endpoint_are_refused_and_not_printed(url: str) -> None:
    with pytest.raises(ValueError, match="is wrong; write http://HOST:PORT, and keys in") as raised:
        setup_native_tracing(url, None, "bot")
    assert "sk-secret" not in str(raised.value)


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer\nsk-secret"}])
def test_a_server_that_cannot_be_asked_is_named_without_the_key(headers: Any) -> None:
    server = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionError) as raised:
        setup_native_tracing(server, "shop", "bot", headers=headers)
    assert f"experiment 'shop' cannot be used at {server}" in str(raised.value)
    assert "sk-secret" not in "".join(traceback.format_exception(raised.value))


def test_a_collector_given_as_a_server_is_told(otlp: OtlpReceiver) -> None:
    with pytest.raises(ConnectionError, match="pass experiment=None for a Collector"):
        setup_native_tracing(otlp.http_endpoint, "shop", "bot")


def test_the_settings_of_the_platform_are_kept(
    otlp: OtlpReceiver, setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=prod")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "x-collector-key=abc")
    tracing = setup(otlp.http_endpoint, headers={"x-key": "sk-1\n"})  # ファイルから読んだ鍵
    answer("q")
    assert only(tracing).delivered == 3
    sent = otlp.requests[0].headers
    assert (sent["x-key"], sent.get("x-collector-key", "abc")) == ("sk-1", "abc")
    assert otlp.spans[0].resource["deployment.environment.name"] == "prod"
