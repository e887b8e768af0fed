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
    ("script", "want"),
    [("backfill_rerun.py", "| やり直し 1 | 0 | 12 |"), ("judge_speed.py", "| 32 |")],
)
def test_the_benchmark_runs(script: str, want: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(FOLDER / script), "4"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert want in run.stdout
