"""本書のページを、読者と同じやり方で実行する: パスで、モジュールとして、空のディレクトリーで。"""

from __future__ import annotations

import ast
import doctest
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from samples import PARTS, ROOT, SAMPLES, alias_of, documented_run, run_as_reader, sample_id

OUTPUT = doctest.OutputChecker()
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.fixture(scope="module")
def two_cores() -> Iterator[ThreadPoolExecutor]:
    """ページは互いに影響しないので、2 つずつ実行する。"""
    with ThreadPoolExecutor(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def by_path(
    two_cores: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> dict[Path, Future[Run]]:
    """何もない空のディレクトリーで、初めて実行する読者。"""
    return {
        path: two_cores.submit(run_watched, [path], tmp_path_factory.mktemp(path.stem))
        for path in SAMPLES
    }


@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_prints_what_the_docstring_says(path: Path, by_path: dict[Path, Future[Run]]) -> None:
    check(path, by_path[path].result())


@pytest.mark.slow
@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_prints_the_same_as_a_module(path: Path, tmp_path: Path, database_template: Path) -> None:
    """データベースがあるところで、``python -m`` で実行する読者。"""
    (tmp_path / ".chapter8").mkdir()
    shutil.copy(database_template, tmp_path / ".chapter8/mlflow.db")
    check(path, run_watched(["-m", alias_of(path)], tmp_path))


@dataclass(frozen=True)
class Run:
    """見張りながらの実行の、結果と、残したもの。"""

    done: subprocess.CompletedProcess[str]
    outside: str
    """手元の外へ出ようとした接続。"""
    twins: str
    """ページが 2 つ読み込まれ、状態が食い違ったもの。"""
    left: set[str]


def run_watched(arguments: list[str | Path], directory: Path) -> Run:
    logs = directory.with_name(f"{directory.name}-logs")
    logs.mkdir()
    outside, twins = logs / "outside", logs / "twins"
    hooks = {"CHAPTER8_OUTSIDE_LOG": str(outside), "CHAPTER8_TWIN_LOG": str(twins)}
    hooks["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests/reader_hooks"), str(ROOT)])
    done = run_as_reader(arguments, directory, environment=hooks)
    noted = [log.read_text(encoding="utf-8") if log.exists() else "" for log in (outside, twins)]
    return Run(done, *noted, {path.name for path in directory.iterdir()})


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
