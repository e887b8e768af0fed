"""配布物(wheel と sdist)を作り、何もない環境に入れて、README のとおりに使う。"""

from __future__ import annotations

import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging_builds import install, sdist, wheel
from reader_environment import new_environment
from samples import ROOT, run_as_reader

pytestmark = pytest.mark.slow
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK_STARTS = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """依存パッケージはこの環境のものを使い、サンプル自身は wheel からだけ読む Python。"""
    environment = tmp_path_factory.mktemp("installed")
    python = new_environment(environment)
    install(built, environment)
    return python


def tracked() -> list[str]:
    """パッケージの中の、Git が管理する全ファイル。"""
    command = ["git", "-c", "safe.directory=*", "ls-files", "chapter8_samples"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    return sorted(run.stdout.split())


def test_both_hold_every_file_of_the_package_and_no_test(built: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(built).namelist()
    assert sorted(name for name in names if name.startswith("chapter8_samples/")) == tracked()
    assert [name for name in names if name.startswith("tests/")] == []
    with tarfile.open(sdist(tmp_path)) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked()) <= inside
    assert {"README.md", "pyproject.toml", "requirements.txt", "tests/conftest.py"} <= inside


def test_quick_starts_run_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    code = "import chapter8_samples; print(chapter8_samples.__file__)\n" + QUICK_STARTS
    run = run_as_reader(["-c", code], tmp_path, python=installed)
    assert run.returncode == 0, run.stderr
    origin, price = run.stdout.split()
    assert Path(origin).is_relative_to(installed.parents[1])
    assert price == "0.0075"


def test_pages_and_commands_run_from_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    page = "chapter8_samples.cost_tracking.cost_calculator"
    run = run_as_reader(["-W", "error", "-m", page], tmp_path, python=installed)
    assert run.returncode == 0 and run.stdout, run.stderr
    for section in ("alerting", "cost_tracking", "opentelemetry", "production_tracing"):
        run = run_as_reader(
            ["-m", f"chapter8_samples.{section}", "--help"], tmp_path, python=installed
        )
        assert run.returncode == 0, run.stderr
    # 番号付きフォルダーにある SQL も見つかる
    command = ["-m", "chapter8_samples.cost_tracking", "sql", "x", "--query", "nope"]
    run = run_as_reader(command, tmp_path, python=installed)
    assert run.returncode == 2 and "choose from daily_summary" in run.stderr, run.stderr
