"""OpenAI 互換のスタブ LLM。本物の openai SDK と MLflow のジャッジが、API キーなしで話せる相手。

同じ内容のリクエストにはいつも同じ答えを返す。答えの作り方は `answers`、採点は
`judge` にある。単独でも動く::

    $ python -m chapter8_samples._lab.llm.server --port 5181
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from . import answers, judge
from .text import count_tokens, prompt_tokens, system_text

SECONDS_PER_TOKEN = 0.002
CACHE_BLOCK_TOKENS = 128
SNAPSHOTS = {
    "gpt-4o": "gpt-4o-2024-08-06",
    "gpt-4o-mini": "gpt-4o-mini-2024-07-18",
    "gpt-4.1": "gpt-4.1-2025-04-14",
    "gpt-4.1-mini": "gpt-4.1-mini-2025-04-14",
    "gpt-4.1-nano": "gpt-4.1-nano-2025-04-14",
}
"""別名と、応答に入る日付付きの名前。表にない名前はそのまま返す。"""


@dataclass(frozen=True)
class Faults:
    """注入する障害。

    Attributes:
        latency_seconds: 答えを遅らせる秒数。
        error_rate: HTTP 500 にする割合。届いた順に均等に割り当てる(0.25 なら 4 件ごとに 1 件)。
        bad_release: プロンプトによらず、参考資料にない長い答えを返す。
    """

    latency_seconds: float = 0.0
    error_rate: float = 0.0
    bad_release: bool = False


class StubLlm:
    """スタブのサーバー 1 つ。`with StubLlm() as llm:` の間だけ `llm.base_url` で答える。

    Attributes:
        base_url: `http://127.0.0.1:PORT/v1`。
        requests: 受け取った本文(障害として失敗させたものも含む)。古い順。
        faults: 注入している障害。
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.set_faults()

    def set_faults(self, **faults: Any) -> None:
        """障害を設定し直す。挙げなかったものは既定値に戻る(引数なしなら障害なし)。"""
        self.faults = Faults(**faults)
        self._count = 0

    def __enter__(self) -> StubLlm:
        listener = listen(0)
        self.base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        self._server = _uvicorn_server(create_app(self))
        self._thread = threading.Thread(
            target=self._server.run, args=([listener],), name="stub-llm", daemon=True
        )
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.005)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(5)

    def admit(self, body: dict[str, Any]) -> Response | None:
        """本文を記録し、障害に当たれば 500 の応答を返す(HTTP の処理から呼ばれる)。"""
        self.requests.append(body)
        self._count += 1
        rate = self.faults.error_rate
        if math.floor(self._count * rate) == math.floor((self._count - 1) * rate):
            return None
        error = {"message": "The server had an error (injected)", "type": "server_error"}
        return JSONResponse({"error": error}, status_code=500)


def create_app(stub: StubLlm) -> FastAPI:
    """OpenAI 互換のエンドポイントを持つアプリ。"""
    app = FastAPI(title="stub-llm", openapi_url=None)

    async def chat(request: Request) -> Response:
        body = await request.json()
        failed = stub.admit(body)
        await asyncio.sleep(stub.faults.latency_seconds)
        return failed or await _chat_response(body, bad_release=stub.faults.bad_release)

    async def embeddings(request: Request) -> Response:
        body = await request.json()
        return stub.admit(body) or JSONResponse(_embeddings(body))

    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/embeddings", embeddings, methods=["POST"], response_model=None)
    return app


def _embeddings(body: dict[str, Any]) -> dict[str, Any]:
    """トークン数だけが本物らしい答え(ベクトルはどれも同じ)。"""
    given: str | list[str] = body["input"]
    texts = [given] if isinstance(given, str) else given
    vector = {"object": "embedding", "embedding": [1.0]}
    tokens = sum(map(count_tokens, texts))
    return {
        "object": "list",
        "data": [{**vector, "index": index} for index in range(len(texts))],
        "model": body["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _chat_response(body: dict[str, Any], *, bad_release: bool) -> Response:
    if judge.is_judge(body):
        return JSONResponse(_Completion(body, judge.verdict(body)).whole())
    completion = _Completion(body, answers.answer(body, bad=bad_release))
    if body.get("stream"):
        return StreamingResponse(completion.stream(), media_type="text/event-stream")
    await asyncio.sleep(SECONDS_PER_TOKEN * count_tokens(completion.text))
    return JSONResponse(completion.whole())


class _Completion:
    """1 つの答えを、まとめて、または SSE の断片として表す。"""

    def __init__(self, body: dict[str, Any], text: str) -> None:
        model = str(body["model"])
        content = json.dumps([model, body["messages"]], ensure_ascii=False, sort_keys=True)
        self.text = text
        self._usage = usage(body["messages"], text)
        self._include_usage = (body.get("stream_options") or {}).get("include_usage")
        self._head = {
            "id": "chatcmpl-" + hashlib.sha256(content.encode()).hexdigest()[:24],
            "created": int(time.time()),
            "model": SNAPSHOTS.get(model, model),
            "system_fingerprint": "fp_stub",
        }

    def whole(self) -> dict[str, Any]:
        """`chat.completion` の本文。"""
        message = {"role": "assistant", "content": self.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        more = {"object": "chat.completion", "choices": [choice], "usage": self._usage}
        return self._head | more

    async def stream(self) -> AsyncIterator[str]:
        """`chat.completion.chunk` を並べた SSE。1 トークンごとに `SECONDS_PER_TOKEN` 秒かける。"""
        yield self._chunk({"role": "assistant", "content": ""})
        for piece in _pieces(self.text):
            await asyncio.sleep(SECONDS_PER_TOKEN * count_tokens(piece))
            yield self._chunk({"content": piece})
        yield self._chunk({}, finish_reason="stop")
        if self._include_usage:
            yield self._event({"choices": [], "usage": self._usage})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._event({"choices": [choice]})

    def _event(self, fields: dict[str, Any]) -> str:
        chunk = self._head | {"object": "chat.completion.chunk"} | fields
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def usage(messages: list[dict[str, Any]], text: str) -> dict[str, Any]:
    """トークン数。`cached_tokens` はシステムメッセージの分を 128 の倍数に切り捨てたもの。

    本物のキャッシュは直前までの履歴で決まるが、ここでは内容だけで決まるようにしている。
    """
    prompt, completion = prompt_tokens(messages), count_tokens(text)
    system = system_text(messages)
    system_tokens = count_tokens(system) if system else 0
    cached = system_tokens // CACHE_BLOCK_TOKENS * CACHE_BLOCK_TOKENS
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def _pieces(text: str, size: int = 6) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def listen(port: int) -> socket.socket:
    """ループバックの ``port``(0 なら空いている番号)に結び付けたソケット。"""
    # asyncio は、プロトコルが明示された TCP にだけ NODELAY を付ける。なければ 1 往復に 40 ms かかる
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    if sys.platform != "win32":  # Windows では、使用中のポートにも結び付いてしまう
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


def _uvicorn_server(app: FastAPI) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
        )
    )


def main() -> None:
    """コマンドラインから単独で動かす(Ctrl-C で終わる)。"""
    parser = argparse.ArgumentParser(description="OpenAI 互換のスタブ LLM")
    parser.add_argument("--port", type=int, default=5181)
    arguments = parser.parse_args()
    listener = listen(arguments.port)
    print(f"OPENAI_BASE_URL=http://127.0.0.1:{listener.getsockname()[1]}/v1", flush=True)
    _uvicorn_server(create_app(StubLlm())).run([listener])


if __name__ == "__main__":
    main()
