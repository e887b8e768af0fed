"""spans: スパンの手書きと、途中で切れるストリーミング。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import asyncio
import contextvars
import gc
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities.trace_location import MlflowExperimentLocation
from mlflow.tracing.trace_manager import InMemoryTraceManager

from chapter8_samples.production_tracing import RequestContext, request_scope
from chapter8_samples.production_tracing.spans import (
    TIME_TO_FIRST_CHUNK,
    TIME_TO_FIRST_CHUNK_MS,
    _join_text,
    atraced_stream,
    record_error,
    traced_step,
    traced_stream,
)


@pytest.fixture
def collected(collected: Any) -> Any:
    """データベースを開かずに始める(どのエクスペリメントでも同じことを見るため)。"""
    mlflow.tracing.set_destination(MlflowExperimentLocation("1"))
    return collected


@pytest.fixture
def stored(tracking_uri: str, stored: Any) -> Any:
    mlflow.set_experiment("spans")
    return stored


def nothing_is_open() -> bool:
    return not InMemoryTraceManager.get_instance()._traces


@mlflow.trace
def llm(word: str) -> str:
    return word


def words(fail: bool = False) -> Iterator[str]:
    yield llm("a")
    yield llm("b")
    if fail:
        raise OSError("broken pipe")


async def awords(fail: bool = False) -> AsyncGenerator[str, None]:
    for word in words(fail):
        await asyncio.sleep(0)
        yield word


def by_name(traces: Iterable[Any]) -> dict[str, Any]:
    return {root(trace).name: trace for trace in traces}


def root(trace: Any) -> Any:
    (span,) = [span for span in trace.data.spans if span.parent_id is None]
    return span


def describe(trace: Any) -> tuple[str, Any, Any]:
    span = root(trace)
    return str(trace.info.state), span.outputs, span.get_attribute("stream.aborted")


def tree(trace: Any) -> dict[str, list[str]]:
    """親の名前 -> 子の名前(始まった順)。"""
    names = {span.span_id: span.name for span in trace.data.spans}
    found: dict[str, list[str]] = {}
    for span in sorted(trace.data.spans, key=lambda span: span.start_time_ns):
        found.setdefault(names.get(span.parent_id, "-"), []).append(span.name)
    return found


def in_new_thread(function: Callable[[], Any]) -> Any:
    """Web サーバーのように、毎回新しいスレッドと、空の文脈で呼ぶ。"""
    results: list[Any] = []
    thread = threading.Thread(
        target=contextvars.Context().run, args=(lambda: results.append(function()),)
    )
    thread.start()
    thread.join()
    return results[0]


# ---- 途中で終わる ----


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
    traces = by_name(stored("spans"))
    assert describe(traces["full"]) == ("OK", "ab", None)
    assert describe(traces["cut"]) == describe(traces["abandoned"]) == ("OK", "a", True)
    assert describe(traces["failed"]) == ("ERROR", "ab", None)
    (event,) = root(traces["failed"]).events
    assert event.attributes["exception.message"] == "broken pipe"
    assert nothing_is_open()


def test_async_streams_and_cancellation(collected: Any) -> None:
    async def main() -> None:
        assert [word async for word in atraced_stream("full", awords())] == ["a", "b"]
        cut = atraced_stream("cut", awords())
        await anext(cut)
        await cut.aclose()
        abandoned = atraced_stream("abandoned", awords())
        await anext(abandoned)
        del abandoned
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
    assert {name: describe(trace) for name, trace in by_name(collected()).items()} == {
        "full": ("OK", "ab", None),
        "cut": ("OK", "a", True),
        "abandoned": ("OK", "a", True),
        "cancelled": ("OK", "a", True),
        "failed": ("ERROR", "ab", None),
    }
    assert nothing_is_open()


def test_a_stream_that_nobody_reads_leaves_nothing(collected: Any) -> None:
    traced_stream("never", words()).close()
    asyncio.run(atraced_stream("never", awords()).aclose())
    traced_stream("never", words())
    gc.collect()
    assert collected() == [] and nothing_is_open()


def test_a_stream_that_is_found_by_the_garbage_collector_ends(collected: Any) -> None:
    """切断のあと、例外とフレームの循環の中に残されたもの(弱い参照は、先に消されている)。"""
    cycle: list[Any] = [traced_stream("stream", words())]
    cycle.append(cycle)
    next(cycle[0])
    del cycle
    gc.collect()
    (trace,) = collected()
    assert describe(trace) == ("OK", "a", True) and nothing_is_open()


def test_chunks_that_are_no_iterable_are_an_error_of_the_stream(collected: Any) -> None:
    nothing: Any = None
    with pytest.raises(TypeError):
        list(traced_stream("stream", nothing))
    (trace,) = collected()
    assert (str(trace.info.state), root(trace).get_attribute("error.type")) == (
        "ERROR",
        "TypeError",
    )


def test_cleaning_up_happens_inside_the_stream(collected: Any) -> None:
    """切断されたとき、中身の後片付け(``finally``)も、スパンが終わる前に、その中で動く。"""

    def chunks() -> Iterator[str]:
        try:
            yield "a"
        finally:
            llm("summary of what was said")

    async def achunks() -> AsyncGenerator[str, None]:
        try:
            yield "a"
        finally:
            llm("summary of what was said")

    async def cut() -> None:
        stream = atraced_stream("stream", achunks())
        await anext(stream)
        await stream.aclose()

    stream = traced_stream("stream", chunks())
    next(stream)
    stream.close()
    asyncio.run(cut())
    assert [tree(trace) for trace in collected()] == [{"-": ["stream"], "stream": ["llm"]}] * 2
    assert nothing_is_open()


def test_a_cleanup_that_fails_is_recorded_and_raised(collected: Any) -> None:
    def chunks() -> Iterator[str]:
        try:
            yield "a"
        finally:
            raise OSError("cannot close")

    stream = traced_stream("stream", chunks())
    next(stream)
    with pytest.raises(OSError, match="cannot close"):
        stream.close()
    (trace,) = collected()
    assert describe(trace)[:2] == ("ERROR", "a") and nothing_is_open()


# ---- 親と子 ----


@pytest.mark.slow
def test_stream_is_a_child_of_the_active_trace(stored: Any) -> None:
    with mlflow.start_span("request"):
        list(traced_stream("stream", words(), join=len))
    (trace,) = stored("spans")
    assert {span.name: span.outputs for span in trace.data.spans if span.name != "llm"} == {
        "request": None,
        "stream": 2,
    }
    assert tree(trace) == {"-": ["request"], "request": ["stream"], "stream": ["llm", "llm"]}


def test_calls_inside_are_children_in_whatever_thread_they_run(collected: Any) -> None:
    stream = traced_stream("stream", words())
    assert [in_new_thread(lambda: next(stream, None)) for _ in range(3)] == ["a", "b", None]
    (trace,) = collected()
    assert tree(trace) == {"-": ["stream"], "stream": ["llm", "llm"]}


def test_calls_inside_are_children_in_whatever_task_they_run(collected: Any) -> None:
    async def main() -> None:
        stream = atraced_stream("stream", awords())
        for _ in range(2):
            await asyncio.create_task(anext(stream))  # type: ignore[arg-type]
        await asyncio.create_task(stream.aclose())  # type: ignore[arg-type]

    asyncio.run(main())
    (trace,) = collected()
    assert tree(trace) == {"-": ["stream"], "stream": ["llm", "llm"]}


def test_the_span_does_not_leak_to_whoever_reads(collected: Any) -> None:
    for _ in traced_stream("stream", words()):
        assert mlflow.get_current_active_span() is None
        llm("of the reader")
    assert [tree(trace) for trace in collected()] == [
        {"-": ["llm"]},
        {"-": ["llm"]},
        {"-": ["stream"], "stream": ["llm", "llm"]},
    ]


@pytest.mark.parametrize("threads", [False, True])
def test_a_span_held_open_over_chunks_keeps_its_children(collected: Any, threads: bool) -> None:
    def chunks() -> Iterator[str]:
        with mlflow.start_span("answer"):
            yield llm("a")
            yield llm("b")
        yield llm("c")
        yield llm("d")

    stream = traced_stream("stream", chunks())
    read: Any = in_new_thread if threads else lambda function: function()
    while read(lambda: next(stream, None)):
        assert mlflow.get_current_active_span() is None
    (trace,) = collected()
    spans = tree(trace)
    if not threads:
        assert spans["answer"] == ["llm"] * 2 and spans["stream"] == ["answer", "llm", "llm"]
    else:  # c は、閉じたばかりのスパンの下になる(別の文脈では、閉じたことが伝わらない)
        assert spans["answer"] == ["llm"] * 3 and spans["stream"] == ["answer", "llm"]


def test_stream_made_in_a_span_that_has_ended_is_its_own_trace(collected: Any) -> None:
    """``@mlflow.trace`` を付けたハンドラーが、ストリームを返す。"""

    @mlflow.trace
    def handler() -> Any:
        return traced_stream("stream", words())

    @mlflow.trace
    async def ahandler() -> Any:
        return atraced_stream("astream", awords())

    async def main() -> None:
        async for _ in await ahandler():
            pass

    list(handler())
    asyncio.run(main())
    assert sorted(root(trace).name for trace in collected()) == [
        "ahandler",
        "astream",
        "handler",
        "stream",
    ]
    assert nothing_is_open()


def test_nested_streams(collected: Any) -> None:
    def outer() -> Iterator[str]:
        for name in ("one", "two"):
            time.sleep(0.01)
            yield from traced_stream(name, words())

    list(traced_stream("outer", outer()))
    (trace,) = collected()
    assert tree(trace) == {
        "-": ["outer"],
        "outer": ["one", "two"],
        "one": ["llm", "llm"],
        "two": ["llm", "llm"],
    }


def test_nested_async_streams_that_are_cut_keep_what_was_said(collected: Any) -> None:
    async def outer() -> AsyncGenerator[str, None]:
        async for word in atraced_stream("inner", awords()):
            yield word

    async def main() -> None:
        stream = atraced_stream("outer", outer())
        await anext(stream)
        await stream.aclose()

    asyncio.run(main())
    (trace,) = collected()
    spans = {span.name: span for span in trace.data.spans}
    assert (spans["outer"].outputs, spans["inner"].outputs) == ("a", "a")
    assert spans["inner"].get_attribute("stream.aborted") is True
    assert nothing_is_open()


@pytest.mark.parametrize("threads", [False, True])
def test_the_scope_of_the_request_reaches_the_stream(collected: Any, threads: bool) -> None:
    """ストリームを読むときには、リクエストの文脈はもうない。"""
    with request_scope(RequestContext(user_id="u", session_id="s")):
        stream = traced_stream("stream", words())
    read: Any = in_new_thread if threads else lambda function: function()
    read(lambda: list(stream))
    (trace,) = collected()
    assert trace.info.trace_metadata["mlflow.trace.user"] == "u"
    assert trace.info.trace_metadata["mlflow.trace.session"] == "s"


@pytest.mark.parametrize("ratio", ["0", "1"])
def test_a_stream_follows_the_decision_of_its_trace(
    collected: Any, monkeypatch: pytest.MonkeyPatch, ratio: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", ratio)
    mlflow.tracing.reset()
    with mlflow.start_span("request"):
        assert list(traced_stream("stream", words())) == ["a", "b"]
    assert list(traced_stream("alone", words())) == ["a", "b"]
    assert len(collected()) == 2 * int(ratio) and nothing_is_open()


def test_a_stream_of_a_disabled_trace_still_streams(collected: Any) -> None:
    with mlflow.tracing.context(enabled=False):
        assert list(traced_stream("stream", words())) == ["a", "b"]
    assert collected() == []


# ---- LLM の自動トレース(本物の openai SDK) ----


def say(client: Any) -> Any:
    question: Any = [{"role": "user", "content": "返品の期限は?"}]
    return client.chat.completions.create(
        model="gpt-4o-mini",
        messages=question,
        stream=True,
        stream_options={"include_usage": True},
    )


def text_of(chunk: Any) -> str:
    return (chunk.choices[0].delta.content or "") if chunk.choices else ""


@pytest.fixture
def openai_traced(stub_llm: Any) -> Iterator[None]:
    mlflow.openai.autolog()  # type: ignore[no-untyped-call]
    yield
    mlflow.openai.autolog(disable=True)  # type: ignore[no-untyped-call]


@pytest.mark.slow
def test_tokens_of_an_llm_stream_are_on_the_trace_of_the_answer(
    openai_traced: None, collected: Any
) -> None:
    from openai import AsyncOpenAI, OpenAI

    def answer() -> Iterator[str]:
        yield from map(text_of, say(OpenAI()))

    async def aanswer() -> AsyncGenerator[str, None]:
        async for chunk in await say(AsyncOpenAI()):
            yield text_of(chunk)

    async def main() -> str:
        return "".join([word async for word in atraced_stream("stream", aanswer())])

    stream = traced_stream("stream", answer())
    spoken = [in_new_thread(lambda: "".join(stream)), asyncio.run(main())]
    traces = collected()
    assert [list(tree(trace)) for trace in traces] == [["-", "stream"]] * 2
    assert [root(trace).outputs for trace in traces] == spoken
    assert all(trace.info.token_usage["total_tokens"] > 0 for trace in traces)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["closed", "failed", "stopped"])
def test_an_llm_stream_read_halfway_does_not_keep_the_trace(
    openai_traced: None, collected: Any, how: str
) -> None:
    """MLflow は、終わらない子が 1 つでもあると、トレースを送らない。"""
    from openai import OpenAI

    def answer() -> Iterator[str]:
        for number, chunk in enumerate(say(OpenAI())):
            if number == 2 and how == "failed":
                raise OSError("no space left")
            if number == 2 and how == "stopped":
                return
            yield text_of(chunk)

    stream = traced_stream("stream", answer())
    next(stream)
    if how == "closed":
        stream.close()
    elif how == "failed":
        with pytest.raises(OSError, match="no space"):
            list(stream)
    else:
        list(stream)
    (trace,) = collected()
    (call,) = [span for span in trace.data.spans if span.parent_id is not None]
    assert call.get_attribute("stream.aborted") is True
    assert describe(trace)[2] == (True if how == "closed" else None)
    assert nothing_is_open()


def test_work_left_in_the_background_is_not_cut_short(collected: Any) -> None:
    """最後まで送ったストリームは、まだ動いている処理のスパンを終わらせない。"""
    go = threading.Event()

    @mlflow.trace
    def save() -> str:
        go.wait(10)
        return "saved"

    def chunks() -> Iterator[str]:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(save,))
        thread.start()
        threads.append(thread)
        time.sleep(0.01)
        yield "a"

    threads: list[threading.Thread] = []
    list(traced_stream("stream", chunks()))
    go.set()
    threads[0].join()
    (trace,) = collected()
    assert {span.name: span.outputs for span in trace.data.spans} == {
        "stream": "a",
        "save": "saved",
    }


# ---- 最初の断片までの時間 ----


def test_time_to_first_chunk(collected: Any) -> None:
    def slow() -> Iterator[str]:
        time.sleep(0.05)
        yield from ("a", "b")
        time.sleep(0.05)

    async def aslow() -> AsyncGenerator[str, None]:
        for word in slow():
            yield word

    async def main() -> None:
        async for _ in atraced_stream("stream", aslow()):
            pass

    list(traced_stream("stream", slow()))
    asyncio.run(main())
    list(traced_stream("empty", []))
    *streams, empty = collected()
    for trace in streams:
        seconds = root(trace).get_attribute(TIME_TO_FIRST_CHUNK)
        assert 0.05 <= seconds < trace.info.execution_duration / 1000 - 0.04
        assert trace.info.trace_metadata[TIME_TO_FIRST_CHUNK_MS] == f"{seconds * 1000:.0f}"
    assert root(empty).get_attribute(TIME_TO_FIRST_CHUNK) is None
    assert TIME_TO_FIRST_CHUNK_MS not in empty.info.trace_metadata


def test_the_trace_keeps_the_time_of_its_first_outermost_stream(collected: Any) -> None:
    def outer() -> Iterator[str]:
        yield from list(traced_stream("inner", words()))
        time.sleep(0.03)

    def delayed() -> Iterator[str]:
        time.sleep(0.03)
        yield from outer()

    with mlflow.start_span("request"):
        list(traced_stream("first", delayed()))
        list(traced_stream("second", outer()))
    (trace,) = collected()
    seconds = {span.name: span.get_attribute(TIME_TO_FIRST_CHUNK) for span in trace.data.spans}
    wanted = f"{seconds['first'] * 1000:.0f}"
    assert trace.info.trace_metadata[TIME_TO_FIRST_CHUNK_MS] == wanted
    assert {name for name, value in seconds.items() if value} == {"first", "second", "inner"}


# ---- 出力 ----


def test_join_that_fails_breaks_neither_the_stream_nor_the_trace(
    collected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def join(chunks: list[Any]) -> str:
        return "".join(chunk["text"] for chunk in chunks)

    assert list(traced_stream("stream", words(), join=join)) == ["a", "b"]
    (trace,) = collected()
    assert describe(trace) == ("OK", ["a", "b"], None)
    assert "join of 'stream' failed (TypeError)" in caplog.text
    assert nothing_is_open()


@pytest.mark.parametrize("join", [None, list, repr])
def test_half_an_emoji_does_not_lose_the_trace(stored: Any, join: Any) -> None:
    pieces = ["\ud83d", "\ude00", "b\ude00", "\ud83d"]
    options = {} if join is None else {"join": join}
    assert list(traced_stream("stream", pieces, inputs="\ud83d", **options)) == pieces
    (trace,) = stored("spans")
    output = root(trace).outputs
    assert root(trace).inputs == "\ufffd"
    assert output == {None: "😀b\ufffd\ufffd", list: ["\ufffd", "\ufffd", "b\ufffd", "\ufffd"]}.get(
        join, output
    )


@given(st.lists(st.text(st.characters(codec=None), max_size=3)))
def test_joined_text_can_always_be_stored(pieces: list[str]) -> None:
    joined = _join_text(pieces)
    joined.encode("utf-8")
    if all(not "\ud800" <= character <= "\udfff" for piece in pieces for character in piece):
        assert joined == "".join(pieces)


def test_pieces_of_bytes_are_recorded_as_their_text(stored: Any) -> None:
    """Flask や SSE の本体は、バイト列で送ることが多い。文字の途中で分かれてもよい。"""
    answer = "返品は 14 日以内です".encode()
    pieces = [answer[place : place + 4] for place in range(0, len(answer), 4)]
    assert list(traced_stream("stream", pieces)) == pieces
    assert root(stored("spans")[0]).outputs == answer.decode()


@pytest.mark.slow
def test_fastapi_client_that_disconnects(stored: Any) -> None:
    """応答の途中で切断されても、トレースは 1 件保存される。"""
    from starlette.responses import StreamingResponse

    async def main(body: Any) -> None:
        sent: list[dict[str, Any]] = []

        async def send(message: Any) -> None:
            if sent and sent[-1].get("body"):
                raise OSError("client disconnected")
            sent.append(message)

        async def receive() -> Any:
            await asyncio.sleep(1000)

        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        with pytest.raises(Exception):  # noqa: B017
            await StreamingResponse(body)(scope, receive, send)

    asyncio.run(main(atraced_stream("chat", awords())))
    asyncio.run(main(traced_stream("chat", words())))
    while not nothing_is_open():  # 読んでいたスレッドが手放してから、片付けられる
        gc.collect()
        mlflow.flush_trace_async_logging()
    wanted = {"-": ["chat"], "chat": ["llm", "llm"]}
    assert [tree(trace) for trace in stored("spans")] == [wanted, wanted]
    assert nothing_is_open()


# ---- 手書きのスパン ----


def test_steps_attributes_and_errors(collected: Any) -> None:
    with pytest.raises(ConnectionResetError), traced_step("a", span_type="LLM", inputs={"q": 1}):
        raise ConnectionResetError("reset")
    with traced_step("b", attributes={"retrieval.top_k": 3}) as span:
        record_error(span, KeyError("k"), fallback="cache")
    found = by_name(collected())
    a, b = root(found["a"]), root(found["b"])
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
