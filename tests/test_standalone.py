"""サンプルはコピーの単位: 1 ファイルだけ(必要なら隣の 1 ファイルと)持ち出しても動く。"""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import SAMPLES, sample_id

ALLOWED = {"mlflow", "databricks", "opentelemetry", "requests", "yaml", "google", "grpc"}


def imports_at_top(path: Path) -> list[ast.stmt]:
    """モジュールを読み込むときに起きる import。"""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [line for line in executed(tree.body) if isinstance(line, (ast.Import, ast.ImportFrom))]


def executed(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """条件の中も含む文。型検査だけの ``if TYPE_CHECKING`` と ``__main__`` の中は除く。"""
    for line in body:
        if isinstance(line, ast.Try):
            yield from executed([*line.body, *(n for h in line.handlers for n in h.body)])
        elif isinstance(line, ast.If):
            test = ast.unparse(line.test)
            if test != "TYPE_CHECKING" and "__main__" not in test:
                yield from executed([*line.body, *line.orelse])
        else:
            yield line


def siblings(path: Path) -> set[str]:
    """同じフォルダーから import しているモジュール。"""
    return {
        str(node.module).split(".")[0]
        for node in imports_at_top(path)
        if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module
    }


@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_imports_alone_in_an_empty_directory(path: Path, tmp_path: Path) -> None:
    for name in [path.stem, *siblings(path)]:
        shutil.copy(path.with_name(f"{name}.py"), tmp_path)
    command = [
        sys.executable,
        "-I",
        "-c",
        f"import sys; sys.path.insert(0, '.'); import {path.stem}",
    ]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_needs_at_most_one_sibling(path: Path) -> None:
    assert len(siblings(path)) <= 1
    for sibling in siblings(path):
        assert siblings(path.with_name(f"{sibling}.py")) <= {path.stem}


@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_imports_only_what_the_chapter_names(path: Path) -> None:
    beside = siblings(path)
    for node in imports_at_top(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            names = [] if node.level else [str(node.module)]
        for name in names:
            head = name.split(".")[0]
            assert head in sys.stdlib_module_names | ALLOWED | beside, f"{path.name}: {name}"
