"""8.5 の軽いスパン(native)の呼び出し側の時間を、ほかの作り方と比べる。

1 つのプロセスで、200 文字の入力と出力を持つ 1 スパンの呼び出しを、作り方ごとに 1 周ずつ順番を
入れ替えて測る。送り先は、受け取るだけの別プロセス。書き出しは、測る間には起きないように、周の
間に行う。CPU 時間(``time.thread_time_ns``)と経過時間の、周ごとの中央値の比を出す。

``--sustained N`` では、1 トレース 5 スパンを休まず作って送り終えるまでの速さと、失った数を測る
(``tracing_throughput.py`` と同じやり方。受け取るだけの相手と、保存する MLflow のサーバー 1 つへ)。

Langfuse と Phoenix は、入っていれば測る(``pip install langfuse arize-phoenix-otel``)。

実行::

    python tests/benchmarks/native_spans.py --rounds 9 --calls 400
    python tests/benchmarks/native_spans.py --sustained 3
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tracing_throughput as throughput
from bench_report import print_table
from caller_cost import QUIET
from tracing_overhead import langfuse, phoenix

SDK, OURS, MLFLOW = "OpenTelemetry SDK(同じ属性)", "native", "MLflow @mlflow.trace"
SDK_OUT, OURS_OUT = "OpenTelemetry SDK、間引いた", "native、間引いた"
QUESTION, ANSWER = "問" * 200, "答" * 200
Call = Callable[[str], str]


@dataclass
class Variant:
    """作り方 1 つ: 呼ぶもの、書き出し、周ごとの 1 件ずつの (CPU, 経過) マイクロ秒。"""

    call: Call
    flush: Callable[[], object] = lambda: None
    rounds: list[tuple[list[float], list[float]]] = field(default_factory=list)

    def run(self, calls: int) -> None:
        """1 周。慣らしの分は捨てる。"""
        cpu, wall = list[float](), list[float]()
        for _ in range(calls // 4 + calls):
            began, spent = time.perf_counter_ns(), time.thread_time_ns()
            self.call(QUESTION)
            cpu.append((time.thread_time_ns() - spent) / 1000)
            wall.append((time.perf_counter_ns() - began) / 1000)
        self.flush()
        self.rounds.append((cpu[-calls:], wall[-calls:]))

    def medians(self, clock: int) -> list[float]:
        """周ごとの中央値。``clock`` は、0 が CPU 時間、1 が経過時間。"""
        return [statistics.median(one[clock]) for one in self.rounds]

    def p99(self) -> float:
        """全部の周の経過時間の p99。"""
        return statistics.quantiles([v for one in self.rounds for v in one[1]], n=100)[98]


def answer(question: str) -> str:
    """測る相手。"""
    return ANSWER


def sdk(url: str, ratio: float) -> Variant:
    """同じ属性を、SDK だけで書く。"""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

    provider = TracerProvider(ParentBased(TraceIdRatioBased(ratio)))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(f"{url}/v1/traces")))
    tracer = provider.get_tracer("sdk")

    def call(question: str) -> str:
        with tracer.start_as_current_span("answer") as span:
            span.set_attribute("mlflow.spanType", "CHAT_MODEL")
            span.set_attribute("mlflow.traceTag.mlflow.traceName", "answer")
            if span.is_recording():
                text = json.dumps({"question": question}, ensure_ascii=False)
                span.set_attribute("mlflow.spanInputs", text)
            result = answer(question)
            if span.is_recording():
                span.set_attribute("mlflow.spanOutputs", json.dumps(result, ensure_ascii=False))
            return result

    return Variant(call, provider.force_flush)


def native(url: str, ratio: float) -> Variant:
    """``traced``。行き先はプロセスに 1 つなので、測る周の前に、この設定に切り替える。"""
    from chapter8_samples.opentelemetry import native, setup_native_tracing, traced

    tracing = setup_native_tracing(url, "native", "bench", sampling_ratio=ratio)
    tracer, call = native._tracer, traced(span_type="CHAT_MODEL")(answer)
    made = Variant(call, tracing.flush)

    def run(calls: int) -> None:
        native._tracer = tracer
        Variant.run(made, calls)

    made.run = run  # type: ignore[method-assign]
    return made


def mlflow_trace(url: str) -> Variant:
    """MLflow のデコレーター。"""
    import mlflow

    mlflow.set_tracking_uri(url)
    mlflow.set_experiment("mlflow")
    return Variant(mlflow.trace(answer, span_type="CHAT_MODEL"), mlflow.flush_trace_async_logging)


def variants(url: str) -> dict[str, Variant | None]:
    """作り方の一覧。入っていないものは None。"""
    found: dict[str, Variant | None] = {
        SDK: sdk(url, 1),
        OURS: native(url, 1),
        MLFLOW: mlflow_trace(url),
        SDK_OUT: sdk(url, 0),
        OURS_OUT: native(url, 0),
    }
    for name, make in (("Phoenix @tracer.chain", phoenix), ("Langfuse @observe", langfuse)):
        try:
            found[name] = Variant(make())
        except ModuleNotFoundError:
            found[name] = None
    return found


def measure(rounds: int, calls: int) -> dict[str, Variant | None]:
    """周ごとに順番をくじで決めて測る。"""
    os.environ |= QUIET | {"OTEL_BSP_SCHEDULE_DELAY": "600000"}
    logging.disable()
    sink = [sys.executable, str(Path(__file__).with_name("caller_cost.py")), "--serve"]
    with subprocess.Popen(sink, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = variants(f"http://127.0.0.1:{process.stdout.readline().strip()}")
            present = [variant for variant in found.values() if variant]
            for _ in range(rounds):
                for variant in random.sample(present, len(present)):
                    variant.run(calls)
        finally:
            process.kill()
    return found


def ratio(found: dict[str, Variant | None], mine: str, other: str, clock: int = 0) -> str:
    """同じ周どうしの、中央値の比の中央値。"""
    one, two = found[mine], found[other]
    if one is None or two is None:
        return "未インストール"
    pairs = zip(one.medians(clock), two.medians(clock), strict=True)
    return f"{statistics.median(a / b for a, b in pairs):.2f}"


PAIRS = ((OURS, SDK), (OURS, MLFLOW), (OURS_OUT, SDK_OUT))
PAIRS += ((OURS, "Phoenix @tracer.chain"), (OURS, "Langfuse @observe"))


def show(found: dict[str, Variant | None], rounds: int, calls: int) -> None:
    """作り方ごとの時間の表と、比の表。"""
    rows = list[tuple[Any, ...]]()
    for name, variant in found.items():
        if variant is None:
            rows.append((name, "未インストール", "-", "-"))
            continue
        cpu, wall = (statistics.median(variant.medians(clock)) for clock in (0, 1))
        rows.append((name, f"{cpu:.1f}", f"{wall:.1f}", f"{variant.p99():.0f}"))
    title = f"1 スパンの呼び出し側の時間(us、{rounds} 周 x {calls} 回)"
    print_table(title, ("作り方", "CPU の p50", "経過の p50", "経過の p99"), rows)
    ratios = [(*pair, ratio(found, *pair), ratio(found, *pair, clock=1)) for pair in PAIRS]
    print_table("比(周ごとの中央値の比の中央値)", ("測るもの", "比べる相手", "CPU", "経過"), ratios)


# ---- 続けて送る速さ ----


def native_setup(experiment: str | None) -> throughput.Setup:
    """``traced``。待ち行列は、ほかの作り方と同じ 100,000 に広げる。"""

    def setup(url: str) -> Any:
        from chapter8_samples.opentelemetry import setup_native_tracing, traced

        tracing = setup_native_tracing(url, experiment, "bench", max_queue_spans=100_000)
        return traced(span_type="CHAIN"), lambda: tracing.flush(600)

    return setup


TO_SERVER = "native(MLflow のサーバーへ)"
throughput.TO_SINK[OURS] = native_setup(None)
throughput.TO_SERVER[TO_SERVER] = native_setup("throughput")


def sustained(rounds: int, sink_traces: int, server_traces: int) -> dict[str, throughput.Measured]:
    """作り方ごとに別のプロセスで、1 周ずつ、順番を入れ替えて測る。"""
    found = {
        name: throughput.Measured(stored=name in throughput.TO_SERVER)
        for name in throughput.TO_SINK | throughput.TO_SERVER
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        home = Path(folder)
        with throughput.sink() as received, throughput.store(home) as stored:
            for _ in range(rounds):
                for name, one in random.sample(list(found.items()), len(found)):
                    target = stored if one.stored else received
                    traces = server_traces if one.stored else sink_traces
                    throughput.run(name, one, *target, traces, home, script=__file__)
    return found


def show_sustained(found: dict[str, throughput.Measured], rounds: int) -> None:
    """届いたスパン/秒と失った数、native との比。"""
    rows = list[tuple[Any, ...]]()
    for name, one in found.items():
        mine = found[TO_SERVER if one.stored else OURS]
        if one.missing:
            rows.append((name, "未インストール", "-", "-"))
        else:
            rate = f"{statistics.median(one.rates):,.0f}"
            rows.append((name, rate, one.lost, throughput.ratio(mine, one)))
    columns = ("作り方", "スパン/秒", "失ったスパン", "native はその何倍か")
    print_table(f"続けて送る速さ({rounds} 周の中央値)", columns, rows)


def main() -> None:
    """測って表を出す。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=400, help="1 周の回数")
    parser.add_argument("--sustained", type=int, metavar="ROUNDS", help="続けて送る速さを測る")
    parser.add_argument("--traces", type=int, default=2_000, help="受け取るだけのときの件数")
    parser.add_argument("--server-traces", type=int, default=500, help="保存するときの件数")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        throughput.child(chosen.child, chosen.url, chosen.traces)
        return
    if chosen.sustained:
        found = sustained(chosen.sustained, chosen.traces, chosen.server_traces)
        show_sustained(found, chosen.sustained)
        return
    show(measure(chosen.rounds, chosen.calls), chosen.rounds, chosen.calls)


if __name__ == "__main__":
    main()
