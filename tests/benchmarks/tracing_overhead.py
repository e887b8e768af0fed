"""トレース 1 件が呼び出し側に足す時間を、ほかの道具と比べる。

入っていない道具(langfuse、arize-phoenix-otel)は「未インストール」と書く。設定ごとに別のプロセスで
測り、機械の揺れが全員に同じく当たるように 1 周ずつ交互に回す。送信は測る間に起きないようにする。

実行::

    python tests/benchmarks/tracing_overhead.py --rounds 5 --traces 500
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_report import Headline, machine
from tracing_burst import environment

BASE = "OpenTelemetry SDK(送信なし)"
OURS = "MLflow(8.1 の設定)"
DEAD = "http://127.0.0.1:9"  # 誰も待っていない
Call = Callable[[str], str]


def answer(question: str) -> str:
    """測る相手。"""
    return f"回答: {question}"


def mlflow_call(sampling_ratio: float = 1.0) -> Call:
    """8.1 の設定をした MLflow。"""
    import mlflow

    from chapter8_samples.production_tracing import setup_production_tracing

    os.environ["MLFLOW_TRACE_SAMPLING_RATIO"] = str(sampling_ratio)
    setup_production_tracing("overhead", tracking_uri="sqlite:///overhead.db")
    return mlflow.trace(answer)


def mlflow_tail(rest: float) -> Call:
    """さらにテールサンプリングを加えたもの。"""
    from chapter8_samples.production_tracing import ConditionalSampler

    call = mlflow_call()
    ConditionalSampler(rest).install()
    return call


def otel(export: bool) -> Call:
    """入力と出力を JSON で属性に書く、素の OpenTelemetry SDK。"""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    provider = TracerProvider()
    if export:
        provider.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    tracer = provider.get_tracer("overhead")

    def call(question: str) -> str:
        with tracer.start_as_current_span("answer") as span:
            span.set_attribute("input", json.dumps({"question": question}))
            result = answer(question)
            span.set_attribute("output", json.dumps(result))
            return result

    return call


def langfuse() -> Call:
    """Langfuse の ``@observe``。"""
    from langfuse import Langfuse, observe  # type: ignore[import-not-found]

    Langfuse(
        public_key="pk-lf-local",
        secret_key="sk-lf-local",
        base_url=DEAD,
        flush_at=2_048,
        flush_interval=600,
    )
    return observe(answer)


def phoenix() -> Call:
    """Phoenix(OpenInference)の ``@tracer.chain``。"""
    from phoenix.otel import register  # type: ignore[import-not-found]

    os.environ["OTEL_BSP_SCHEDULE_DELAY"] = "600000"
    provider = register(
        endpoint=f"{DEAD}/v1/traces",
        protocol="http/protobuf",
        batch=True,
        set_global_tracer_provider=False,
        verbose=False,
    )
    return provider.get_tracer("overhead").chain(answer)


VARIANTS: dict[str, Callable[[], Call]] = {
    BASE: lambda: otel(export=False),
    "OpenTelemetry SDK(バッチ)": lambda: otel(export=True),
    "Langfuse @observe": langfuse,
    "Phoenix @tracer.chain": phoenix,
    OURS: mlflow_call,
    "MLflow、先頭で間引いた": lambda: mlflow_call(0.0),
    "MLflow、テールで残した": lambda: mlflow_tail(1.0),
    "MLflow、テールで捨てた": lambda: mlflow_tail(0.0),
}


def child(variant: str, traces: int) -> None:
    """1 つの設定を測り、p50(マイクロ秒)を標準出力に書く。"""
    try:
        call = VARIANTS[variant]()
    except ModuleNotFoundError as error:
        print(json.dumps(str(error)))
        return
    times = []
    for number in range(traces // 4 + traces):
        started = time.perf_counter_ns()
        call(f"質問 {number}")
        times.append(time.perf_counter_ns() - started)
    print(json.dumps(statistics.median(times[-traces:]) / 1000), flush=True)
    os._exit(0)  # 届かない送信を待たない


def measure(rounds: int, traces: int) -> dict[str, list[float] | str]:
    """設定 -> 周ごとの p50(測れない設定は、その理由)。"""
    found: dict[str, list[float] | str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for name in VARIANTS:
                value = _run(name, traces, folder)
                if isinstance(value, str):
                    found[name] = value
                elif isinstance(values := found.setdefault(name, []), list):
                    values.append(value)
    return found


def _run(variant: str, traces: int, folder: str) -> float | str:
    command = [sys.executable, str(Path(__file__).resolve()), "--child", variant]
    run = subprocess.run(
        [*command, "--traces", str(traces)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    if run.returncode:
        raise RuntimeError(f"{variant}: {run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def table(found: dict[str, list[float] | str]) -> str:
    """Markdown の表。倍率は、同じ周どうしの比の中央値。"""
    lines = [
        f"トレース 1 件(1 スパン)の呼び出し側の時間({machine()})",
        "",
        "| 設定 | p50(us) | OpenTelemetry(送信なし)比 | Langfuse 比 | MLflow 比 |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, values in found.items():
        if isinstance(values, str):
            lines.append(f"| {name} | 未インストール | - | - | - |")
            continue
        others = (BASE, "Langfuse @observe", OURS)
        ratios = " | ".join(_ratio(values, found[other]) for other in others)
        lines.append(f"| {name} | {statistics.median(values):.0f} | {ratios} |")
    return "\n".join(lines)


def _ratio(values: list[float] | str, others: list[float] | str) -> str:
    if isinstance(values, str) or isinstance(others, str):
        return "-"
    pairs = zip(values, others, strict=True)
    return f"{statistics.median(value / other for value, other in pairs):.2f}"


def headline(quick: bool) -> list[Headline]:
    """呼び出し側の負担。"""
    found = measure(1, 20) if quick else measure(3, 500)
    print(table(found))
    shown = (OURS, "Langfuse @observe", "Phoenix @tracer.chain", BASE)
    p50 = {name: values for name in shown if isinstance(values := found[name], list)}
    peers = [f"{name} 比 {_ratio(p50[OURS], p50[name])}" for name in p50 if name != OURS]
    tail = _ratio(found["MLflow、テールで残した"], p50[OURS])
    return [
        Headline(
            "トレース 1 件(1 スパン)の呼び出し側の時間(p50)",
            "、".join(f"{name} {statistics.median(p50[name]):.0f} us" for name in p50),
            "、".join([*peers, f"テールサンプリングを加えると {tail} 倍"]),
        )
    ]


def main() -> None:
    """測って表を出す。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--traces", type=int, default=500, help="1 周の件数")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.traces)
    else:
        print(table(measure(arguments.rounds, arguments.traces)))


if __name__ == "__main__":
    main()
