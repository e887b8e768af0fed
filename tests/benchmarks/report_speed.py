"""1 つのエクスペリメントの健全性レポートにかかる時間を測る。

実行::

    $ python tests/benchmarks/report_speed.py --traces 10000

SQLite に 24 時間分のトレース(コスト、利用者、モデル、スコアラーの判定、👍/👎 付き)を作り、
``python -m chapter8_samples report`` を別のプロセスで動かして、起動から終了までを測る。
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from bench_report import print_table  # noqa: E402

NAME, HOURS, PROMPT = "report-speed", 24, "support-bot"
INCIDENT = (0.70, 0.75)  # 期間に対する割合
TABLES = (
    ("trace_info", "request_id"), ("trace_tags", "request_id"),
    ("trace_request_metadata", "request_id"), ("assessments", "trace_id"),
)  # fmt: skip


def seed(database: Path, traces: int, *, end_ms: int | None = None) -> None:
    """数件を普通に記録し、残りはデータベースの行を、時刻などを変えて複製する。"""
    random.seed(8)
    originals = _originals(database)
    end_ms = end_ms or time.time_ns() // 1_000_000
    with sqlite3.connect(database) as connection:
        columns = {table: _columns(connection, table) for table, _ in TABLES}
        for number in range(traces):
            place = number / traces
            bad = INCIDENT[0] <= place < INCIDENT[1]
            at_ms = int(end_ms - HOURS * 3_600_000 * (1 - place)) + 1
            _copy(connection, columns, random.choice(originals[bad]), number, at_ms, bad)
        for table, key in TABLES:
            ids = [(trace_id,) for group in originals.values() for trace_id in group]
            connection.executemany(f"DELETE FROM {table} WHERE {key} = ?", ids)


def _originals(database: Path) -> dict[bool, list[str]]:
    """ひな型: 平常時 20 件(失敗 1 件)と障害中 10 件(失敗 3 件)。"""
    import mlflow

    from chapter8_samples.cost_tracking import setup_cost_tracking

    mlflow.set_tracking_uri(f"sqlite:///{database}")
    mlflow.set_experiment(NAME)
    setup_cost_tracking()
    found: dict[bool, list[str]] = {False: [], True: []}
    for number in range(30):
        bad = number >= 20
        found[bad].append(_trace(number, bad, failed=number in (7, 21, 24, 27)))
    mlflow.flush_trace_async_logging()
    for bad, group in found.items():
        for number, trace_id in enumerate(group):
            _judge(trace_id, number, bad)
    return found


def _trace(number: int, bad: bool, failed: bool) -> str:
    import mlflow

    model = ("gpt-4o-mini", "gpt-4o", "claude-3-5-haiku-20241022")[number % 3]
    usage = {"input_tokens": 900 + number, "output_tokens": 900 if bad else 200}
    usage["total_tokens"] = sum(usage.values())
    with mlflow.start_span("support_bot") as root:
        mlflow.update_current_trace(
            user=f"user-{number % 12:02}", tags={"prompt.version": "2" if bad else "1"}
        )
        with mlflow.start_span("llm", "CHAT_MODEL") as span:
            span.set_attributes({"mlflow.llm.model": model, "mlflow.chat.tokenUsage": usage})
        if failed:
            root.set_status("ERROR")
    return root.trace_id


def _judge(trace_id: str, number: int, bad: bool) -> None:
    import mlflow
    from mlflow.entities import AssessmentSource

    judge = AssessmentSource(source_type="LLM_JUDGE", source_id="stub")
    grounded = "no" if (bad and number % 3) or number == 3 else "yes"
    for name, value in (("groundedness_check", grounded), ("safety_check", "yes")):
        mlflow.log_feedback(trace_id=trace_id, name=name, value=value, source=judge)
    if number % 4 == 0:
        person = AssessmentSource(source_type="HUMAN", source_id="u")
        mlflow.log_feedback(
            trace_id=trace_id, name="user_thumbs", value=grounded == "yes", source=person
        )


def _columns(connection: sqlite3.Connection, table: str) -> list[str]:
    return [row[1] for row in connection.execute(f"PRAGMA table_xinfo({table})") if row[6] == 0]


def _copy(
    connection: sqlite3.Connection, columns: dict[str, list[str]], old: str, number: int,
    at_ms: int, bad: bool,
) -> None:  # fmt: skip
    new = f"tr-{number:032x}"
    latency = int(random.lognormvariate(6.6, 0.5)) * (4 if bad else 1)
    changed: dict[str, Any] = {
        "timestamp_ms": at_ms, "execution_time_ms": latency, "client_request_id": None,
        "assessment_id": None,
    }  # fmt: skip
    for table, key in TABLES:
        names = columns[table]
        places = ", ".join(_value(name, key, changed) for name in names)
        connection.execute(
            f"INSERT INTO {table} ({', '.join(names)}) SELECT {places} FROM {table}"
            f" WHERE {key} = :old",
            {"old": old, "new": new, "timestamp_ms": at_ms, "execution_time_ms": latency},
        )


def _value(name: str, key: str, changed: dict[str, Any]) -> str:
    if name == key:
        return ":new"
    if name == "assessment_id":
        return "'a-' || lower(hex(randomblob(16)))"
    if name not in changed:
        return name
    return "NULL" if changed[name] is None else f":{name}"


def measure(database: Path, output: Path) -> tuple[float, float, float]:
    """レポートを別のプロセスで作り、(秒, CPU の秒, 最大メモリー MB) を返す。"""
    import resource

    command = [
        sys.executable, "-m", "chapter8_samples", "report", "--experiment", NAME,
        "--since", "25h", "-o", str(output),
    ]  # fmt: skip
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CHAPTER8_LAB": str(database.parent),
        "MLFLOW_TRACKING_URI": f"sqlite:///{database}",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu, after.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--traces", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="レポートを残すファイル")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        database = Path(folder) / "bench.db"
        seed(database, options.traces)
        output = options.output or Path(folder) / "report.html"
        found = [measure(database, output) for _ in range(options.runs)]
        size_kb = output.stat().st_size / 1024
    seconds = sorted(run[0] for run in found)
    cpu = sorted(run[1] for run in found)
    if options.json:
        print(json.dumps({"traces": options.traces, "seconds": seconds, "cpu_seconds": cpu}))
        return
    print_table(
        f"{options.traces:,} トレースの健全性レポート(SQLite、プロセスの起動から終了まで)",
        ("中央値 秒", "最短", "最長", "CPU 秒", "最大メモリー MB", "HTML KB"),
        [[f"{seconds[len(seconds) // 2]:.1f}", f"{seconds[0]:.1f}", f"{seconds[-1]:.1f}",
          f"{cpu[len(cpu) // 2]:.1f}", f"{max(run[2] for run in found):.0f}", f"{size_kb:.0f}"]],
    )  # fmt: skip


if __name__ == "__main__":
    main()
