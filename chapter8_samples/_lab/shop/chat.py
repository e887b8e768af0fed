"""お客様窓口のチャット画面。答えを届いた順に流し、👍/👎 をそのトレースに記録する。"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from importlib.resources import files
from queue import Queue

import mlflow
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from openai import APIConnectionError
from pydantic import BaseModel, ConfigDict, Field

from chapter8_samples.production_tracing import RequestContext, request_scope
from chapter8_samples.quality_monitoring import create_feedback_router

from .support_bot import SupportBot

VERSION = "1.4.0"
USER_ID = "web-user"  # 本番ではログイン情報から決める
PAGES = {
    "/": ("chat.html", "text/html"),
    "/chat.css": ("chat.css", "text/css"),
    "/chat.js": ("chat.js", "text/javascript"),
}
HEADERS = {
    # 外の部品も、ページに埋め込まれたスクリプトも動かさない
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'",
    "Cache-Control": "no-store",
}
NO_LLM = "LLM につながりません。端末で serve を止め、もう一度起動してください。"
NO_ANSWER = "答えを作れませんでした。もう一度送ってください。"


class Ask(BaseModel):
    """質問。"""

    model_config = ConfigDict(str_strip_whitespace=True)
    question: str = Field(min_length=1, max_length=500)
    session_id: str = Field(min_length=1, max_length=100)


def create_app(
    bot: SupportBot,
    *,
    panel: APIRouter | None = None,
    trace_url: Callable[[str], str] = lambda _: "",
) -> FastAPI:
    """チャットのアプリ。

    Args:
        panel: 監視パネルのエンドポイント(``create_panel_router``)。なければ、画面はパネルを隠す。
        trace_url: トレースを MLflow の UI で開く URL を作る関数。
    """
    # /docs の画面は外の CDN から部品を読むので、置かない
    app = FastAPI(title="みどり商店 お客様窓口", docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestValidationError, _refuse)

    def ask(body: Ask) -> StreamingResponse:
        return StreamingResponse(_reply(bot, body, trace_url), media_type="application/x-ndjson")

    for path, (name, media_type) in PAGES.items():
        app.add_api_route(path, _page(name, media_type))
    app.add_api_route("/ask", ask, methods=["POST"])
    app.include_router(create_feedback_router(lambda _: USER_ID))
    if panel is not None:
        app.include_router(panel)
    return app


async def _refuse(_: Request, error: Exception) -> Response:
    """422 と理由。届いた値は返さない(文字にできない値だと、応答そのものが作れない)。"""
    assert isinstance(error, RequestValidationError)
    detail = [{key: found[key] for key in ("type", "loc", "msg")} for found in error.errors()]
    return JSONResponse({"detail": detail}, status_code=422)


def _page(name: str, media_type: str) -> Callable[[], Response]:
    content = (files(__package__ or "") / "templates" / name).read_text(encoding="utf-8")
    return lambda: Response(content, media_type=media_type, headers=HEADERS)


def _reply(bot: SupportBot, body: Ask, trace_url: Callable[[str], str]) -> Iterator[str]:
    """1 行 1 件の JSON: 答えの断片を順に、最後にトレース。

    FastAPI は同期ジェネレーターの 1 歩ごとに別のコンテキストを使うので、トレースの文脈が
    途切れる。そこで、答えは 1 本のスレッドで最後まで作り、ここでは届いた順に流すだけにする。
    """
    lines: Queue[str | None] = Queue()

    def send(**fields: object) -> None:
        lines.put(json.dumps(fields, ensure_ascii=False) + "\n")

    def produce() -> None:
        try:
            _answer(bot, body, send)
            trace_id = mlflow.get_last_active_trace_id(thread_local=True) or ""
            send(trace_id=trace_id, trace_url=trace_url(trace_id))
        finally:
            lines.put(None)

    threading.Thread(target=produce, name="chat-answer", daemon=True).start()
    return iter(lines.get, None)


def _answer(bot: SupportBot, body: Ask, send: Callable[..., None]) -> None:
    context = RequestContext(user_id=USER_ID, session_id=body.session_id, service_version=VERSION)
    with request_scope(context):
        try:
            for piece in bot.stream(body.question):
                send(text=piece)
        except Exception as error:  # トレースには ERROR で残る
            send(failure=NO_LLM if isinstance(error, APIConnectionError) else NO_ANSWER)
