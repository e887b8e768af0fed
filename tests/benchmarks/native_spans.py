"""8.5 の軽いスパン(native)の呼び出し側の時間を、ほかの作り方と比べる。

1 つのプロセスで、200 文字の入力と出力を持つ 1 スパンの呼び出しを、作り方ごとに 1 周ずつ順番を
入れ替えて測る。送り先は、受け取るだけの別プロセス。書き出しは、測る間には起きないように、周の
間に行う。CPU 時間(``time.thread_time_ns``)と経過時間の、周ごとの中央値の比を出す。

実行::

    python tests/benchmarks/native_spans.py --rounds 9 --calls 400
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
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

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


def main() -> None:
    """測って表を出す。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=400, help="1 周の回数")
    chosen = parser.parse_args()
    show(measure(chosen.rounds, chosen.calls), chosen.rounds, chosen.calls)


if __name__ == "__main__":
    main()
