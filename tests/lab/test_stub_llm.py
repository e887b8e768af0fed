"""本物の openai SDK(同期、非同期、ストリーム、再試行)がスタブ LLM と話せること。"""

from __future__ import annotations

import asyncio
import math
import socket
import subprocess
import sys
import time
from typing import Any

import openai
import pytest
import requests
from openai import AsyncOpenAI, OpenAI

from chapter8_samples._lab.llm.answers import NOT_FOUND
from chapter8_samples._lab.llm.server import Faults, StubLlm
from chapter8_samples._lab.llm.text import count_tokens

DOCUMENTS = """<documents>
返品は商品の到着から14日以内に受け付けます。返品の送料はお客様のご負担です。
送料は全国一律で550円です。5,000円以上のご注文なら無料です。
</documents>

質問: """
GOOD = "参考資料だけを使い、短く答えてください。"
BAD = "できるだけ詳しく、長く答えてください。"


def ask(system: str, question: str = "返品は何日以内ですか?") -> list[Any]:
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": DOCUMENTS + question},
    ]


@pytest.fixture(scope="module")
def sdk(_stub_llm_server: StubLlm) -> OpenAI:
    return OpenAI(base_url=_stub_llm_server.base_url, api_key="sk-local-stub", max_retries=0)


@pytest.fixture
def client(sdk: OpenAI, stub_llm: StubLlm) -> OpenAI:
    """共有のクライアント。障害の設定と記録は、テストごとに空から始まる。"""
    return sdk


def test_good_prompt_quotes_the_nearest_sentences(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="gpt-4o-mini", messages=ask(GOOD))
    assert reply.choices[0].message.content == (
        "返品は商品の到着から14日以内に受け付けます。返品の送料はお客様のご負担です。"
    )
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_bad_prompt_invents_about_four_times_as_much(client: OpenAI) -> None:
    good = client.chat.completions.create(model="gpt-4o-mini", messages=ask(GOOD))
    bad = client.chat.completions.create(model="gpt-4o-mini", messages=ask(BAD))
    assert good.usage is not None and bad.usage is not None
    assert 3.5 <= bad.usage.completion_tokens / good.usage.completion_tokens <= 5
    assert "14日" not in str(bad.choices[0].message.content)


@pytest.mark.slow
def test_answers_depend_on_content_alone(client: OpenAI) -> None:
    first = client.chat.completions.create(model="gpt-4o", messages=ask(BAD))
    client.chat.completions.create(model="gpt-4o", messages=ask(GOOD, "送料はいくらですか?"))
    again = client.chat.completions.create(model="gpt-4o", messages=ask(BAD))
    assert first.model_dump(exclude={"created"}) == again.model_dump(exclude={"created"})


def test_nothing_near_the_question_is_said_so(client: OpenAI) -> None:
    reply = client.chat.completions.create(model="gpt-4o", messages=ask(GOOD, "量子力学とは?"))
    assert reply.choices[0].message.content == NOT_FOUND


@pytest.mark.slow
def test_model_is_echoed_as_a_dated_snapshot(client: OpenAI) -> None:
    for asked, echoed in {
        "gpt-4o": "gpt-4o-2024-08-06",
        "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
        "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
        "my-own-model": "my-own-model",
    }.items():
        reply = client.chat.completions.create(
            model=asked, messages=[{"role": "user", "content": "こんにちは"}]
        )
        assert reply.model == echoed


def test_token_rule() -> None:
    for text, tokens in {
        "": 1,
        "a": 1,
        "abcd": 1,
        "abcde": 2,
        "あいう": 2,
        "あ" * 300: 200,
    }.items():
        assert count_tokens(text) == tokens, text


@pytest.mark.slow
def test_cached_tokens_are_the_system_message_in_blocks(client: OpenAI) -> None:
    for characters, cached in ((0, 0), (190, 0), (192, 128), (600, 384)):
        messages: list[Any] = [{"role": "user", "content": "こんにちは"}]
        if characters:
            messages.insert(0, {"role": "system", "content": "あ" * characters})
        usage = client.chat.completions.create(model="gpt-4o", messages=messages).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.prompt_tokens_details.cached_tokens == cached <= usage.prompt_tokens
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.completion_tokens_details is not None
        assert usage.completion_tokens_details.reasoning_tokens == 0


