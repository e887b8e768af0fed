"""README の中身: コードの例、リンク、ファイルの一覧(コマンドは test_reader_commands.py)。"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from samples import ROOT, SAMPLES, run_as_reader

READMES = [ROOT / "README.md", ROOT / "chapter8_samples" / "README.md"]


def examples() -> list[tuple[str, str]]:
    """(README, Python の例)。"""
    fence = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    return [
        (readme.relative_to(ROOT).as_posix(), code)
        for readme in READMES
        for code in fence.findall(readme.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(("readme", "code"), examples())
@pytest.mark.slow
def test_python_block_runs(readme: str, code: str, tmp_path: Path) -> None:
    """空のディレクトリーで、環境変数なしで。``# ->`` のあとは印字される値。"""
    run = run_as_reader(["-c", code], tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, f"{readme}: {run.stderr}"
    assert run.stdout.split() == re.findall(r"# -> (\S+)", code)


def test_every_block_names_a_language_that_is_tested() -> None:
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        opening = re.findall(r"^```(\w*)$", text, re.MULTILINE)[::2]
        assert set(opening) <= {"bash", "python", "text", "mermaid"}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links_and_files_exist(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not target.startswith("http"):
            assert (readme.parent / target).exists(), target


def test_every_sample_is_listed_in_both_readmes() -> None:
    for readme in READMES:
        text = readme.read_text(encoding="utf-8")
        missing = [path.name for path in SAMPLES if path.name not in text]
        assert missing == [], readme


def test_requirement_files_are_bounded_and_end_with_the_project() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n")
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted[-1] == "-e ."
    assert all(re.search(r"[<>]=?\d", line) for line in wanted[:-1])
    production = (ROOT / "requirements-prod.txt").read_text(encoding="utf-8")
    names = set(re.findall(r"^([A-Za-z][\w-]*)", production, re.MULTILINE))
    assert names == {
        "mlflow-tracing",
        "opentelemetry-sdk",
        "opentelemetry-exporter-otlp",
        "requests",
        "PyYAML",
    }


def test_help_names_every_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "chapter8_samples", "--help"],
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
        env={"PYTHONIOENCODING": "utf-8"},
    )
    assert all(word in run.stdout for word in ("report", "serve", "ui", "--keep", "--fresh"))
