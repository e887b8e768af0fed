"""README の中身: コードの例、リンク、ファイルの一覧(コマンドは system/test_reader_commands.py)。"""

from __future__ import annotations

import re
from pathlib import Path

from samples import PARTS, ROOT, SAMPLES, run_as_reader

from chapter8_samples.__main__ import parser

READMES = [ROOT / "README.md", ROOT / "chapter8_samples/README.md", ROOT / "tests/README.md"]


def text_of(readme: Path) -> str:
    return readme.read_text(encoding="utf-8")


def test_python_blocks_run(tmp_path: Path) -> None:
    """空のディレクトリーで、環境変数なしで、上から順に。``# ->`` のあとは印字される値。"""
    fence = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
    code = "\n".join(block for readme in READMES for block in fence.findall(text_of(readme)))
    run = run_as_reader(["-c", code], tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == re.findall(r"# -> (\S+)", code) == ["0.0075"]


def test_every_block_names_a_language_that_is_tested() -> None:
    for readme in READMES:
        opening = re.findall(r"^```(\w*)$", text_of(readme), re.MULTILINE)[::2]
        assert set(opening) <= {"bash", "python", "text", "mermaid"}, readme


def test_links_and_files_exist() -> None:
    for readme in READMES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text_of(readme)):
            if not target.startswith("http"):
                assert (readme.parent / target).exists(), f"{readme}: {target}"


def test_every_page_and_every_part_is_listed() -> None:
    top, guide = text_of(READMES[0]), text_of(READMES[1])
    assert [p.name for p in SAMPLES if p.name not in top or p.name not in guide] == []
    parts = [path.relative_to(ROOT / "chapter8_samples").as_posix() for path in PARTS]
    assert [part for part in parts if f"]({part})" not in guide] == []


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
        "pydantic",
        "PyYAML",
    }


def test_help_names_every_command() -> None:
    words = parser().format_help()
    assert all(word in words for word in ("report", "doctor", "serve", "ui", "--keep", "--fresh"))
