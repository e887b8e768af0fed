"""バーストで失うトレースを、MLflow の既定値と burst の設定で比べる。

実行::

    python tests/benchmarks/tracing_burst.py                  # SQLite とサーバー、各 2,000 件
    python tests/benchmarks/tracing_burst.py --sqlite 10000 --server 0
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_report import Headline, machine

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import json, sys, time
import mlflow
from chapter8_samples.production_tracing import flush_traces, setup_production_tracing

profile, uri, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
status = setup_production_tracing(f"burst-{profile}", tracking_uri=uri, export_profile=profile)

@mlflow.trace
def answer(number):
    return number

started = time.perf_counter()
for number in range(count):
    answer(number)
produced = time.perf_counter() - started
flush_traces(3600)
seconds = time.perf_counter() - started
found = mlflow.search_traces(locations=[status.experiment_id], return_type="list",
                             include_spans=False, max_results=count + 1)
print(json.dumps([len({trace.info.trace_id for trace in found}), produced, seconds]))
"""


def environment() -> dict[str, str]:
    """利用者の設定を除いた環境変数。"""
    owned = ("MLFLOW_", "OTEL_", "LANGFUSE_", "PHOENIX_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(owned)}
    paths = [str(REPOSITORY), *filter(None, [kept.get("PYTHONPATH")])]
    offline = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_MODEL_CATALOG_URI": ""}
    return {**kept, **offline, "PYTHONPATH": os.pathsep.join(paths)}


def burst(profile: str, uri: str, count: int, folder: Path) -> tuple[int, float, float]:
    """(保存された件数, 作り終えるまでの秒数, 送り終えるまでの秒数)。"""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, profile, uri, str(count)],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
    )
    if run.returncode:
        raise RuntimeError(run.stderr)
    return tuple(json.loads(run.stdout.splitlines()[-1]))


def measure(sqlite: int, server: int) -> list[tuple[str, str, int, int, float, float]]:
    """(保存先, 設定, 件数, 保存, 作る秒数, 送る秒数) の一覧。件数 0 の保存先は測らない。"""
    rows = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        targets: list[tuple[str, str, int]] = []
        if sqlite:
            targets.append(("SQLite", f"sqlite:///{folder}/burst.db", sqlite))
        if server:
            targets.append(("サーバー", _start_server(stack, folder), server))
        for name, uri, count in targets:
            for profile in ("default", "burst"):
                rows.append((name, profile, count, *burst(profile, uri, count, folder)))
    return rows


def _start_server(stack: ExitStack, folder: Path) -> str:
    sys.path.insert(0, str(REPOSITORY))
    from chapter8_samples._lab.servers.mlflow_server import MlflowServer

    return stack.enter_context(MlflowServer(folder / "server")).url


def table(rows: list[Any]) -> str:
    """Markdown の表。"""
    lines = [
        f"バーストで失うトレース({machine()})",
        "",
        "| 保存先 | 設定 | 件数 | 保存 | 消失 | 毎秒の保存 |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, profile, count, stored, _produced, seconds in rows:
        lost = f"{count - stored:,}({1 - stored / count:.0%})"
        rate = f"{stored / seconds:.0f}"
        lines.append(f"| {name} | {profile} | {count:,} | {stored:,} | {lost} | {rate} |")
    return "\n".join(lines)


def headline(quick: bool) -> list[Headline]:
    """保存先ごとの、既定値と burst の消失。"""
    rows = measure(20, 20) if quick else measure(2_000, 2_000)
    print(table(rows))
    found: list[Headline] = []
    for (name, _, count, default, *_), (*_, burst, _, _) in zip(rows[::2], rows[1::2], strict=True):
        found.append(
            Headline(
                f"{count:,} 件のバースト({name})で失うトレース",
                f"MLflow の既定値 {count - default:,} 件、8.1 の設定 {count - burst:,} 件",
                f"保存した数は既定値の {burst / default:.2f} 倍",
            )
        )
    return found


def main() -> None:
    """測って表を出す。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sqlite", type=int, default=2_000, help="SQLite での件数(0 で省く)")
    parser.add_argument("--server", type=int, default=2_000, help="サーバーでの件数(0 で省く)")
    arguments = parser.parse_args()
    print(table(measure(arguments.sqlite, arguments.server)))


if __name__ == "__main__":
    main()
