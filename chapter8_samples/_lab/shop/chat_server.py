"""チャット画面を、本物の MLflow サーバーと、裏で動く監視と一緒に動かす。"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from chapter8_samples.alerting.metrics.source import TraceSearch
from chapter8_samples.cost_tracking import setup_cost_tracking
from chapter8_samples.production_tracing import (
    enable_autologging,
    reset_production_tracing,
    setup_production_tracing,
)

from ..llm.server import listen
from ..servers.mlflow_server import MlflowServer, MlflowServerError
from ..workbench import Lab
from .chat import VERSION, create_app
from .chat_panel import create_panel_router
from .operations import Operations
from .support_bot import SupportBot
from .traffic import Traffic

EXPERIMENT = "/production/support-bot-chat"
ENVIRONMENT = "production"


@contextlib.contextmanager
def chat_app(tracking_uri: str) -> Iterator[FastAPI]:
    """``tracking_uri`` に記録するチャットのアプリ。抜けるときに、残りを送って元に戻す。"""
    setup_production_tracing(
        EXPERIMENT,
        "support-bot",
        tracking_uri=tracking_uri,
        service_version=VERSION,
        environment=ENVIRONMENT,
    )
    try:
        enable_autologging(["openai"])
        setup_cost_tracking()
        bot, search = SupportBot(OpenAI()), TraceSearch(EXPERIMENT)
        traffic = Traffic(bot, environment=ENVIRONMENT, service_version=VERSION)
        operations = Operations(EXPERIMENT, traffic)
        operations.start_watching()
        try:
            panel = create_panel_router(operations, search)
            yield create_app(bot, panel=panel, trace_url=search.trace_url)
        finally:
            print("\n残りのトレースを送っています(数秒かかります)。", flush=True)
            operations.stop()
    finally:
        reset_production_tracing()


def serve_chat(lab: Lab, port: int) -> None:
    """画面を開き、Ctrl-C まで待つ。抜けるときに、起動したものをすべて止める。

    Raises:
        MlflowServerError: ``port`` で待ち受けられない(何も起動しない)。
    """
    with _listener(port) as listener:
        print("MLflow サーバーを起動しています(10 秒ほどかかります)。", flush=True)
        with (
            MlflowServer(lab.home, backend_store_uri=lab.tracking_uri) as server,
            chat_app(server.url) as app,
        ):
            print(f"チャット画面: http://127.0.0.1:{port}/  (Ctrl-C で終わります)")
            print(f"MLflow UI:    {server.url}/", flush=True)
            config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=3)
            uvicorn.Server(config).run(sockets=[listener])


def _listener(port: int) -> socket.socket:
    """待ち受けを始めたソケット。起動が終わるまで、つないだ画面は待たされる。"""
    try:
        listener = listen(port)
        listener.listen()
    except OSError as error:
        raise MlflowServerError(f"port {port} is not free ({error.strerror})") from error
    return listener
