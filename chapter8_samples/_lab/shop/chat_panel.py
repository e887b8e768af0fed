"""監視パネルの HTTP エンドポイント: いまの指標を JSON で返し、ボタンの操作を受ける。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from fastapi import APIRouter, HTTPException

from chapter8_samples.alerting import MetricSourceError, RollbackError
from chapter8_samples.alerting.metrics.measures import RowNumbers, TraceRow, measure
from chapter8_samples.alerting.metrics.source import TraceSearch

from .operations import (
    ALERT_SECONDS,
    MIN_SAMPLES,
    QUALITY,
    QUALITY_FLOOR,
    OperationRefusedError,
    Operations,
)

WINDOW, BIN_SECONDS, LEAST_BINS = timedelta(minutes=5), 5, 12
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
TRENDS = ("grounded_rate", "latency_p95_ms", "cost_usd_per_request")


def figures(rows: Sequence[TraceRow]) -> dict[str, dict[str, float | int | None]]:
    """指標の値と標本数。値は、標本がなければ ``None``。"""
    found: dict[str, dict[str, float | int | None]] = {}
    for name, metric in FIGURES.items():
        sample = measure(metric, WINDOW.total_seconds(), RowNumbers(rows))
        found[name] = {"value": sample.value, "n": sample.n}
    return found


def trend(rows: Sequence[TraceRow], end_seconds: float) -> dict[str, Any]:
    """最初のトレースから ``end_seconds`` までを ``BIN_SECONDS`` ごとに区切った推移。"""
    numbers = [row.at_ms // 1000 // BIN_SECONDS for row in rows]
    last = int(end_seconds // BIN_SECONDS)
    first = min([*numbers, last - LEAST_BINS + 1])
    bins: list[list[TraceRow]] = [[] for _ in range(first, last + 1)]
    for row, number in zip(rows, numbers, strict=True):
        bins[number - first].append(row)
    values = {
        name: [measure(FIGURES[name], BIN_SECONDS, RowNumbers(bin)).value for bin in bins]
        for name in TRENDS
    }
    return {"start": first * BIN_SECONDS, "bin_seconds": BIN_SECONDS, **values}


def alert_detail(value: float | None, n: int, rows: Sequence[TraceRow]) -> str:
    """アラートが見ている値の説明。``rows`` は、アラートの集計期間のトレース。"""
    waiting = sum(all(name != QUALITY for name, _ in row.assessments) for row in rows)
    if value is None:
        now = f"{waiting} 件をまだ採点していません" if waiting else "新しい答えはありません"
        return f"直近 {ALERT_SECONDS} 秒: {now}。"
    now = f"根拠のある答え {value:.0%}({n} 件)、しきい値 {QUALITY_FLOOR:.0%}"
    more = f"。{MIN_SAMPLES} 件になると判定します" if n < MIN_SAMPLES else ""
    if waiting:
        more = f"。採点待ち {waiting} 件"
    return f"直近 {ALERT_SECONDS} 秒: {now}{more}。"


def create_panel_router(operations: Operations, search: TraceSearch) -> APIRouter:
    """``GET /status`` と、``POST /operations/...`` の 2 つのボタン。"""
    router = APIRouter()

    def status() -> dict[str, Any]:
        now = datetime.now(timezone.utc).timestamp()
        start = now - WINDOW.total_seconds()
        try:
            rows = search.rows(round(1000 * start), round(1000 * now))
        except MetricSourceError as error:
            raise HTTPException(503, "MLflow サーバーが答えません。") from error
        told = operations.status()
        recent = [row for row in rows if row.at_ms > 1000 * (now - ALERT_SECONDS)]
        alert = told["alert"]
        alert["detail"] = alert_detail(alert["value"], alert["n"], recent)
        return {
            "window_minutes": WINDOW.total_seconds() / 60,
            "figures": figures(rows),
            "trend": trend(rows, now),
            **told,
        }

    router.add_api_route("/status", status)
    for path, work in (
        ("release", operations.release_bad_prompt),
        ("burst", operations.send_burst),
    ):
        router.add_api_route(f"/operations/{path}", _button(work), methods=["POST"])
    return router


def _button(work: Callable[[], None]) -> Callable[[], dict[str, bool]]:
    def press() -> dict[str, bool]:
        try:
            work()
        except (OperationRefusedError, RollbackError) as error:
            raise HTTPException(409, str(error)) from error
        return {"ok": True}

    return press
