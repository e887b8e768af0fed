"""Collector が停止しても、無応答でも、アプリの応答時間は変わらないことを確かめる。

    python tests/benchmarks/otlp_latency.py --rounds 2000

送信先の状態だけが違う、同じ FastAPI アプリ(8.1 と 8.5 の設定、5 スパン、LLM スタブへの HTTP 1 回)を
1 つずつ別のプロセスで同時に動かす。1 周ごとに全部へ 1 件ずつ、順番をくじで決めて要求を送るので、
機械の揺れは全員に同じく当たる。p99 の比には、続いた周をまとめて引き直すブートストラップで
95% 信頼区間を付ける。
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import logging
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench_report import Headline, print_table
from otlp_overhead import sink
from ports import free_port

SPANS, BLOCK, RESAMPLES = 5, 20, 1_000
LANES, ALL_DEAD = 2, "停止と無応答を合わせたもの"
ONLY, STATES = "MLflow だけ", ("動作中", "停止", "無応答")
# 記録の要求 1 つが接続を 2 つ使うので、既定(15)では、同時の要求が重なると互いに待って止まる
MANY_CLIENTS = {"MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": "100"}
QUESTION = "返品は何日以内ならできますか"
DOCUMENT = "返品は商品の到着から14日以内にご連絡ください。"


@dataclass(frozen=True)
class Condition:
    """アプリ 1 つ: OTLP の方式と、送信先の状態。"""

    label: str
    protocol: str = ""
    endpoint: str = ""
    baseline: str = ONLY


class App:
    """アプリのプロセス 1 つ。標準入力を閉じると、書き出した数を答えて終わる。"""

    def __init__(self, condition: Condition, stub: str, mlflow_url: str) -> None:
        self.condition = condition
        settings = [condition.protocol, condition.endpoint, stub, mlflow_url]
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--app", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._port = 0
        self.seconds: list[float] = []

    def connect(self) -> http.client.HTTPConnection:
        """アプリが起動するのを待って、つなぐ。"""
        if not self._port:
            assert self._process.stdout is not None
            self._port = int(self._process.stdout.readline())
        return http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)

    def stop(self) -> dict[str, int]:
        """終わらせて、OTLP の (accepted, delivered, lost) を受け取る。"""
        out, _ = self._process.communicate(timeout=60)
        return json.loads(out)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def serve(protocol: str, endpoint: str, stub: str, mlflow_url: str) -> None:
    """アプリの側: 8.1 と 8.5 の設定をして、標準入力が閉じるまで応答する。"""
    import requests
    import uvicorn
    from fastapi import FastAPI

    from chapter8_samples.opentelemetry import flush_all, setup_otlp_export
    from chapter8_samples.production_tracing import setup_production_tracing

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # 届かないと何度も知らせる
    setup_production_tracing("latency", tracking_uri=mlflow_url, strict=True)
    if endpoint:
        setup_otlp_export(endpoint, "latency", protocol)
    app, llm = FastAPI(), requests.Session()
    app.get("/ask")(lambda: answer(llm, f"{stub}/chat/completions"))
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
    report = flush_all(15) if endpoint else None
    counts = [report.accepted, report.delivered, report.lost] if report else [0, 0, 0]
    print(json.dumps(dict(zip(("accepted", "delivered", "lost"), counts, strict=True))), flush=True)
    os._exit(0)


def answer(llm: Any, url: str) -> str:
    """検索に数ミリ秒の計算、生成に HTTP 1 回。"""
    import mlflow

    system = f"参考資料だけを使って答えます。\n<documents>\n{DOCUMENT}\n</documents>"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]
    with mlflow.start_span("answer", span_type="AGENT") as root:
        root.set_inputs({"question": QUESTION})
        for step in ("retrieve", "rerank", "check"):
            with mlflow.start_span(step, span_type="RETRIEVER") as span:
                span.set_outputs(sorted(QUESTION * 300)[:10])
        with mlflow.start_span("llm", span_type="CHAT_MODEL") as span:
            span.set_attribute("mlflow.llm.model", "gpt-4o-mini")
            reply = llm.post(url, json={"model": "gpt-4o-mini", "messages": messages}, timeout=30)
            span.set_outputs(reply.json())
        text: str = reply.json()["choices"][0]["message"]["content"]
        root.set_outputs(text)
    return text


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """つながるが、何も答えない送信先。"""
    held: list[socket.socket] = []

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                held.append(server.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextlib.contextmanager
def stub_llm() -> Iterator[str]:
    """別のプロセスの LLM スタブ。"""
    port = free_port()
    command = [sys.executable, "-m", "chapter8_samples._lab.llm.server", "--port", str(port)]
    with subprocess.Popen(command, cwd=sys.path[0], stdout=subprocess.DEVNULL) as process:
        try:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def conditions(grpc: str, http: str, hanging: str) -> list[Condition]:
    """比べる構成。停止と無応答は、同じ方式の「動作中」と比べる。"""
    down = f"http://127.0.0.1:{free_port()}"
    found = [Condition(ONLY)]
    for protocol, up in (("grpc", grpc), ("http/protobuf", http)):
        normal = f"両方({protocol})、Collector は{STATES[0]}"
        for state, endpoint in zip(STATES, (up, down, hanging), strict=True):
            label = f"両方({protocol})、Collector は{state}"
            found.append(Condition(label, protocol, endpoint, ONLY if endpoint == up else normal))
    return found


def run(rounds: int, per_second: float) -> dict[str, App]:
    """全部のアプリへ、1 周に 1 件ずつ送る。"""
    from chapter8_samples._lab.servers.mlflow_server import MlflowServer

    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(MlflowServer(home, env=MANY_CLIENTS))
        grpc, http, count = stack.enter_context(sink())
        stub, hanging = stack.enter_context(stub_llm()), stack.enter_context(silent())
        apps = [App(one, stub, server.url) for one in conditions(grpc, http, hanging)]
        for app in apps:
            stack.callback(app.kill)
        warm_up = 10
        _send(apps, warm_up, per_second)
        with ThreadPoolExecutor(LANES) as pool:  # 応答を待つ間に、もう一方の列の要求を送る
            work = (apps, rounds // LANES, per_second / LANES)
            for future in [pool.submit(_send, *work) for _ in range(LANES)]:
                for app, seconds in zip(apps, future.result(), strict=True):
                    app.seconds += seconds
        _check(apps, (rounds // LANES * LANES + warm_up) * SPANS, count)
    return {app.condition.label: app for app in apps}


def _send(apps: Sequence[App], rounds: int, per_second: float) -> list[list[float]]:
    """1 周に 1 件ずつ、順番をくじで決めて送る。アプリごとの、応答までの時間を返す。"""
    connections, due = [app.connect() for app in apps], time.monotonic()
    found: list[list[float]] = [[] for _ in apps]
    for _ in range(rounds):
        for number in random.sample(range(len(apps)), len(apps)):
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(time.monotonic(), due + 1 / per_second / len(apps))
            found[number].append(_request(connections[number]))
    return found


def _request(connection: http.client.HTTPConnection) -> float:
    started = time.perf_counter()
    connection.request("GET", "/ask")
    reply = connection.getresponse()
    reply.read()
    if reply.status != 200:
        raise RuntimeError(f"HTTP {reply.status}")
    return time.perf_counter() - started


def _check(apps: Sequence[App], spans: int, count: Callable[[], int]) -> None:
    """動作中の送信先には全部が、ほかの送信先には 1 つも届いていないこと。"""
    reached = 0
    for app in apps:
        found, up = app.stop(), STATES[0] in app.condition.label
        accepted = spans if app.condition.protocol else 0
        if (found["accepted"], found["delivered"]) != (accepted, spans if up else 0):
            raise RuntimeError(f"{app.condition.label}: {found}, expected {accepted}")
        reached += found["delivered"]
    if (arrived := count()) != reached:
        raise RuntimeError(f"{arrived} of {reached} spans arrived")


def p99(values: Sequence[float]) -> float:
    """99 パーセンタイル。"""
    return statistics.quantiles(values, n=100, method="inclusive")[98]


def interval(apps: Sequence[App], others: Sequence[App]) -> tuple[float, float, float]:
    """p99 の比と、95% 信頼区間(同じ周どうしのまま、20 周ずつ引き直す)。"""

    def slowest(group: Sequence[App], chosen: Sequence[int]) -> float:
        return p99([app.seconds[i] for app in group for i in chosen])

    def ratio(chosen: Sequence[int]) -> float:
        return slowest(apps, chosen) / slowest(others, chosen)

    length, draws = len(apps[0].seconds), random.Random(8)
    block = min(BLOCK, length)
    starts, ratios = range(length - block + 1), list[float]()
    for _ in range(RESAMPLES):
        drawn = draws.choices(starts, k=-(-length // block))
        ratios.append(ratio([i for start in drawn for i in range(start, start + block)][:length]))
    cuts = statistics.quantiles(ratios, n=40, method="inclusive")
    return ratio(range(length)), cuts[0], cuts[-1]


def rows(apps: dict[str, App]) -> Iterator[tuple[str, ...]]:
    """表の行。最後は、停止と無応答の 4 つを、動作中の 2 つと比べる。"""
    for label, app in apps.items():
        base = app.condition.baseline
        yield _row(label, [app], [apps[base]], base if label != ONLY else "-")
    up = [app for label, app in apps.items() if STATES[0] in label]
    dead = [app for label, app in apps.items() if label != ONLY and app not in up]
    yield _row(ALL_DEAD, dead, up, "動作中を合わせたもの")


def _row(label: str, apps: Sequence[App], others: Sequence[App], compared: str) -> tuple[str, ...]:
    mine, theirs = ([s for app in group for s in app.seconds] for group in (apps, others))
    p50, other = statistics.median(mine), statistics.median(theirs)
    ratio, low, high = interval(apps, others)
    times = (f"{p50 * 1000:.1f}", f"{p99(mine) * 1000:.1f}", f"{p50 / other:.3f}")
    return (label, *times, f"{ratio:.3f}({low:.3f}-{high:.3f})", compared)


def headline(quick: bool) -> list[Headline]:
    """停止と無応答を合わせた p99 を、動作中と比べる。"""
    rounds, per_second = (6, 8.0) if quick else (600, 4.0)
    found = list(rows(run(rounds, per_second)))
    show(rounds, per_second, found)
    _, p50, slow, _, ratio, _ = found[-1]
    subject = "Collector が停止または無応答のときの応答時間"
    return [Headline(subject, f"p50 {p50} ms、p99 {slow} ms", f"p99 は動作中の {ratio} 倍")]


def show(rounds: int, per_second: float, found: list[tuple[str, ...]]) -> None:
    """構成ごとの表を出す。"""
    title = f"応答時間(アプリ 1 つに {rounds} 件、毎秒 {per_second:g} 件)"
    columns = ("構成", "p50(ms)", "p99(ms)", "p50 の比", "p99 の比(95% 信頼区間)", "比べた相手")
    print_table(title, columns, found)


def main() -> None:
    """測って表を出す。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2_000, help="アプリ 1 つへのリクエストの数")
    parser.add_argument("--per-second", type=float, default=3.0, help="アプリ 1 つへの毎秒の数")
    parser.add_argument("--app", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.app:
        serve(*json.loads(chosen.app))
        return
    sizes = (chosen.rounds, chosen.per_second)
    show(*sizes, list(rows(run(*sizes))))


if __name__ == "__main__":
    main()
