"""測定用のスクリプトが、小さな大きさで最後まで動く。"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "want"),
    [
        ("cost_engine.py", "--calls 50 --spans 20 --imports 1", "| CostCalculator.calculate |"),
        ("cost_aggregation.py", "--traces 20 --one-by-one 20", "| サーバーの集計 |"),
        ("cost_sql.py", "--rows 300 --repeat 1", "| token_efficiency |"),
    ],
)
def test_the_benchmark_runs(script: str, arguments: str, want: str, tmp_path: Path) -> None:
    if script == "cost_sql.py":
        pytest.importorskip("duckdb", reason="pip install 'chapter8-samples[sql]' で入る")
    run = subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert want in run.stdout
