"""tests/benchmarks のスクリプトが、小さな件数で最後まで動く。"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_overhead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUTF8", "1")
    rows = run("tracing_overhead.py", "--rounds", "1", "--traces", "20").splitlines()
    assert len(rows) == 4 + 8 and all(row.startswith("| ") for row in rows[4:])
    assert "| 1.00 |" in rows[4]


@pytest.mark.slow
def test_burst(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUTF8", "1")
    rows = run("tracing_burst.py", "--sqlite", "20", "--server", "20").splitlines()
    assert [row.count("| 20 | 20 | 0(0%) |") for row in rows[4:]] == [1, 1, 1, 1]
