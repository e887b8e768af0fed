"""wheel を作り、何もない環境に入れて、README のとおりに使う。"""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from reader_environment import new_environment, site_packages
from samples import ROOT, SAMPLES, run_as_reader

pytestmark = pytest.mark.slow
DATA_FILES = [
    "chapter8_samples/02_cost_tracking/cost_analysis.sql",
    "chapter8_samples/05_opentelemetry/otel-collector-config.yaml",
    "chapter8_samples/_lab/data/documents.jsonl",
    "chapter8_samples/_lab/data/questions.jsonl",
    "chapter8_samples/_lab/templates/report.html.j2",
    "chapter8_samples/production_tracing/__init__.pyi",
    "chapter8_samples/py.typed",
]
README = (ROOT / "README.md").read_text(encoding="utf-8")
QUICK_STARTS = "\n".join(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    run = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_every_sample_and_data_file(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    expected = [path.relative_to(ROOT).as_posix() for path in SAMPLES] + DATA_FILES
    assert [name for name in expected if name not in names] == []
    assert [name for name in names if name.startswith("tests/")] == []


def test_quick_starts_run_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """依存パッケージはこの環境のものを使い、サンプル自身は wheel からだけ読む。"""
    environment = tmp_path / "venv"
    python = new_environment(environment)
    with zipfile.ZipFile(wheel) as archive:  # インストール = site-packages への展開
        archive.extractall(site_packages(environment))
    run = run_as_reader(
        ["-c", "import chapter8_samples; print(chapter8_samples.__file__)\n" + QUICK_STARTS],
        tmp_path,
        python=python,
    )
    assert run.returncode == 0, run.stderr
    origin, price = run.stdout.split()
    assert Path(origin).is_relative_to(environment)
    assert price == "0.0075"
