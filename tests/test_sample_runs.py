"""サンプル全部を、読者と同じやり方で実行する。"""

from __future__ import annotations

import ast
import doctest
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from samples import ROOT, SAMPLES, alias_of, documented_run, run_as_reader, sample_id

OUTPUT = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
SEED_FILES = {
    "01_production_tracing": {
        "basic_setup.py",
        "graceful_shutdown.py",
        "metadata_tagging.py",
        "sampling_strategies.py",
    },
    "02_cost_tracking": {"token_tracking.py", "cost_calculator.py", "cost_analysis.sql"},
    "03_quality_monitoring": {
        "feedback_collection.py",
        "scorer_setup.py",
        "scorer_lifecycle.py",
        "backfill_scorers.py",
    },
    "04_alerting": {"alert_config.py", "notification_handlers.py", "rollback.py"},
    "05_opentelemetry": {"otlp_setup.py", "otel-collector-config.yaml"},
}


@pytest.mark.parametrize("folder", SEED_FILES)
def test_files_of_the_chapter_exist(folder: str) -> None:
    present = {path.name for path in (ROOT / "chapter8_samples" / folder).iterdir()}
    assert present >= SEED_FILES[folder]


@pytest.mark.slow
@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_prints_what_the_docstring_says(
    path: Path, tmp_path: Path, database_template: Path
) -> None:
    """初めてパスで実行する読者と、データベースがあるところでモジュールとして実行する読者。"""
    outside = tmp_path / "outside.log"
    guard = {
        "PYTHONPATH": str(ROOT / "tests/loopback_guard"),
        "CHAPTER8_OUTSIDE_LOG": str(outside),
    }
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    (again / ".chapter8").mkdir(parents=True)
    shutil.copy(database_template, again / ".chapter8/mlflow.db")
    with ThreadPoolExecutor(2) as pool:  # 互いに影響しないので、同時に実行して時間を縮める
        by_path = pool.submit(run_as_reader, [path], first, environment=guard)
        as_module = pool.submit(
            run_as_reader, ["-m", alias_of(path)], again, environment={"PYTHONPATH": str(ROOT)}
        )
    want = documented_run(path)
    for run in (by_path.result(), as_module.result()):
        assert run.returncode == 0, run.stderr
        assert OUTPUT.check_output(want, run.stdout, FLAGS), (
            f"docstring:\n{want}\n実際:\n{run.stdout}\n{run.stderr}"
        )
    assert not outside.exists(), f"手元の外へ接続しようとした: {outside.read_text()}"


@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_the_lab_is_imported_only_inside_main(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    outside = [node for node in tree.body if getattr(node, "name", "") != "main"]
    lines = [
        node.lineno
        for top in outside
        for node in ast.walk(top)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "_lab" in ast.unparse(node)
    ]
    assert lines == []


@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_text_is_printable_on_a_japanese_windows_console(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value.encode("cp932")  # 出せない文字があれば UnicodeEncodeError
