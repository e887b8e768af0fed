"""1 秒に何スパンを届けられるかを、ほかの道具と比べる(端から端まで、1 件も失わずに)。

1 トレース 5 スパンを休まず作り、送り終えて、届いた数を相手側で数えるまでの時間で割る。

- 受信だけ: 届いたものを捨てずに数えるだけのサーバー(別プロセス)。どの道具も OTLP(HTTP)で送る。
- 保存まで: 本物の MLflow サーバー(SQLite)。スパンはデータベースの行を数える。

失わないように、OpenTelemetry 系のキューはどれも 100,000 に広げる(既定の 2,048 ではあふれる)。

実行::

    python tests/benchmarks/tracing_throughput.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench_report import Headline, machine, markdown
from tracing_burst import environment

SPANS = 5
Function = Callable[..., str]
Setup = Callable[[str], "tuple[Callable[[Function], Function], Callable[[], object]]"]
SINK = """
import gzip, http.server
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

class Sink(http.server.BaseHTTPRequestHandler):
    protocol_version, bodies = "HTTP/1.1", []
    def log_message(self, *arguments): pass
    def answer(self, body=b""):
        self.send_response(200)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.endswith("/v1/traces"):
            self.bodies.append((self.headers.get("Content-Encoding"), body))
        self.answer()
    def do_GET(self):  # 届いたスパンの数を答えて、忘れる
        count, taken = 0, [self.bodies.pop() for _ in range(len(self.bodies))]
        for encoding, body in taken:
            plain = gzip.decompress(body) if encoding == "gzip" else body
            request = ExportTraceServiceRequest.FromString(plain)
            count += sum(len(s.spans) for r in request.resource_spans for s in r.scope_spans)
        self.answer(str(count).encode())

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Sink)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""


def opentelemetry(url: str) -> tuple[Callable[[Function], Function], Callable[[], object]]:
    """入力と出力を JSON で属性に書く、素の OpenTelemetry SDK。"""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{url}/v1/traces")))
    tracer = provider.get_tracer("throughput")

    def decorate(function: Function) -> Function:
        def traced(question: str) -> str:
            with tracer.start_as_current_span(function.__name__) as span:
                span.set_attribute("input", json.dumps({"question": question}))
                result = function(question)
                span.set_attribute("output", json.dumps(result))
                return result

        return traced

    return decorate, lambda: provider.force_flush(600_000)


def langfuse(url: str) -> tuple[Callable[[Function], Function], Callable[[], object]]:
    """Langfuse の ``@observe``。"""
    from langfuse import Langfuse, observe  # type: ignore[import-not-found]

    client = Langfuse(public_key="pk-lf-local", secret_key="sk-lf-local", base_url=url)
    return observe, client.flush


def phoenix(url: str) -> tuple[Callable[[Function], Function], Callable[[], object]]:
    """Phoenix(OpenInference)の ``@tracer.chain``。"""
    from phoenix.otel import register  # type: ignore[import-not-found]

    provider = register(
        endpoint=f"{url}/v1/traces",
        protocol="http/protobuf",
        batch=True,
        set_global_tracer_provider=False,
        verbose=False,
    )
    return provider.get_tracer("throughput").chain, lambda: provider.force_flush(600_000)


def otlp_only(url: str) -> tuple[Callable[[Function], Function], Callable[[], object]]:
    """8.5 の設定で OTLP だけに送る MLflow。"""
    import mlflow

    from chapter8_samples.opentelemetry import flush_all, setup_otlp_export

    setup_otlp_export(f"{url}/v1/traces", "throughput", "http/protobuf", mode="otlp_only")
    return mlflow.trace, lambda: flush_all(600)


def mlflow_server(profile: str) -> Setup:
    """8.1 の設定で MLflow サーバーに保存する。"""

    def setup(url: str) -> tuple[Callable[[Function], Function], Callable[[], object]]:
        import mlflow

        from chapter8_samples.production_tracing import flush_traces, setup_production_tracing

        setup_production_tracing("throughput", tracking_uri=url, export_profile=profile)  # type: ignore[arg-type]
        return mlflow.trace, lambda: flush_traces(600)

    return setup


BASE = "OpenTelemetry SDK"
OURS = "MLflow(8.5、OTLP だけ)"
TO_SINK: dict[str, Setup] = {
    BASE: opentelemetry,
    "Langfuse @observe": langfuse,
    "Phoenix @tracer.chain": phoenix,
    OURS: otlp_only,
}
TO_SERVER: dict[str, Setup] = {
    "MLflow(8.1、burst)": mlflow_server("burst"),
    "MLflow(8.1、otlp)": mlflow_server("otlp"),
}


@dataclass
class Measured:
    """設定 1 つの結果。"""

    stored: bool
    rates: list[float] = field(default_factory=list[float])
    """周ごとの、届いたスパン/秒。"""
    lost: int = 0
    missing: str = ""
    """測れなかった理由。"""