def test_stream_carries_the_same_text_and_usage_only_when_asked(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="gpt-4o", messages=ask(GOOD))
    chunks = list(
        client.chat.completions.create(
            model="gpt-4o",
            messages=ask(GOOD),
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and chunks[-1].choices == []
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert len({c.id for c in chunks}) == 1
    plain = list(client.chat.completions.create(model="gpt-4o", messages=ask(GOOD), stream=True))
    assert all(c.usage is None and c.choices for c in plain)


def test_tool_calls_are_streamed_too(client: OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "get_root_span", "parameters": {}}}
    asked: Any = {"model": "gpt-4o", "messages": ask(GOOD), "tools": [tool]}
    whole = client.chat.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**asked, stream=True)]
    (call,) = (call for choice in chunks for call in choice.delta.tool_calls or [])
    assert call.function is not None and call.function.name == "get_root_span"
    assert whole.finish_reason == chunks[-1].finish_reason == "tool_calls"


def test_client_may_leave_in_the_middle_of_a_stream(client: OpenAI) -> None:
    for _ in range(3):
        stream = client.chat.completions.create(model="gpt-4o", messages=ask(BAD), stream=True)
        next(iter(stream))
        stream.close()
    reply = client.chat.completions.create(model="gpt-4o", messages=ask(GOOD))
    assert reply.choices[0].message.content


@pytest.mark.slow
def test_async_client_and_concurrency(stub_llm: StubLlm) -> None:
    async def run() -> list[str | None]:
        async with AsyncOpenAI() as client:
            replies = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model="gpt-4o", messages=[{"role": "user", "content": f"質問{n}"}]
                    )
                    for n in range(20)
                )
            )
        return [reply.choices[0].message.content for reply in replies]

    answers = asyncio.run(run())
    assert [f"質問{n}" in str(a) for n, a in enumerate(answers)] == [True] * 20


@pytest.mark.slow
def test_long_answers_really_take_longer(client: OpenAI) -> None:
    started = time.monotonic()
    reply = client.chat.completions.create(model="gpt-4o", messages=ask(BAD))
    assert reply.usage is not None
    assert time.monotonic() - started >= reply.usage.completion_tokens * 0.002


def test_keep_alive_has_no_delayed_ack_pause(stub_llm: StubLlm) -> None:
    times: list[float] = []
    with requests.Session() as session:
        for _ in range(30):
            started = time.monotonic()
            session.get(f"{stub_llm.base_url}/models")
            times.append(time.monotonic() - started)
    assert sorted(times)[9] < 0.035  # 遅延 ACK は、ほとんどの回で 40 ms。混んだ機械はときどき遅い


def test_requests_are_recorded_oldest_first(client: OpenAI, stub_llm: StubLlm) -> None:
    client.chat.completions.create(model="gpt-4o", messages=ask(GOOD), temperature=0.2)
    client.chat.completions.create(model="gpt-4o-mini", messages=ask(BAD))
    assert [sorted(r) for r in stub_llm.requests] == [
        ["messages", "model", "temperature"],
        ["messages", "model"],
    ]
    assert stub_llm.requests[0]["messages"] == ask(GOOD)


def test_embeddings_count_their_tokens(client: OpenAI) -> None:
    texts = ["返品の送料はいくらですか", "二段階認証を設定したい"]
    reply = client.embeddings.create(model="text-embedding-3-small", input=texts)
    assert [item.index for item in reply.data] == [0, 1]
    assert reply.usage.prompt_tokens == sum(count_tokens(text) for text in texts)
    with pytest.raises(openai.BadRequestError, match="input"):
        client.embeddings.create(model="text-embedding-3-small", input=[])


def test_models_are_listed(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert {"gpt-4o", "gpt-4o-2024-08-06"} <= set(names)


HELLO = {"model": "gpt-4o", "messages": [{"role": "user", "content": "こんにちは"}]}
RING = {"$ref": "#/$defs/A", "$defs": {"A": {"$ref": "#/$defs/A"}}}


def refused(reply: requests.Response) -> str:
    """OpenAI と同じ形の 400 の文面。"""
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    return str(error["message"])


def test_malformed_requests_are_refused(stub_llm: StubLlm) -> None:
    bodies: list[tuple[Any, str]] = [
        ({}, "model"),
        ({"model": "gpt-4o"}, "messages"),
        ({"messages": []}, "model"),
        ([1], "body"),
        ({**HELLO, "messages": []}, "messages"),
        ({**HELLO, "messages": ["こんにちは"]}, "messages.0"),
        ({**HELLO, "messages": [{"content": "役割がない"}]}, "messages.0.role"),
        ({**HELLO, "model": ["gpt-4o"]}, "model"),
        ({**HELLO, "stream_options": "include_usage"}, "stream_options"),
        ({**HELLO, "response_format": "json"}, "response_format"),
        ({**HELLO, "tools": [{"type": "function"}]}, "tools.0.function"),
        ({**HELLO, "messages": [{"role": "user", "content": "\ud800"}]}, "not valid JSON"),
    ]
    with requests.Session() as session:
        for body, place in bodies:
            reply = session.post(f"{stub_llm.base_url}/chat/completions", json=body, timeout=5)
            assert place in refused(reply)
        for data in (b"", b"{", b"\xff", b"[" * 100_000):
            reply = session.post(f"{stub_llm.base_url}/chat/completions", data=data, timeout=5)
            assert "not valid JSON" in refused(reply)


def test_broken_judge_schemas_are_refused(client: OpenAI) -> None:
    nobody = {"$ref": "#/$defs/Nobody"}
    for schema in (RING, nobody, {"enum": []}, {"type": 5}, {"properties": {"a": True}}):
        shape: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}
        with pytest.raises(openai.BadRequestError, match="Invalid schema for response_format"):
            client.chat.completions.create(**HELLO, response_format=shape)  # type: ignore[arg-type]


