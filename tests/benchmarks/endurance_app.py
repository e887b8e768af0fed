"""``endurance.py`` が動かすアプリ: 8.1、8.3、8.5 の設定をした、お客様窓口の HTTP サーバー。

    python tests/benchmarks/endurance_app.py PORT HOME OTLP_ENDPOINT OTLP_TIMEOUT_SECONDS

SIGTERM を受けると、処理中の要求に答え終えてから送信待ちを書き出し、``HOME/reports`` に、届いた数と
失った数を書いて終わる。
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import mlflow
import openai
import uvicorn
from fastapi import FastAPI, Response

from chapter8_samples._lab.shop.support_bot import GOOD_PROMPT, Prompt, SupportBot
from chapter8_samples.opentelemetry import flush_all, setup_otlp_export
from chapter8_samples.production_tracing import (
    RequestContext,
    request_scope,
    setup_production_tracing,
    tracing_lifespan,
)
from chapter8_samples.production_tracing.delivery.counts import LEDGER
from chapter8_samples.production_tracing.delivery.spool import TraceSpool
from chapter8_samples.quality_monitoring import FeedbackOutbox, create_feedback_router

logger = logging.getLogger(__name__)


class SupportApp:
    """アプリ 1 つと、その送信待ち。"""

    def __init__(self, home: Path, endpoint: str, timeout_seconds: float) -> None:
        self.home = home
        os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = "5"
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
        setup_production_tracing("endurance", strict=True)
        setup_otlp_export(endpoint, "support-bot", timeout_seconds=timeout_seconds)
        mlflow.openai.autolog()  # type: ignore[no-untyped-call]
        self.spool = TraceSpool(home / "spool", cooldown_seconds=1).install()
        self.outbox = FeedbackOutbox(home / "outbox.db")
        client = openai.OpenAI(max_retries=0)
        self.bot = SupportBot(client, prompt=lambda: Prompt("1", GOOD_PROMPT))

    def ask(self, question: str, response: Response) -> dict[str, Any]:
        """質問 1 件。LLM の失敗は 502 で答える。どちらもトレースの ID を返す。"""
        with request_scope(RequestContext(user_id="user-1", session_id="s-1")):
            try:
                answer = self.bot.answer(question)
            except openai.APIError as error:
                response.status_code, answer = 502, type(error).__name__
            trace_id = mlflow.get_last_active_trace_id(thread_local=True)
        return {"answer": answer, "trace_id": trace_id}

    def replay_forever(self) -> None:
        """届かなかった評価を、背後で送り直す。"""
        while True:
            time.sleep(2)
            try:
                if len(self.outbox):
                    self.outbox.replay(timeout_seconds=3)
            except OSError as error:  # ディスクが満杯の間
                logger.warning("the outbox cannot be written: %s", error)

    def finish(self) -> None:
        """書き出して、結果を残す。"""
        left = self.spool.drain(5)
        report = flush_all(15)
        counts = {
            "accepted": report.accepted,
            "delivered": report.delivered,
            "lost": report.lost,
            "spool": {**self.spool.stats()._asdict(), "dropped": LEDGER.counts()[1]},
            "kept_on_disk": left,
            "feedback_kept": len(self.outbox),
        }
        folder = self.home / "reports"
        folder.mkdir(exist_ok=True)
        (folder / f"{time.time_ns()}.json").write_text(json.dumps(counts), encoding="utf-8")

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """要求に答え終えてから書き出す。"""
        threading.Thread(target=self.replay_forever, daemon=True).start()
        async with tracing_lifespan(app):
            yield
        await asyncio.to_thread(self.finish)


def main() -> None:
    """SIGTERM まで応答する。"""
    port, home, endpoint, timeout_seconds = sys.argv[1:]
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    support = SupportApp(Path(home), endpoint, float(timeout_seconds))
    app = FastAPI(lifespan=support.lifespan)
    app.get("/ask")(support.ask)
    app.get("/health")(lambda: os.getpid())
    app.include_router(create_feedback_router(lambda _: "user-1", outbox=support.outbox))
    uvicorn.run(app, port=int(port), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