def child(name: str, url: str, traces: int) -> None:
    """作って送り終えるまでの秒数を標準出力に書く。"""
    try:
        decorate, flush = (TO_SINK | TO_SERVER)[name](url)
    except ModuleNotFoundError as error:
        print(json.dumps(str(error)))
        return

    def step(question: str) -> str:
        return f"資料: {question}"

    def answer(question: str) -> str:
        return "".join(traced_step(question) for _ in range(SPANS - 1))

    traced_step, traced_answer = decorate(step), decorate(answer)
    began = time.perf_counter()
    for number in range(traces):
        traced_answer(f"質問 {number}")
    flush()
    print(json.dumps(time.perf_counter() - began), flush=True)
    os._exit(0)


@contextmanager
def sink() -> Iterator[tuple[str, Callable[[], int]]]:
    """受信だけのサーバー。(URL, 届いたスパンの数)。"""
    command = [sys.executable, "-c", SINK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()

        def count() -> int:
            with urllib.request.urlopen(url) as answer:
                return int(answer.read())

        try:
            yield url, count
        finally:
            process.terminate()


@contextmanager
def store(home: Path) -> Iterator[tuple[str, Callable[[], int]]]:
    """本物の MLflow サーバー。(URL, 前に数えてから保存されたスパンの数)。"""
    from chapter8_samples._lab.servers.mlflow_server import MlflowServer

    database, counted = home / "mlflow.db", 0
    with MlflowServer(home, backend_store_uri=f"sqlite:///{database}") as server:

        def count() -> int:
            nonlocal counted
            with sqlite3.connect(database) as connection:
                (total,) = connection.execute("SELECT COUNT(*) FROM spans").fetchone()
            before, counted = counted, total
            return total - before

        yield server.url, count


def measure(rounds: int, sink_traces: int, server_traces: int) -> dict[str, Measured]:
    """1 周ずつ交互に測る。"""
    sys.path.insert(0, environment()["PYTHONPATH"].split(os.pathsep)[0])
    found = {name: Measured(stored=name in TO_SERVER) for name in TO_SINK | TO_SERVER}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        with sink() as received, store(home) as stored:
            for _ in range(rounds):
                for name, one in found.items():
                    traces = server_traces if one.stored else sink_traces
                    run(name, one, *(stored if one.stored else received), traces, home)
    return found


def run(
    name: str,
    one: Measured,
    url: str,
    count: Callable[[], int],
    traces: int,
    home: Path,
    script: str = __file__,
) -> None:
    """``script`` を子プロセスで 1 回動かして測り、``one`` に足す。"""
    command = [sys.executable, str(Path(script).resolve()), "--child", name, "--url", url]
    done = subprocess.run(
        [*command, "--traces", str(traces)],
        cwd=home,
        env=environment() | {"OTEL_BSP_MAX_QUEUE_SIZE": "100000"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr}")
    seconds = json.loads(done.stdout.splitlines()[-1])
    if isinstance(seconds, str):
        one.missing = seconds
        return
    arrived = count()
    one.rates.append(arrived / seconds)
    one.lost += traces * SPANS - arrived


def ratio(one: Measured, other: Measured) -> str:
    """同じ周どうしの比の中央値。"""
    pairs = list(zip(one.rates, other.rates, strict=False))
    return f"{statistics.median(a / b for a, b in pairs):.2f}" if pairs else "-"


def table(found: dict[str, Measured]) -> str:
    """Markdown の表。"""
    columns = ("設定", "送り先", "スパン/秒", "失ったスパン", "OpenTelemetry 比")
    rows = []
    for name, one in found.items():
        target = "保存まで" if one.stored else "受信だけ"
        if one.missing:
            rows.append((name, target, "未インストール", "-", "-"))
            continue
        rate = f"{statistics.median(one.rates):,.0f}"
        rows.append((name, target, rate, one.lost, "-" if one.stored else ratio(one, found[BASE])))
    return markdown(columns, rows)


def headline(quick: bool) -> list[Headline]:
    """続けて送れる速さ。"""
    found = measure(1, 20, 20) if quick else measure(3, 2_000, 500)
    print(table(found))
    rates = {name: statistics.median(one.rates) for name, one in found.items() if one.rates}
    lost = sum(one.lost for one in found.values())
    burst, otlp = TO_SERVER
    peers = [name for name in rates if name in TO_SINK and name != OURS]
    return [
        Headline(
            "続けて送れる速さ(受信だけ、スパン/秒)",
            "、".join(f"{name} {rates[name]:,.0f}" for name in [OURS, *peers]),
            "、".join(f"{name} 比 {ratio(found[OURS], found[name])}" for name in peers),
        ),
        Headline(
            "続けて送れる速さ(MLflow サーバーに保存まで、スパン/秒)",
            f"burst {rates[burst]:,.0f}、otlp {rates[otlp]:,.0f}。失ったスパンは全部で {lost}",
            f"otlp は burst の {ratio(found[otlp], found[burst])} 倍",
        ),
    ]


def main() -> None:
    """測って表を出す。"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--traces", type=int, default=2_000, help="受信だけのときの件数")
    parser.add_argument("--server-traces", type=int, default=500, help="保存までのときの件数")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        child(chosen.child, chosen.url, chosen.traces)
        return
    print(f"続けて送れる速さ(1 トレース {SPANS} スパン。{machine()})\n")
    print(table(measure(chosen.rounds, chosen.traces, chosen.server_traces)))


if __name__ == "__main__":
    main()