def test_other_paths_and_methods_answer_like_openai(client: OpenAI, stub_llm: StubLlm) -> None:
    with pytest.raises(openai.NotFoundError, match="Invalid URL"):
        client.moderations.create(input="こんにちは")
    reply = requests.get(f"{stub_llm.base_url}/chat/completions", timeout=5)
    assert (reply.status_code, reply.json()["error"]["type"]) == (405, "invalid_request_error")


def test_error_rate_fails_exactly_that_share(client: OpenAI, stub_llm: StubLlm) -> None:
    stub_llm.set_faults(error_rate=0.25)
    outcomes = [_outcome(client) for _ in range(20)]
    assert outcomes.count("InternalServerError") == 5
    stub_llm.set_faults(error_rate=0.25)
    assert [_outcome(client) for _ in range(20)] == outcomes


def test_rate_limit_carries_retry_after(client: OpenAI, stub_llm: StubLlm) -> None:
    stub_llm.set_faults(rate_limit_rate=1, retry_after_seconds=7)
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=ask(GOOD))
    assert caught.value.response.headers["retry-after"] == "7"
    assert caught.value.code == "rate_limit_exceeded"


@pytest.mark.slow
def test_sdk_retries_over_a_rate_limit(stub_llm: StubLlm) -> None:
    stub_llm.set_faults(rate_limit_rate=0.5, retry_after_seconds=0.01)
    client = OpenAI(max_retries=1)
    for _ in range(3):
        assert client.chat.completions.create(model="gpt-4o", messages=ask(GOOD)).choices
    assert len(stub_llm.requests) == 5  # 2 件目と 4 件目が 429 で、やり直している


@pytest.mark.slow
def test_latency_delays_the_answer(client: OpenAI, stub_llm: StubLlm) -> None:
    stub_llm.set_faults(latency_seconds=0.2)
    started = time.monotonic()
    client.chat.completions.create(**HELLO)
    assert time.monotonic() - started >= 0.2


@pytest.mark.slow
def test_bad_release_ignores_the_prompt(client: OpenAI, stub_llm: StubLlm) -> None:
    invented = client.chat.completions.create(model="gpt-4o", messages=ask(BAD))
    stub_llm.set_faults(bad_release=True)
    forced = client.chat.completions.create(model="gpt-4o", messages=ask(GOOD))
    assert forced.choices[0].message.content == invented.choices[0].message.content


def test_faults_that_make_no_sense_are_refused(stub_llm: StubLlm) -> None:
    stub_llm.set_faults(error_rate=0.5)
    faults: list[dict[str, Any]] = [
        {"eror_rate": 0.5},
        {"error_rate": 1.5},
        {"error_rate": "half"},
        {"rate_limit_rate": -0.1},
        {"latency_seconds": -1},
        {"latency_seconds": math.nan},
        {"latency_seconds": True},
        {"bad_release": 1},
    ]
    for fault in faults:
        with pytest.raises(ValueError, match=next(iter(fault))):
            stub_llm.set_faults(**fault)
        assert stub_llm.faults == Faults(error_rate=0.5)


@pytest.mark.slow
def test_stop_closes_the_port_and_start_opens_it_again() -> None:
    stub = StubLlm()
    with pytest.raises(RuntimeError, match="not running"):
        _ = stub.base_url
    with stub:
        url, port = stub.base_url, int(stub.base_url.split(":")[2].split("/")[0])
        assert requests.get(f"{url}/models", timeout=5).ok
    stub.stop()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    with stub.start():
        assert stub.base_url == url
        assert requests.get(f"{url}/models", timeout=5).ok


@pytest.mark.slow
def test_runs_alone_from_the_command_line() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "chapter8_samples._lab.llm.server", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip().removeprefix("OPENAI_BASE_URL=")
        client = OpenAI(base_url=url, api_key="x", max_retries=5)
        assert client.models.list().data
    finally:
        process.terminate()
        process.communicate(timeout=10)


def _outcome(client: OpenAI) -> str:
    try:
        client.chat.completions.create(**HELLO)
    except openai.APIStatusError as error:
        return type(error).__name__
    return "ok"
