"""本書のページと章の全体を、読者と同じやり方で、空のディレクトリーで実行する。"""

from __future__ import annotations

import ast
import doctest
import re
import shutil
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from reader_environment import checkout, new_environment
from samples import (
    CHAPTER,
    PARTS,
    ROOT,
    SAMPLES,
    Run,
    alias_of,
    check_steps,
    documented_run,
    run_as_reader,
    run_watched,
    sample_id,
)

OUTPUT = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=sample_id(p), marks=pytest.mark.needs_run(sample_id(p))) for p in SAMPLES],
)
def test_prints_what_the_docstring_says(path: Path, runs: dict[str, Future[Run]]) -> None:
    check(path, runs[sample_id(path)].result())


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Python、リポジトリー)。依存パッケージはあるが、プロジェクトは入れていない。"""
    here = tmp_path_factory.mktemp("bare")
    return new_environment(here / "venv"), checkout(here / "checkout")


@pytest.mark.slow
@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_prints_the_same_as_a_module_of_a_bare_checkout(
    path: Path, bare: tuple[Path, Path], tmp_path: Path
) -> None:
    """初めて、リポジトリーの中から ``python -m`` で実行する読者。"""
    python, root = bare
    shutil.rmtree(root / ".chapter8", ignore_errors=True)
    before = {path.name for path in root.iterdir()}
    run = run_watched(["-m", alias_of(path)], root, tmp_path, python=python)
    check(path, replace(run, left=run.left - before))


@pytest.mark.needs_run(CHAPTER)
def test_the_whole_chapter_holds(runs: dict[str, Future[Run]]) -> None:
    """``python -m chapter8_samples``: すべての手順が OK になり、次にすることを示す。"""
    run = runs[CHAPTER].result()
    assert (run.done.returncode, run.done.stderr) == (0, ""), run.done.stdout + run.done.stderr
    check_steps(run.done.stdout)
    assert "python -m chapter8_samples ui" in run.done.stdout
    assert str(run.directory / "health_report.html") in run.done.stdout
    assert (run.outside, run.left) == ("", {".chapter8", "health_report.html"})


@pytest.mark.needs_run(CHAPTER)
def test_the_report_is_one_file_with_charts(runs: dict[str, Future[Run]]) -> None:
    html = (runs[CHAPTER].result().directory / "health_report.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 4
    assert not re.search(r"""(?:src|href)=["']?(?:https?:|//)""", html)
    for mark in ("release", "alert", "rollback", "resolved"):
        assert f'class="mark {mark}"' in html


@pytest.mark.needs_run(CHAPTER)
def test_the_report_of_the_stored_traces_can_be_made_at_any_time(
    runs: dict[str, Future[Run]],
) -> None:
    directory = runs[CHAPTER].result().directory
    command = ["-m", "chapter8_samples", "report", "-o", "again.html"]
    run = run_as_reader(command, directory, environment={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stdout + run.stderr
    html = (directory / "again.html").read_text(encoding="utf-8")
    assert "<b>120 件</b><small>失敗 0 件" in html
    assert html.count("<svg") >= 4


def check(path: Path, run: Run) -> None:
    want = documented_run(path)
    assert run.done.returncode == 0, run.done.stderr
    assert OUTPUT.check_output(want, run.done.stdout, FLAGS), (
        f"docstring:\n{want}\n実際:\n{run.done.stdout}\n{run.done.stderr}"
    )
    assert (run.outside, run.twins) == ("", "")
    assert run.left <= {".chapter8"}


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
