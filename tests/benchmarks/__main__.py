"""測定を全部行い、見出しの数字を 1 つの表にする。

実行::

    python tests/benchmarks             # 2 コアで 20 分ほど
    python tests/benchmarks --quick     # 動くことだけを確かめる(数字に意味はない)
    python tests/benchmarks --only cost_engine cost_sql

測定ごとに別のプロセスで行う。失敗した測定は表にそう書き、終了コードを 1 にする。詳しい表は
標準エラーに出る。``--quick`` は 2 つずつ同時に動かす。比べる相手は、入っているものだけを測る
(langfuse、arize-phoenix-otel、litellm、tokencost、genai-prices)。
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import import_module
from pathlib import Path

from bench_report import Headline, machine, markdown

HERE = Path(__file__).resolve().parent
BENCHMARKS = (
    "tracing_overhead",
    "tracing_throughput",
    "tracing_burst",
    "cost_engine",
    "cost_aggregation",
    "cost_sql",
    "judge_speed",
    "backfill_rerun",
    "alert_evaluation",
    "otlp_overhead",
    "otlp_latency",
)


def child(name: str, quick: bool) -> None:
    """1 つ測り、結果を JSON で標準出力の最後の行に書く。"""
    sys.path.insert(0, str(HERE.parents[1]))
    rows = import_module(name).headline(quick)
    print("\n" + json.dumps([asdict(row) for row in rows]), flush=True)
    os._exit(0)  # 届かない送信や、測定用のスパンの後始末を待たない


def run(name: str, quick: bool) -> tuple[list[Headline], str, str]:
    """(結果, 詳しい表, 失敗した理由)。"""
    command = [sys.executable, str(HERE), "--child", name, *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, encoding="utf-8", env=utf8(), check=False
        )
    if done.returncode:
        return [], done.stdout, done.stderr
    *details, last = done.stdout.splitlines()
    return [Headline(**row) for row in json.loads(last)], "\n".join(details), ""


def utf8() -> dict[str, str]:
    """日本語 Windows でも、子プロセスの出力を UTF-8 で受け取る。"""
    return {**os.environ, "PYTHONIOENCODING": "utf-8"}


def main() -> int:
    """順に測って表を出す。失敗した数を返す。"""
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="小さな件数で動くことだけを確かめる")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.quick)
    rows: list[tuple[str, ...]] = []
    failures = 0
    with ThreadPoolExecutor(2 if options.quick else 1) as pool:
        jobs = {name: pool.submit(run, name, options.quick) for name in options.only}
        for name, job in jobs.items():
            print(f"# {name} ...", file=sys.stderr, flush=True)
            found, details, error = job.result()
            failures += bool(error)
            print(f"{details}\n{error}", file=sys.stderr)
            command = f"`python tests/benchmarks/{name}.py`"
            rows += [(row.subject, row.result, row.ratio, command) for row in found]
            rows += [(name, "失敗", "-", command)] if error else []
    print(f"{machine()}\n\n{markdown(('測ったもの', '結果', '比', '詳しい表'), rows)}")
    print(f"\n`{' '.join(['python tests/benchmarks', *sys.argv[1:]])}`")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
