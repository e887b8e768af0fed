"""トークン数とコストの合計を、1 件ずつ(N+1)とページで比べる。

実行::

    $ python tests/benchmarks/cost_aggregation.py --traces 5000

本物の ``mlflow server`` に対して測る。方法ごとに別のプロセスで測るので、最大メモリーも比べられる。
``search`` は、同じページを MLflow に検索させるだけの時間で、ページで合計する時間の下限になる。
N+1 は遅いので ``--one-by-one`` 件だけ読み、全件の時間に換算する。
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from bench_report import Headline, print_table  # noqa: E402

NAME = "cost-aggregation"
SEEDS = 10
WAYS = {"n_plus_one": "1 件ずつ(N+1)", "paged": "ページ", "search": "MLflow の検索だけ"}


def fill(database: Path, traces: int) -> None:
    """10 件を普通に記録し、残りはデータベースの行を複製する。"""
    import mlflow

    from chapter8_samples.cost_tracking import setup_cost_tracking

    mlflow.set_tracking_uri(f"sqlite:///{database}")
    mlflow.set_experiment(NAME)
    setup_cost_tracking()
    for i in range(min(SEEDS, traces)):
        usage = {"input_tokens": 1000 + i, "output_tokens": 300}
        usage["total_tokens"] = sum(usage.values())
        with (
            mlflow.start_span("chat"),
            mlflow.start_span("retrieve"),
            mlflow.start_span("llm", "CHAT_MODEL") as span,
        ):
            attributes = {"mlflow.llm.model": "gpt-4o", "mlflow.chat.tokenUsage": usage}
            span.set_attributes(attributes)
    mlflow.flush_trace_async_logging()
    with sqlite3.connect(database) as connection:
        ids = [row[0] for row in connection.execute("SELECT request_id FROM trace_info")]
        for copy in range(1, max(traces // SEEDS, 1)):
            for trace_id in ids:
                clone(connection, trace_id, f"tr-{copy:06d}{trace_id[9:]}")


def clone(connection: sqlite3.Connection, old: str, new: str) -> None:
    for table, key in (
        ("trace_info", "request_id"), ("trace_tags", "request_id"),
        ("trace_request_metadata", "request_id"), ("spans", "trace_id"),
    ):  # fmt: skip
        info = connection.execute(f"PRAGMA table_xinfo({table})")
        columns = [row[1] for row in info if row[6] == 0]  # 計算で決まる列は書けない
        values = ", ".join(
            f"REPLACE({c}, :old, :new)" if c in (key, "content") else c for c in columns
        )
        connection.execute(
            f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM {table}"
            f" WHERE {key} = :old",
            {"old": old, "new": new},
        )


def measure(way: str, uri: str, limit: int) -> dict[str, Any]:
    """1 つの方法で合計する。子プロセスで呼ばれる。"""
    import mlflow

    from chapter8_samples.cost_tracking import token_tracking
    from chapter8_samples.cost_tracking.usage.reader import find_experiment_id, iter_traces

    mlflow.set_tracking_uri(uri)
    experiment_id = find_experiment_id(NAME)
    began = time.perf_counter()
    if way == "n_plus_one":
        ids = [trace.info.trace_id for trace in iter_traces(experiment_id)]
        listed = time.perf_counter() - began
        used = [token_tracking.get_token_usage_from_trace(i) for i in ids[:limit]]
        each = (time.perf_counter() - began - listed) / len(used)
        total = sum(usage.total_tokens for usage in used if usage)
        scale = len(ids) / len(used)
        return {"seconds": listed + each * len(ids), "tokens": total if scale == 1 else None,
                "memory": peak_mb(), "scaled": scale > 1}  # fmt: skip
    tokens = None
    if way == "paged":
        tokens = token_tracking.aggregate_token_usage_from_traces(NAME).total_tokens
    else:
        for _ in iter_traces(experiment_id):
            pass
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": tokens, "memory": peak_mb()}


def peak_mb() -> float:
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=5_000)
    parser.add_argument("--one-by-one", type=int, default=200)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--uri", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options.way, options.uri, options.one_by_one)))
    else:
        report(options.traces, compare(options.traces, options.one_by_one))


def compare(traces: int, one_by_one: int) -> dict[str, dict[str, Any]]:
    """全部の方法を測る。合計が食い違えば失敗する。"""
    from chapter8_samples._lab.servers.mlflow_server import MlflowServer

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        database = Path(folder) / "bench.db"
        fill(database, traces)
        store = f"sqlite:///{database}"
        with MlflowServer(Path(folder), backend_store_uri=store) as server:
            found = {way: in_a_process(way, server.url, one_by_one) for way in WAYS}
    totals = {item["tokens"] for item in found.values() if item["tokens"] is not None}
    if len(totals) != 1:
        raise RuntimeError(f"the ways disagree: {totals}")
    return found


def headline(quick: bool) -> list[Headline]:
    """方法ごとの時間。"""
    traces, one_by_one = (20, 20) if quick else (5_000, 200)
    found = compare(traces, one_by_one)
    report(traces, found)
    seconds = {WAYS[way]: item["seconds"] for way, item in found.items()}
    fastest = seconds[WAYS["search"]]
    return [
        Headline(
            f"{traces:,} トレースのトークン数の合計",
            "、".join(f"{way} {value:.2f} 秒" for way, value in seconds.items()),
            "、".join(f"{way}は {value / fastest:.2f} 倍" for way, value in seconds.items()),
        )
    ]


def in_a_process(way: str, uri: str, limit: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--way", way, "--uri", uri, "--one-by-one", str(limit)]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout.splitlines()[-1])


def report(traces: int, found: dict[str, dict[str, Any]]) -> None:
    fastest = found["search"]["seconds"]
    rows = [
        [
            WAYS[way] + (" 換算" if item.get("scaled") else ""),
            f"{item['seconds']:.2f}", f"{item['seconds'] / fastest:.2f}",
            f"{item['memory']:.0f}", item["tokens"] or "-",
        ]
        for way, item in found.items()
    ]  # fmt: skip
    columns = ("方法", "秒", "比", "最大メモリー MB", "トークン")
    print_table(f"{traces:,} トレース(スパン 3 つずつ)の合計", columns, rows)


if __name__ == "__main__":
    main()
