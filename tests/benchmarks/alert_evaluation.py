"""アラートの指標を求める時間を、出どころと窓の長さを並べて測る。

    python tests/benchmarks/alert_evaluation.py

同じトレースを、サーバーの集計、サーバーの検索、SQLite の検索の 3 通りで読む。6 つの指標を求める
時間と、標準のルールを 1 回評価する時間を表にする。値が一致しなければ失敗する。
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import mlflow
from bench_report import Headline, machine, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alerting.synthetic_traffic import SyntheticTraffic

from chapter8_samples import _lab
from chapter8_samples._lab.servers.mlflow_server import MlflowServer
from chapter8_samples.alerting.alert_config import AlertConfig
from chapter8_samples.alerting.engine import AlertEngine
from chapter8_samples.alerting.metrics.measures import MetricSource, TraceRow
from chapter8_samples.alerting.metrics.source import (
    ServerMetricSource,
    TraceSearch,
)
from chapter8_samples.alerting.rules import AlertRule, Rule, format_duration

EXPERIMENT = "alert-evaluation"
FOUR: list[Rule] = [
    AlertRule(name="high_error_rate", threshold=0.05, confidence=0.995, severity="critical"),
    AlertRule(name="slow_p95", metric="latency_p95_ms", window="10m", threshold=10_000),
    AlertRule(name="cost_per_hour", metric="cost_usd_per_hour", window="1h", threshold=10),
    AlertRule(name="no_traffic", metric="trace_count", window="10m", op="<", threshold=1),
]
"""エラー率、遅延、コスト、件数を 1 つずつ。"""
LATENCIES = ("latency_p50_ms", "latency_p95_ms", "latency_p99_ms")
METRICS = ("error_rate", *LATENCIES, "cost_usd", "total_tokens")
NAMES = ("サーバーの集計", "サーバーの検索", "SQLite の検索")


@dataclass(frozen=True)
class Sizes:
    traces: int = 5000
    hours: float = 6.0
    repeats: int = 5


def store(rows: list[TraceRow], uri: str) -> None:
    """合成した通信を、本物のスパンとして SQLite に書く。"""
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(EXPERIMENT)
    for i, row in enumerate(rows):
        if i % 200 == 0:  # 送信待ちの列があふれると、トレースは捨てられる
            mlflow.flush_trace_async_logging()
        began = row.at_ms * 1_000_000
        span: Any = mlflow.start_span_no_context("answer", start_time_ns=began)
        total = sum(row.tokens.values())
        span.set_attribute("mlflow.chat.tokenUsage", {**row.tokens, "total_tokens": total})
        span.set_attribute("mlflow.llm.cost", {"total_cost": row.cost_usd})
        if row.state == "ERROR":
            span.set_status("ERROR")
        span.end(end_time_ns=began + round((row.latency_ms or 0) * 1_000_000))
    mlflow.flush_trace_async_logging()


def sources(uri: str, url: str) -> list[Callable[[], MetricSource]]:
    """測るたびに作り直す(前の回に読んだものを使い回さない)出どころ。"""
    return [
        lambda: ServerMetricSource(EXPERIMENT, url),
        lambda: TraceSearch(EXPERIMENT, url),
        lambda: TraceSearch(EXPERIMENT, uri),
    ]


def timed(
    make: Callable[[], MetricSource], call: Callable[[MetricSource], Any], repeats: int
) -> tuple[float, Any]:
    """(``call`` のミリ秒の中央値, 最後の戻り値)。最初の 1 回は数えない。"""
    spent: list[float] = []
    result = call(make())
    for _ in range(repeats):
        source = make()
        began = time.perf_counter()
        result = call(source)
        spent.append((time.perf_counter() - began) * 1000)
    return statistics.median(spent), result


def check_agreement(answers: list[list[float | None]], n: int) -> None:
    """どの出どころの値も一致する。"""
    for other in answers[1:]:
        for metric, first, value in zip(METRICS, answers[0], other, strict=True):
            same = first == value or math.isclose(first or 0, value or 0, rel_tol=1e-9)
            if not same:
                raise SystemExit(f"{metric} over {n} traces: {first} and {value} differ")


@dataclass(frozen=True)
class Row:
    """1 つの窓を、``NAMES`` の順に測ったミリ秒。"""

    title: str
    spent: list[float]

    @property
    def ratio(self) -> float:
        """サーバーの検索 / サーバーの集計。"""
        return self.spent[1] / self.spent[0]


def measure(sizes: Sizes, home: Path) -> list[Row]:
    """表の行。"""
    traffic = SyntheticTraffic(traces=sizes.traces, hours=sizes.hours)
    rows = traffic.rows()
    keep = timedelta(hours=sizes.hours)
    end = traffic.start + keep - timedelta(milliseconds=1)
    uri = f"sqlite:///{(home / 'mlflow.db').as_posix()}"
    store(rows, uri)
    with MlflowServer(home, backend_store_uri=uri) as server:
        made = sources(uri, server.url)
        shares = (1 / 72, 1 / 6, 1)
        windows = [timedelta(seconds=round(keep.total_seconds() * share)) for share in shares]
        found = [row_of(made, window, end, sizes.repeats) for window in windows]
        whole = list(AlertConfig.default().rules)
        found += [cycle_row(made, rules, end, sizes.repeats) for rules in (FOUR, whole)]
    return found


def row_of(
    made: list[Callable[[], MetricSource]], window: timedelta, end: datetime, repeats: int
) -> Row:
    def ask(source: MetricSource) -> list[Any]:
        return [source.sample(metric, window, end) for metric in METRICS]

    found = [timed(make, ask, repeats) for make in made]
    n = found[0][1][0].n
    check_agreement([[sample.value for sample in samples] for _, samples in found], n)
    return Row(f"{format_duration(window)} ({n:,} 件)", [spent for spent, _ in found])


def cycle_row(
    made: list[Callable[[], MetricSource]], rules: list[Rule], end: datetime, repeats: int
) -> Row:
    config = AlertConfig(experiment=EXPERIMENT, rules=rules)

    def evaluate(source: MetricSource) -> None:
        engine = AlertEngine(config, source)
        engine.evaluate(end)
        if engine.failures:
            raise SystemExit(f"rules failed: {engine.failures}")

    spent = [timed(make, evaluate, repeats)[0] for make in made]
    title = "4 ルール" if rules is FOUR else f"標準の {len(rules)} ルール"
    return Row(f"{title}を 1 回評価", spent)


def run(sizes: Sizes) -> list[Row]:
    """空の保存先で測る。"""
    _lab.go_offline()
    with tempfile.TemporaryDirectory() as home:
        return measure(sizes, Path(home))


def headline(quick: bool) -> list[Headline]:
    """いちばん長い窓と、ルールの評価 1 回ずつ。"""
    sizes = Sizes(72, 1.2, 1) if quick else Sizes()
    rows = run(sizes)
    show(sizes, rows)
    return [
        Headline(
            f"アラートの指標 {len(METRICS)} つ" if row is rows[-3] else "アラートの評価",
            f"{row.title}: "
            + "、".join(f"{name} {ms:.1f} ms" for name, ms in zip(NAMES, row.spent, strict=True)),
            f"検索は集計の {row.ratio:.1f} 倍",
        )
        for row in rows[-3:]
    ]


def show(sizes: Sizes, rows: list[Row]) -> None:
    """窓ごとの表を出す。"""
    print(f"測定: {machine()}、トレース {sizes.traces:,} 件、{sizes.repeats} 回の中央値(ミリ秒)\n")
    lines = [[row.title, *(f"{ms:.1f}" for ms in row.spent), f"{row.ratio:.1f} 倍"] for row in rows]
    print(markdown(("窓", *NAMES, "検索 / 集計"), lines))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, default in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    sizes = Sizes(**vars(parser.parse_args(argv)))
    show(sizes, run(sizes))


if __name__ == "__main__":
    main()
