"""監視パネルの HTTP エンドポイント: いまの指標を JSON で返し、ボタンの操作を受ける。"""
# FastAPI が関数の中で定義した型を読めるように、from __future__ import annotations は使わない

import threading
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

from fastapi import APIRouter, HTTPException
from pydantic import BaseModel

from chapter8_samples.alerting import MetricSourceError, RollbackError
from chapter8_samples.alerting.metrics.measures import MetricSource

from .operations import QUALITY, OperationRefusedError, Operations

WINDOW = timedelta(minutes=5)
FIGURES = {
    "requests": "trace_count",
    "cost_usd": "cost_usd",
    "cost_usd_per_request": "cost_usd_per_request",
    "latency_p50_ms": "latency_p50_ms",
    "latency_p95_ms": "latency_p95_ms",
    "error_rate": "error_rate",
    "grounded_rate": f"pass_rate:{QUALITY}",
    "thumbs_up_rate": "pass_rate:user_thumbs",
}
"""画面の数字の名前と、8.4 の指標の名前。"""


class Switch(BaseModel):
    """入か切か。"""

    enabled: bool


def figures(source: MetricSource, at: datetime) -> dict[str, dict[str, float | int | None]]:
    """``at`` までの ``WINDOW`` の値と標本数。値は、標本がなければ ``None``。"""
    samples = {name: source.sample(metric, WINDOW, at) for name, metric in FIGURES.items()}
    return {name: {"value": found.value, "n": found.n} for name, found in samples.items()}


def create_panel_router(operations: Operations, source: MetricSource) -> APIRouter:
    """``GET /status`` と、``POST /operations/...`` の 4 つのボタン。"""
    router = APIRouter()
    lock = threading.Lock()

    def status() -> dict[str, Any]:
        try:
            with lock:  # 出どころは、同じ時刻の問い合わせの答えを覚えている
                found = figures(source, datetime.now(timezone.utc))
        except MetricSourceError as error:
            raise HTTPException(503, "MLflow サーバーが答えません。") from error
        minutes = WINDOW.total_seconds() / 60
        return {"window_minutes": minutes, "figures": found, **operations.status()}

    def switch(body: Switch) -> dict[str, bool]:
        operations.auto_rollback = body.enabled
        return {"ok": True}

    router.add_api_route("/status", status)
    for path, work in {
        "release": operations.release_bad_prompt,
        "rollback": operations.roll_back,
        "burst": operations.send_burst,
    }.items():
        router.add_api_route(f"/operations/{path}", _button(work), methods=["POST"])
    router.add_api_route("/operations/auto", switch, methods=["POST"])
    return router


def _button(work: Callable[[], None]) -> Callable[[], dict[str, bool]]:
    def press() -> dict[str, bool]:
        try:
            work()
        except OperationRefusedError as error:
            raise HTTPException(409, str(error)) from error
        except RollbackError as error:
            raise HTTPException(409, f"版を切り替えられません: {error}") from error
        return {"ok": True}

    return press
