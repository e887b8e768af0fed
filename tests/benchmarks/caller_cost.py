"""8.1 の設定が、トレース 1 件の呼び出し側の時間を MLflow そのものの何倍にするか。

1 つのプロセスで、設定なしとありを 1 周ずつ交互に測り、周ごとの比の中央値と、その 95% 上限
(ブートストラップ)を出す。送信は測る間に起きないようにし、間の周では、受け取るだけの別プロセスの
サーバーに送る。MLflow には手を加えない。

実行::

    python tests/benchmarks/caller_cost.py --rounds 100 --traces 60
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from bench_report import machine

# 測る間に送信させない(設定なしの側にも効く)
QUIET = {
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS": "600000",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE": "16384",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_WORKERS": "4",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}


def p50_us(traces: int) -> float:
    """いまの設定での 1 件(1 スパン)の、呼び出し側のスレッドの CPU 時間の中央値(マイクロ秒)。"""
    import mlflow

    call = mlflow.trace(lambda question: f"回答: {question}", name="answer")
    times = []
    gc.collect()
    gc.disable()
    for number in range(traces // 4 + traces):
        started = time.thread_time_ns()
        call(f"質問 {number}")
        times.append(time.thread_time_ns() - started)
    gc.enable()
    return statistics.median(times[-traces:]) / 1000


def plain(traces: int) -> float:
    """MLflow だけ。"""
    import mlflow

    mlflow.set_experiment("plain")
    try:
        return p50_us(traces)
    finally:
        mlflow.tracing.reset()


def ours(traces: int) -> float:
    """``setup_production_tracing`` の後。"""
    from chapter8_samples.production_tracing import (
        reset_production_tracing,
        setup_production_tracing,
    )

    setup_production_tracing("ours")
    try:
        return p50_us(traces)
    finally:
        reset_production_tracing()


def measure(rounds: int, traces: int) -> list[tuple[float, float]]:
    """周ごとの(設定なし, あり)。先に測るほうを 1 周ごとに入れ替える。"""
    pairs = []
    for number in range(rounds):
        if number % 2:
            first = ours(traces)
            pairs.append((plain(traces), first))
        else:
            first = plain(traces)
            pairs.append((first, ours(traces)))
    return pairs


def upper_bound(ratios: list[float], draws: int = 10_000) -> float:
    """比の中央値の 95% 上限(片側、ブートストラップ)。"""
    source = random.Random(8)
    medians = [statistics.median(source.choices(ratios, k=len(ratios))) for _ in range(draws)]
    return statistics.quantiles(medians, n=20)[-1]


class Sink(BaseHTTPRequestHandler):
    """何を送られても、同じエクスペリメントの情報を返す。"""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """受け取って捨てる。"""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b'{"experiment": {"experiment_id": "1", "name": "a", "lifecycle_stage": "active"}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_PATCH = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """印字しない。"""


def serve() -> None:
    """ポートを印字して、受け取り続ける。"""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Sink)
    print(server.server_address[1], flush=True)
    server.serve_forever()


def main() -> None:
    """測って 2 行で出す。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--traces", type=int, default=60, help="1 周の件数")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return
    os.environ.update(QUIET)
    logging.disable()
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sink:
        assert sink.stdout is not None
        os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{sink.stdout.readline().strip()}"
        try:
            pairs = measure(arguments.rounds, arguments.traces)
        finally:
            sink.kill()
    ratios = [after / before for before, after in pairs]
    before, after = (statistics.median(side) for side in zip(*pairs, strict=True))
    print(f"設定なし {before:.0f} us、あり {after:.0f} us({arguments.rounds} 周、{machine()})")
    print(f"比の中央値 {statistics.median(ratios):.3f}、95% 上限 {upper_bound(ratios):.3f}")


if __name__ == "__main__":
    main()
