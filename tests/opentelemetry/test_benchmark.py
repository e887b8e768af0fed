"""測定が動き、スパンを失わず、表になる(数値の良し悪しは見ない)。"""

from __future__ import annotations

from pathlib import Path

import pytest
from samples import ROOT, run_as_reader

pytestmark = pytest.mark.slow


def table(tmp_path: Path, script: str, *sizes: str) -> list[list[str]]:
    """表の行。1 つ目は見出し。"""
    run = run_as_reader([ROOT / "tests/benchmarks" / script, *sizes], tmp_path)
    assert run.returncode == 0, run.stderr
    header, _, *rows = [line for line in run.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in (header, *rows)]


def test_the_overhead_of_every_configuration(tmp_path: Path) -> None:
    _, *rows = table(tmp_path, "otlp_overhead.py", "--rounds", "1", "--requests", "4")
    assert len(rows) == 7
    assert rows[0][2] == rows[1][3] == "1.00"
    assert all(float(cell) > 0 for row in rows for cell in row[1:])


def test_the_latency_beside_every_state_of_the_collector(tmp_path: Path) -> None:
    _, *rows = table(tmp_path, "otlp_latency.py", "--rounds", "10", "--per-second", "5")
    *states, dead = [row[0].split("は")[-1] for row in rows[1:]]
    assert states == ["動作中", "停止", "無応答"] * 2
    assert dead == "停止と無応答を合わせたもの"
    assert all(float(row[4].split("(")[0]) > 0 for row in rows)
