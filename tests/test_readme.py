"""README の中身: コードの例、リンク、ファイルの一覧(コマンドは system/test_reader_commands.py)。"""

from __future__ import annotations

import re
from pathlib import Path

from samples import ROOT, SAMPLES, SECTIONS, run_as_reader

from chapter8_samples.__main__ import parser

READMES = [
    ROOT / "README.md",
    ROOT / "chapter8_samples/README.md",
    ROOT / "tests/README.md",
    ROOT / "tests/benchmarks/README.md",
]


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


def test_first_success_is_on_the_first_screen() -> None:
    lines = text_of(READMES[0]).splitlines()
    assert lines[4] == "pip install -r requirements.txt && python -m chapter8_samples"
    assert lines[7].startswith("![")
    assert len(text_of(READMES[0])) <= 9_000
    assert len(text_of(READMES[1])) <= 12_000


def test_every_page_and_every_part_is_listed() -> None:
    """部品は、モジュールかサブパッケージごとに 1 行。"""
    top, guide = text_of(READMES[0]), text_of(READMES[1])
    assert [p.name for p in SAMPLES if p.name not in top or p.name not in guide] == []
    package = ROOT / "chapter8_samples"
    parts = [
        path for name in SECTIONS for path in (package / name).iterdir() if path.name[0] != "_"
    ]
    subjects = [path for path in parts if path.suffix == ".py" or (path / "__init__.py").exists()]
    names = [f"]({path.relative_to(package).as_posix()}{'/' * path.is_dir()})" for path in subjects]
    assert [name for name in names if name not in guide] == []


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
    assert all(word in words for word in ("report", "doctor", "serve", "ui", "--fresh"))
