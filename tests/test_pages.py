"""本書のページと章の全体を、読者と同じやり方で、空のディレクトリーで実行する。"""

from __future__ import annotations

import ast
import doctest
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from reader_environment import checkout, new_environment
from samples import (
    PARTS,
    ROOT,
    SAMPLES,
    alias_of,
    check_steps,
    documented_run,
    run_as_reader,
    sample_id,
)

OUTPUT = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
CHAPTER = "the whole chapter"
RUNS: Mapping[str, Sequence[str | Path]] = {CHAPTER: ["-m", "chapter8_samples"]} | {
    sample_id(path): [path] for path in SAMPLES
}


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    database_template: Path,
) -> Iterator[dict[str, Future[Run]]]:
    """選ばれたテストに要る実行。互いに影響しないので、3 つずつ行う(待っている時間が長い)。

    どれも空のディレクトリーから始める。ページの SQLite には、表(作るのに 4 秒かかる)だけがある。
    何もないところからは、章の全体と、``slow`` の全ページを実行する。
    """
    marks = [mark for item in request.session.items for mark in item.iter_markers("needs_run")]
    wanted = {mark.args[0] for mark in marks}
    with ThreadPoolExecutor(3) as pool:
        runs = dict[str, Future[Run]]()
        for name in filter(wanted.__contains__, RUNS):
            directory = tmp_path_factory.mktemp("reader")
            if name != CHAPTER:
                (directory / ".chapter8").mkdir()
                shutil.copy(database_template, directory / ".chapter8/mlflow.db")
            logs = tmp_path_factory.mktemp("logs")
            runs[name] = pool.submit(run_watched, RUNS[name], directory, logs)
        yield runs


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


@dataclass(frozen=True)
class Run:
    """見張りながらの実行の、結果と、残したもの。"""

    directory: Path
    done: subprocess.CompletedProcess[str]
    outside: str
    """手元の外へ出ようとした接続。"""
    twins: str
    """ページが 2 つ読み込まれ、状態が食い違ったもの。"""
    left: set[str]


def run_watched(
    arguments: Sequence[str | Path], directory: Path, logs: Path, python: Path | None = None
) -> Run:
    outside, twins = logs / "outside", logs / "twins"
    hooks = {
        "CHAPTER8_OUTSIDE_LOG": str(outside),
        "CHAPTER8_TWIN_LOG": str(twins),
        "PYTHONPATH": str(ROOT / "tests/reader_hooks"),
    }
    program = python or sys.executable
    done = run_as_reader(arguments, directory, python=program, environment=hooks, timeout=240)
    noted = [log.read_text(encoding="utf-8") if log.exists() else "" for log in (outside, twins)]
    return Run(directory, done, *noted, {path.name for path in directory.iterdir()})


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
