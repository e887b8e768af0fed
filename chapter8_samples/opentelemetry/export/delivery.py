"""8.5.3 OTLP に届いた数と失われた数、期限を守る書き出し。

OpenTelemetry の ``force_flush()`` は、全部失われていても True を返し、渡した期限も守らない。
期限を守って書き出し、数で結果を返す。

Databricks でも同じ。``flush_all`` は MLflow への書き出しと OTLP への書き出しの両方を待つ。
"""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import dataclass
from typing import Any

import mlflow
import mlflow.tracing
from mlflow.tracing.processor.base_mlflow import BaseMlflowSpanProcessor
from mlflow.tracing.processor.otel import OtelSpanProcessor
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult

from .._internals import processors_of, unwrapped, wrapped_by
from ..deadlines import run_in_time


@dataclass(frozen=True)
class FlushReport:
    """``flush_all`` の結果。数は ``setup_otlp_export`` からの累計。"""

    accepted: int
    """送信待ちに入れたスパンの数。"""
    delivered: int
    """送信先が受け取ったと答えた数。"""
    lost: int
    """再送してもだめで捨てた数。書き出しが終わったのに結果がないもの(キューあふれ)も含む。"""
    timed_out: bool
    """MLflow か OTLP への書き出しが、期限に間に合わなかった。"""

    @property
    def complete(self) -> bool:
        """期限内に終わり、OTLP に渡したスパンが全部届いた(呼んだ後に増えた分があれば False)。"""
        return not self.timed_out and self.delivered == self.accepted


class _Tally:
    """1 回の設定の間の数。前の設定の遅れてきた結果は、前の数に入る。"""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """0 に戻す。fork した子は、親の送信待ちも、掛かったままのロックも引き継がない。"""
        self._lock = threading.Lock()
        self.accepted = 0
        self.delivered = 0
        self.lost = 0

    def add(self, *, accepted: int = 0, delivered: int = 0, lost: int = 0) -> None:
        with self._lock:
            self.accepted += accepted
            self.delivered += delivered
            self.lost += lost


_tally = _Tally()


def restart_counts() -> None:
    """0 から数え直す。送信を始めるときに呼ばれる。"""
    global _tally
    _watch_forks()
    _tally = _Tally()


@functools.cache
def _watch_forks() -> None:
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: _tally.restart())


def count_span(processor: OtelSpanProcessor, span: ReadableSpan) -> None:
    """OTLP へ渡すスパンを数える。"""
    tally = _count_results(processor.span_exporter)
    context = span.get_span_context()
    if context and context.trace_flags.sampled:
        tally.add(accepted=1)


def _count_results(exporter: Any) -> _Tally:
    """この exporter の結果を数える。プロバイダーが作り直されるたびに新しい exporter になる。"""
    if "tally" in vars(exporter):  # export は、8.1 も包むことがある
        return vars(exporter)["tally"]
    export, tally = exporter.export, _tally

    def counted(spans: Any) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = export(spans)
        finally:
            if result is SpanExportResult.SUCCESS:
                tally.add(delivered=len(spans))
            else:
                tally.add(lost=len(spans))
        return result

    exporter.export = counted
    exporter.tally = tally
    return tally


def flush_all(timeout_seconds: float = 10.0) -> FlushReport:
    """MLflow と OTLP の両方を書き出す。``timeout_seconds`` 秒で必ず戻る。

    ``mlflow.flush_trace_async_logging()`` は OTLP を書き出さない。プロセスを終える前
    (``os._exit`` やシグナルのハンドラーの中)では、代わりにこれを呼ぶ。
    """
    tally = _tally
    accepted = tally.accepted
    finished = run_in_time([mlflow.flush_trace_async_logging, _flush_otlp], timeout_seconds)
    _, otlp_finished = finished
    lost = tally.lost
    if otlp_finished:  # 書き出しが終わっても結果のないものは、キューからあふれた
        lost = max(lost, accepted - tally.delivered)
    return FlushReport(tally.accepted, tally.delivered, lost, timed_out=not all(finished))


def _flush_otlp() -> None:
    for processor in unwrapped(processors_of(mlflow.tracing.get_bridged_tracer_provider())):
        # 包むほう(テールサンプリングなど)は、中身だけを書き出す
        if not (wrapped_by(processor) or isinstance(processor, BaseMlflowSpanProcessor)):
            processor.force_flush()
