"""存在しないトレースへの評価が 120 件同時に来ても、関係のない処理が待たされないこと。

アプリ(本物の MLflow サーバーにつないだ FastAPI)の ``/ping`` の応答時間(p99)を、何もないときと、
別のプロセスから 120 件を同時に送っているときとで、交互に測って比べる。

実行::

    python tests/benchmarks/feedback_flood.py --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

import requests  # noqa: E402
from bench_report import machine  # noqa: E402
from ports import free_port  # noqa: E402

CROWD = 120
SECONDS = 4.0  # 受け口が待つ 3 秒より長い


def app(tracking_uri: str, port: int) -> None:
    """測られるアプリ。"""
    import mlflow
    import uvicorn
    from fastapi import FastAPI

    from chapter8_samples.quality_monitoring import create_feedback_router

    mlflow.set_tracking_uri(tracking_uri)
    mlflow.set_experiment("flood")
    served = FastAPI()
    served.get("/ping")(lambda: "pong")
    served.include_router(create_feedback_router(lambda _: "u-1"))
    uvicorn.run(served, port=port, log_level="warning", access_log=False)


def crowd(url: str) -> None:
    """存在しないトレースへの評価を、同時に送る。"""
    bodies = [{"trace_id": f"tr-{i:032x}", "is_positive": True} for i in range(CROWD)]
    with ThreadPoolExecutor(CROWD) as pool:
        statuses = pool.map(lambda body: requests.post(url, json=body).status_code, bodies)
    assert set(statuses) == {503}


def p99_ms(url: str) -> float:
    """``SECONDS`` 秒のあいだの、応答時間の p99(ミリ秒)。"""
    session, taken, end = requests.Session(), list[float](), time.monotonic() + SECONDS
    while time.monotonic() < end:
        started = time.perf_counter()
        session.get(url).raise_for_status()
        taken.append(1000 * (time.perf_counter() - started))
        time.sleep(0.005)
    return statistics.quantiles(taken, n=100)[-1]


def measure(rounds: int) -> list[tuple[float, float]]:
    """周ごとの (何もないとき, 同時に送っているとき)。"""
    from chapter8_samples._lab.servers.mlflow_server import MlflowServer

    figures: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        with MlflowServer(Path(folder)) as server:
            words = [sys.executable, __file__, "--app", server.url, str(port)]
            served = subprocess.Popen(words)
            try:
                assert wait(url)
                for _ in range(rounds):
                    alone = p99_ms(f"{url}/ping")
                    flood = subprocess.Popen(
                        [sys.executable, __file__, "--crowd", f"{url}/feedback"]
                    )
                    time.sleep(0.5)  # 送る側の Python が起動するまで
                    figures.append((alone, p99_ms(f"{url}/ping")))
                    assert flood.wait(60) == 0
            finally:
                served.terminate()
                served.wait()
    return figures


def wait(url: str) -> bool:
    """アプリが答えるまで待つ。"""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            return requests.get(f"{url}/ping", timeout=5).ok
        except requests.ConnectionError:
            time.sleep(0.2)
    return False


def main() -> None:
    """表を印字する。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--app", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--crowd", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.app:
        app(arguments.app[0], int(arguments.app[1]))
    elif arguments.crowd:
        crowd(arguments.crowd)
    else:
        print(machine())
        figures = measure(arguments.rounds)
        for alone, busy in figures:
            print(f"  p99 {alone:6.1f} ms → {busy:6.1f} ms  {busy / alone:4.1f} 倍")
        print(f"比の中央値 {statistics.median(busy / alone for alone, busy in figures):.1f} 倍")


if __name__ == "__main__":
    main()
