"""本書のページを、読者と同じやり方で実行する: パスで、モジュールとして、空のディレクトリーで。"""

from __future__ import annotations

import ast
import doctest
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from samples import PARTS, ROOT, SAMPLES, alias_of, documented_run, run_as_reader, sample_id

OUTPUT = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_prints_what_the_docstring_says(
    path: Path, tmp_path: Path, database_template: Path
) -> None:
    """初めてパスで実行する読者と、データベースがあるところでモジュールとして実行する読者。"""
    outside, twins = tmp_path / "outside.log", tmp_path / "twins.log"
    hooks = {"CHAPTER8_OUTSIDE_LOG": str(outside), "CHAPTER8_TWIN_LOG": str(twins)}
    hooks["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/reader_hooks"), str(ROOT)])
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    (again / ".chapter8").mkdir(parents=True)
    shutil.copy(database_template, again / ".chapter8/mlflow.db")
    with ThreadPoolExecutor(2) as pool:  # 互いに影響しないので、同時に実行して時間を縮める
        by_path = pool.submit(run_as_reader, [path], first, environment=hooks)
        as_module = pool.submit(run_as_reader, ["-m", alias_of(path)], again, environment=hooks)
    want = documented_run(path)
    for run in (by_path.result(), as_module.result()):
        assert run.returncode == 0, run.stderr
        assert OUTPUT.check_output(want, run.stdout, FLAGS), (
            f"docstring:\n{want}\n実際:\n{run.stdout}\n{run.stderr}"
        )
    assert not outside.exists(), f"手元の外へ接続しようとした: {outside.read_text()}"
    assert not twins.exists(), f"ページが 2 つあり、状態が食い違う: {twins.read_text()}"
    assert {path.name for path in first.iterdir()} <= {".chapter8"}, "ほかのものを残した"


def test_text_is_printable_on_a_japanese_windows_console() -> None:
    for path in [*SAMPLES, *PARTS]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                try:
                    node.value.encode("cp932")
                except UnicodeEncodeError as error:
                    pytest.fail(f"{path.name}:{node.lineno}: {error}")


def test_doctests_of_the_parts() -> None:
    """部品の docstring の例。ページの例は、上で実行したときの出力。"""
    from importlib import import_module

    count = 0
    for path in PARTS:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if ">>> " in path.read_text(encoding="utf-8"):
            found = doctest.testmod(import_module(name), optionflags=FLAGS)
            assert found.failed == 0, name
            count += found.attempted
    assert count > 20
