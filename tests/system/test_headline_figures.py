"""``python tests/benchmarks --quick`` で全部の測定が動き、1 つの表になる(数字は見ない)。"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from samples import ROOT, run_as_reader

FOLDER = ROOT / "tests/benchmarks"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_benchmark_gives_its_headline(tmp_path: Path) -> None:
    run = run_as_reader([FOLDER, "--quick"], tmp_path, encoding="utf-8", timeout=580)
    assert run.returncode == 0, run.stderr
    machine, _, header, rule, *rows, _, command = run.stdout.splitlines()
    assert re.match(r"20\d\d-\d\d-\d\d、.* コア、Python 3\.\d+", machine)
    assert (header.count("|"), set(rule)) == (5, {"|", "-"})
    assert command == "`python tests/benchmarks --quick`"
    assert all(re.search(r"\d", row.split("|")[2]) for row in rows), rows
    measured = {name for row in rows for name in re.findall(r"(\w+)\.py`", row)}
    assert measured == {path.stem for path in FOLDER.glob("*.py") if has_headline(path)}


def has_headline(path: Path) -> bool:
    return "\ndef headline(" in path.read_text(encoding="utf-8")


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
