"""測定のスクリプトは動き、4 つの出どころの値が一致することも確かめる。"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "alert_evaluation.py"


@pytest.mark.slow
def test_the_benchmark_prints_a_table(tmp_path: Path) -> None:
    arguments = ["--traces", "72", "--hours", "1.2", "--repeats", "1"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table] == [
        "窓",
        "---",
        "1m (1 件)",
        "12m (12 件)",
        "1h12m (72 件)",
        "標準の 4 ルールを 1 回評価",
    ]
    assert all(re.search(r"\| [\d.]+ 倍 \|$", line) for line in table[2:])
