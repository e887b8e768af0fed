"""OTLP エクスポートの負担を、構成を並べて測る。

    python tests/benchmarks/otlp_overhead.py

同じ仕事(1 リクエスト 5 スパン)を、素の OpenTelemetry SDK、MLflow だけ、OTLP だけ、両方で順番を
回しながら測り、呼び出し側の 1 スパンあたりの時間を Markdown の表にする。受信側は別のプロセスで
動かし、失われたスパンがあれば失敗する。応答時間への影響は ``otlp_latency.py`` で測る。
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_report import Headline, print_table
from ports import free_port

from chapter8_samples import _lab
from chapter8_samples.opentelemetry import (
    disable_otlp_export,
    flush_all,
    setup_otlp_export,
)

SPANS, WARM_UP = 5, 5
ANSWER = "返品は、商品の到着から 30 日以内に承ります。" * 10
SINK = """
import sys
from chapter8_samples._lab.servers.receivers import OtlpReceiver
with OtlpReceiver() as sink:
    print(sink.grpc_endpoint, sink.http_endpoint, flush=True)
    for line in sys.stdin:
        print(len(sink.spans), flush=True)
"""


@dataclass(frozen=True)
class Sizes:
    rounds: int = 6
    requests: int = 100


@dataclass
class Measured:
    """構成 1 つの測定値。秒。"""

    label: str
    start: Callable[[], None]
    stop: Callable[[], None]
    request: Callable[[], None]
    delivers: bool = True
    span: list[float] = field(default_factory=list[float])


def mlflow_request() -> None:
    """5 スパンのリクエスト。"""
    with mlflow.start_span("answer", span_type="AGENT") as root:
        root.set_inputs({"question": "返品したい"})
        for number in range(SPANS - 1):
            with mlflow.start_span(f"step-{number}", span_type="CHAT_MODEL") as span:
                span.set_attribute("mlflow.llm.model", "gpt-4o-mini")
                span.set_outputs(ANSWER)
        root.set_outputs(ANSWER)


class PlainSdk:
    """同じ仕事を、MLflow を使わず OpenTelemetry の SDK だけでする。"""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint

    def start(self) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        self._provider = TracerProvider()
        exporter = OTLPSpanExporter(endpoint=self._endpoint)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("benchmark")

    def stop(self) -> None:
        self._provider.shutdown()

    def request(self) -> None:
        with self._tracer.start_as_current_span("answer") as root:
            root.set_attribute("inputs", json.dumps({"question": "返品したい"}))
            for number in range(SPANS - 1):
                with self._tracer.start_as_current_span(f"step-{number}") as span:
                    span.set_attribute("gen_ai.request.model", "gpt-4o-mini")
                    span.set_attribute("outputs", json.dumps(ANSWER))
            root.set_attribute("outputs", json.dumps(ANSWER))


def configurations(grpc: str, http: str, down: str, hanging: str) -> list[Measured]:
    """並べて測る構成。"""
    plain = PlainSdk(grpc)

    def otlp(label: str, endpoint: str, protocol: str = "grpc", **options: Any) -> Measured:
        delivers = options.pop("delivers", True)

        def start() -> None:
            setup_otlp_export(endpoint, "benchmark", protocol, timeout_seconds=5, **options)

        return Measured(label, start, lambda: stop(delivers), mlflow_request, delivers)

    def stop(delivers: bool) -> None:
        if delivers and not flush_all(60).complete:
            raise RuntimeError("spans were lost; lower --requests")
        disable_otlp_export(timeout_seconds=1)

    return [
        Measured("OpenTelemetry SDK だけ(gRPC)", plain.start, plain.stop, plain.request),
        Measured("MLflow だけ", lambda: None, lambda: None, mlflow_request, delivers=False),
        otlp("OTLP だけ(gRPC)", grpc, mode="otlp_only"),
        otlp("両方(gRPC)", grpc),
        otlp("両方(HTTP)", http, "http/protobuf"),
        otlp("両方、Collector が停止", down, delivers=False),
        otlp("両方、Collector が無応答", hanging, delivers=False),
    ]


def measure(one: Measured, sizes: Sizes) -> None:
    """1 回分。"""
    one.start()
    for _ in range(WARM_UP):  # 接続とプロバイダーの用意
        one.request()
    gc.collect()
    one.span += [_timed(one.request) / SPANS for _ in range(sizes.requests)]
    one.stop()
    mlflow.flush_trace_async_logging()


def _timed(request: Callable[[], None]) -> float:
    started = time.perf_counter()
    request()
    return time.perf_counter() - started


@contextlib.contextmanager
def sink() -> Iterator[tuple[str, str, Callable[[], int]]]:
    """別プロセスの受信側。届いたスパンの数を答える。"""
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
    env, pipe = {**os.environ, "PYTHONPATH": path}, subprocess.PIPE
    command = [sys.executable, "-c", SINK]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env) as process:
        assert process.stdin is not None and process.stdout is not None
        grpc, http = process.stdout.readline().split()

        def count() -> int:
            print(file=process.stdin, flush=True)
            return int(process.stdout.readline())  # type: ignore[union-attr]

        try:
            yield grpc, http, count
        finally:
            process.stdin.close()


def run(sizes: Sizes) -> list[Measured]:
    """全部の構成を、順番を回しながら測る。"""
    with socket.create_server(("127.0.0.1", 0)) as silent, sink() as (grpc, http, count):
        down = f"http://127.0.0.1:{free_port()}"
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
        measured = configurations(grpc, http, down, hanging)
        for number in range(sizes.rounds):
            turn = number % len(measured)
            for one in measured[turn:] + measured[:turn]:
                measure(one, sizes)
        delivering = sum(one.delivers for one in measured)
        expected = delivering * sizes.rounds * SPANS * (sizes.requests + WARM_UP)
        if (arrived := count()) != expected:
            raise RuntimeError(f"{arrived} of {expected} spans arrived")
    return measured


def measured_in_own_store(sizes: Sizes) -> list[Measured]:
    """空の SQLite に記録しながら測る。"""
    _lab.go_offline()
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # 停止中の構成が何度も知らせる
    with tempfile.TemporaryDirectory() as home:
        mlflow.set_tracking_uri(f"sqlite:///{home}/mlflow.db")
        mlflow.set_experiment("benchmark")
        return run(sizes)


def ratio(one: Measured, other: Measured) -> str:
    """p50 の比。"""
    return f"{statistics.median(one.span) / statistics.median(other.span):.2f}"


def rows(measured: list[Measured]) -> list[tuple[str, ...]]:
    """表の行。"""
    plain, only = measured[:2]
    return [
        (m.label, f"{statistics.median(m.span) * 1e6:.0f}", ratio(m, plain), ratio(m, only))
        for m in measured
    ]


def headline(quick: bool) -> list[Headline]:
    """1 スパンの呼び出し側の時間。"""
    sizes = Sizes(1, 4) if quick else Sizes()
    found = rows(measured_in_own_store(sizes))
    show(sizes, found)
    shown = [found[number] for number in (0, 1, 3, 5)]
    return [
        Headline(
            "OTLP との二重送信(1 スパン、p50)",
            "、".join(f"{label} {microseconds} us" for label, microseconds, *_ in shown),
            f"両方(gRPC)は MLflow だけの {found[3][3]} 倍、OpenTelemetry SDK の {found[3][2]} 倍",
        )
    ]


def show(sizes: Sizes, found: list[tuple[str, ...]]) -> None:
    """構成ごとの表を出す。"""
    title = f"1 スパンの呼び出し側の時間(1 リクエスト {SPANS} スパン、"
    title += f"{sizes.rounds} 回 x {sizes.requests} リクエスト)"
    print_table(title, ("構成", "p50(us)", "SDK 比", "MLflow 比"), found)


def main() -> None:
    """測って、表を出す。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=Sizes.rounds)
    parser.add_argument("--requests", type=int, default=Sizes.requests)
    chosen = parser.parse_args()
    sizes = Sizes(chosen.rounds, chosen.requests)
    show(sizes, rows(measured_in_own_store(sizes)))


if __name__ == "__main__":
    main()
