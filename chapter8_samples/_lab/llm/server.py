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
from typing import Annotated, Any, cast

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from starlette.exceptions import HTTPException

from . import answers, judge
from .text import count_tokens, prompt_tokens, system_text
from .wire import ChatBody, EmbeddingsBody, InvalidRequestError, read_body

__all__ = ["Faults", "StubLlm", "listen"]

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


Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class Faults:
    """注入する障害。割合は 0 から 1、時間は秒。

    `error_rate` は HTTP 500、`rate_limit_rate` は Retry-After 付きの 429 にする割合で、
    届いた順に均等に割り当てる(0.25 なら 4 件ごとに 1 件)。`bad_release=True` は、
    プロンプトによらず参考資料にない長い答えを返す。
    """

    latency_seconds: Seconds = 0.0
    error_rate: Share = 0.0
    rate_limit_rate: Share = 0.0
    retry_after_seconds: Seconds = 1.0
    bad_release: bool = False


class _Share:
    """`rate` の割合だけ True を、均等な間隔で返す。"""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._count = 0

    def take(self) -> bool:
        self._count += 1
        return math.floor(self._count * self._rate) > math.floor((self._count - 1) * self._rate)


class StubLlm:
    """スタブのサーバー 1 つ。`with StubLlm() as llm:` の間だけ `llm.base_url` で答える。

    Attributes:
        requests: 受け取った本文(障害として失敗させたものも含む)。古い順。
    """

    def __init__(self, *, port: int = 0) -> None:
        self.requests: list[dict[str, Any]] = []
        self._port = port
        self._lock = threading.Lock()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self.set_faults()

    @property
    def base_url(self) -> str:
        """`http://127.0.0.1:PORT/v1`。起動前は RuntimeError。"""
        if self._server is None:
            raise RuntimeError("StubLlm is not running; use it in a with statement")
        return f"http://127.0.0.1:{self._port}/v1"

    @property
    def faults(self) -> Faults:
        """いま注入している障害。"""
        return self._faults

    def set_faults(self, **faults: Any) -> Faults:
        """障害を設定し直す。挙げなかったものは既定値に戻る(引数なしなら障害なし)。

        Raises:
            ValueError: 知らない名前か、範囲の外の値。
        """
        new = Faults(**faults)
        with self._lock:
            self._faults = new
            self._errors = _Share(new.error_rate)
            self._rate_limits = _Share(new.rate_limit_rate)
        return new

    def start(self) -> StubLlm:
        """待ち受けを始める(スレッド 1 本)。"""
        if self._server is None:
            listener = listen(self._port)
            self._port = int(listener.getsockname()[1])
            self._server = _uvicorn_server(create_app(self))
            self._thread = _serve(self._server, listener)
        return self

    def stop(self) -> None:
        """ポートを閉じ、スレッドの終わりを待つ。何度呼んでもよい。"""
        server, self._server = self._server, None
        if server is not None and self._thread is not None:
            server.should_exit = True
            self._thread.join(5)

    def __enter__(self) -> StubLlm:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def admit(self, body: dict[str, Any]) -> Response | None:
        """本文を記録し、障害に当たれば 429 か 500 の応答を返す(HTTP の処理から呼ばれる)。"""
        with self._lock:
            self.requests.append(body)
            faults = self._faults
            limited, failed = self._rate_limits.take(), self._errors.take()
        if limited:
            headers = {"Retry-After": f"{faults.retry_after_seconds:g}"}
            return _error(429, "Rate limit reached (injected)", "rate_limit_exceeded", headers)
        return _error(500, "The server had an error (injected)", "server_error") if failed else None


def create_app(stub: StubLlm) -> FastAPI:
    """OpenAI 互換のエンドポイントを持つアプリ。"""
    app = FastAPI(title="stub-llm", openapi_url=None)

    async def chat(request: Request) -> Response:
        body = await read_body(request, ChatBody)
        refused = stub.admit(body)
        await asyncio.sleep(stub.faults.latency_seconds)
        return refused or await _chat_response(body, bad_release=stub.faults.bad_release)

    async def embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingsBody)
        return stub.admit(body) or JSONResponse(_embeddings(body))

    async def models() -> dict[str, Any]:
        names = [*SNAPSHOTS, *SNAPSHOTS.values()]
        data = [{"id": n, "object": "model", "created": 0, "owned_by": "stub"} for n in names]
        return {"object": "list", "data": data}

    app.add_exception_handler(InvalidRequestError, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/embeddings", embeddings, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", models, methods=["GET"])
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


async def _refuse(request: Request, error: Exception) -> Response:
    """OpenAI と同じ形のエラー: 誤った本文は 400、ないパスは 404、違うメソッドは 405。"""
    if isinstance(error, HTTPException):
        text = f"Invalid URL ({request.method} {request.url.path})"
        return _error(error.status_code, text, "invalid_request_error")
    return _error(400, str(error), "invalid_request_error")


async def _chat_response(body: dict[str, Any], *, bad_release: bool) -> Response:
    judging = judge.is_judge(body)
    calls = judge.tool_calls(body)
    text = ""
    if not calls:
        text = judge.verdict(body) if judging else answers.answer(body, bad=bad_release)
    completion = _Completion(body, text, calls)
    pace = 0.0 if judging else SECONDS_PER_TOKEN
    if body.get("stream"):
        return StreamingResponse(completion.stream(pace), media_type="text/event-stream")
    await asyncio.sleep(pace * count_tokens(text))
    return JSONResponse(completion.whole())


class _Completion:
    """1 つの答えを、まとめて、または SSE の断片として表す。"""

    def __init__(self, body: dict[str, Any], text: str, tool_calls: list[dict[str, Any]]) -> None:
        model = str(body["model"])
        content = json.dumps([model, body["messages"]], ensure_ascii=False, sort_keys=True)
        self._text = text
        self._tool_calls = tool_calls
        self._finish_reason = "tool_calls" if tool_calls else "stop"
        self._usage = usage(body["messages"], text)
        options = cast(dict[str, Any], body.get("stream_options") or {})
        self._include_usage = bool(options.get("include_usage"))
        self._head = {
            "id": "chatcmpl-" + hashlib.sha256(content.encode()).hexdigest()[:24],
            "created": int(time.time()),
            "model": SNAPSHOTS.get(model, model),
            "system_fingerprint": "fp_stub",
        }

    def whole(self) -> dict[str, Any]:
        """`chat.completion` の本文。"""
        message: dict[str, Any] = {"role": "assistant", "content": self._text, "refusal": None}
        if self._tool_calls:
            message |= {"content": None, "tool_calls": self._tool_calls}
        reason = self._finish_reason
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return self._head | {
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage,
        }

    async def stream(self, pace: float) -> AsyncIterator[str]:
        """`chat.completion.chunk` を並べた SSE。1 トークンごとに `pace` 秒かける。"""
        yield self._chunk({"role": "assistant", "content": ""})
        for piece in _pieces(self._text):
            await asyncio.sleep(pace * count_tokens(piece))
            yield self._chunk({"content": piece})
        for index, call in enumerate(self._tool_calls):
            yield self._chunk({"tool_calls": [{"index": index, **call}]})
        yield self._chunk({}, finish_reason=self._finish_reason)
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


def _error(
    status: int, message: str, code: str, headers: dict[str, str] | None = None
) -> JSONResponse:
    error = {"message": message, "type": code, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


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


def _serve(server: uvicorn.Server, listener: socket.socket) -> threading.Thread:
    thread = threading.Thread(target=server.run, args=([listener],), name="stub-llm", daemon=True)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    return thread


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
