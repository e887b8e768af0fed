"""測定のスクリプトが、小さな件数で最後まで動く(数字の良し悪しは見ない)。

``python tests/benchmarks --quick`` の 1 回で、全部の詳しい表と、見出しの数字の表を確かめる。
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from samples import ROOT, run_as_reader

pytestmark = pytest.mark.system
FOLDER = ROOT / "tests/benchmarks"
Table = list[list[str]]


@pytest.mark.timeout(600)
def test_every_benchmark_gives_its_tables_and_its_headline(tmp_path: Path) -> None:
    run = run_as_reader([FOLDER, "--quick"], tmp_path, encoding="utf-8", timeout=580)
    assert run.returncode == 0, run.stderr
    check_headlines(run.stdout)
    parts = re.split(r"^# (\w+) \.\.\.$", run.stderr, flags=re.MULTILINE)
    tables = {name: table(text) for name, text in zip(parts[1::2], parts[2::2], strict=True)}
    for name, found in tables.items():
        CHECKS[name](found)
    assert set(tables) == set(CHECKS)


def check_headlines(out: str) -> None:
    machine, _, header, rule, *rows, _, command = out.splitlines()
    assert re.match(r"20\d\d-\d\d-\d\d、.* コア、Python 3\.\d+", machine)
    assert (header.count("|"), set(rule)) == (5, {"|", "-"})
    assert command == "`python tests/benchmarks --quick`"
    assert all(re.search(r"\d", row.split("|")[2]) for row in rows), rows
    measured = {name for row in rows for name in re.findall(r"(\w+)\.py`", row)}
    assert measured == {path.stem for path in FOLDER.glob("*.py") if has_headline(path)}


def has_headline(path: Path) -> bool:
    return "\ndef headline(" in path.read_text(encoding="utf-8")


def table(text: str) -> Table:
    """詳しい表の行(見出しと区切りを除く)。"""
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line] for line in lines]
    rules = {i for i, row in enumerate(rows) if set("".join(row)) <= set("-:")}
    return [row for i, row in enumerate(rows) if i not in rules and i + 1 not in rules]


def tracing_overhead(rows: Table) -> None:
    assert len(rows) == 8 and rows[0][2] == "1.00"


def tracing_throughput(rows: Table) -> None:
    assert {row[1] for row in rows} == {"受信だけ", "保存まで"}
    assert all(row[3] == "0" for row in rows if row[2] != "未インストール"), rows


def tracing_burst(rows: Table) -> None:
    """これだけ少なければ、どの設定でも失わない。"""
    assert [row[2:5] for row in rows] == [["20", "20", "0(0%)"]] * 4


def cost_engine(rows: Table) -> None:
    assert rows[0][0] == "CostCalculator.calculate"
    assert [row[0] for row in rows[-2:]] == ["呼び出しのコストの記録", "トレースの合計の記録"]


def cost_aggregation(rows: Table) -> None:
    assert [row[0] for row in rows] == ["1 件ずつ(N+1)", "ページ", "MLflow の検索だけ"]


def cost_sql(rows: Table) -> None:
    assert len(rows) == 10 and "token_efficiency" in {row[0] for row in rows}


def judge_speed(rows: Table) -> None:
    assert [row[0] for row in rows] == ["1", "8(既定)", "16", "32"]


def backfill_rerun(rows: Table) -> None:
    assert [row[1:3] for row in rows] == [["30", "0"], *[["0", "30"]] * 3]


def alert_evaluation(rows: Table) -> None:
    windows = ["1m (1 件)", "12m (12 件)", "1h12m (72 件)"]
    rules = ["4 ルールを 1 回評価", "標準の 12 ルールを 1 回評価"]
    assert [row[0] for row in rows] == [*windows, *rules]
    assert all(re.fullmatch(r"[\d.]+ 倍", row[-1]) for row in rows)


def otlp_overhead(rows: Table) -> None:
    assert len(rows) == 7
    assert rows[0][2] == rows[1][3] == "1.00"
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


def otlp_latency(rows: Table) -> None:
    *states, dead = [row[0].split("は")[-1] for row in rows[1:]]
    assert states == ["動作中", "停止", "無応答"] * 2
    assert dead == "停止と無応答を合わせたもの"
    assert all(float(row[4].split("(")[0]) > 0 for row in rows)


CHECKS = {
    check.__name__: check
    for check in (
        *(tracing_overhead, tracing_throughput, tracing_burst),
        *(cost_engine, cost_aggregation, cost_sql),
        *(judge_speed, backfill_rerun, alert_evaluation),
        *(otlp_overhead, otlp_latency),
    )
}


def test_the_time_of_a_report(tmp_path: Path) -> None:
    """見出しの表にはない、レポートの時間。"""
    arguments = [FOLDER / "report_speed.py", "--traces", "60", "--runs", "1"]
    run = run_as_reader(arguments, tmp_path, encoding="utf-8")
    assert run.returncode == 0, run.stderr
    ((*seconds, _, _, size),) = table(run.stdout)
    assert all(float(one) > 0 for one in (*seconds, size))


def test_a_failing_benchmark_is_said_and_fails(tmp_path: Path) -> None:
    """測定が壊れたら、表にそう書き、終了コードを 1 にする。"""
    for name in ("__main__", "bench_report"):
        source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
        (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    broken = "def headline(quick):\n    raise RuntimeError('no such table')\n"
    (tmp_path / "cost_sql.py").write_text(broken, encoding="utf-8")
    run = run_as_reader([tmp_path, "--only", "cost_sql"], tmp_path, encoding="utf-8")
    assert run.returncode == 1
    assert "| cost_sql | 失敗 |" in run.stdout and "no such table" in run.stderr
