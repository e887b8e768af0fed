"""型と書き方: スタブは最新で、利用者のエディターに型が見え、誤りは見つかる。"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import make_stubs
import pytest
from reader_environment import checkout, new_environment, site_packages
from samples import ROOT, SECTIONS

pytestmark = pytest.mark.slow
# 公開名と部品。pyright の既定の設定で、誤りも警告もなく読めること
READER = """\
from chapter8_samples.alerting import ModelRollbackManager, setup_alerting
from chapter8_samples.alerting.rules import AlertRule
from chapter8_samples.cost_tracking import CostCalculator, setup_cost_tracking
from chapter8_samples.opentelemetry import setup_otlp_export
from chapter8_samples.opentelemetry.export.config import OtlpConfig
from chapter8_samples.production_tracing import setup_production_tracing
from chapter8_samples.production_tracing.delivery.flush import FlushResult
from chapter8_samples.quality_monitoring import setup_quality_scorers
from chapter8_samples.quality_monitoring.scoring.plan import ScoringTarget

usd: float = CostCalculator().calculate("gpt-4o", 1000, 500)
rule: AlertRule = AlertRule(name="slow", metric="latency_p95_ms", threshold=1)
history = ModelRollbackManager("m").get_rollback_history()
for change in history:
    print(change.from_version)
"""
WRONG = "text: str = CostCalculator().calculate('gpt-4o', 1000, 500)\nname: int = rule.name\n"


def pyright(directory: Path, python: str | Path = sys.executable, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "pyright", "--pythonpath", str(python), "--outputjson", *more]
    run = subprocess.run(command, cwd=directory, capture_output=True, encoding="utf-8", timeout=280)
    return dict(json.loads(run.stdout))


def complaints(report: Mapping[str, Any]) -> list[str]:
    return [
        f"{Path(found['file']).name}:{found['range']['start']['line'] + 1}: {found['severity']}: "
        f"{found.get('rule')}: {found['message']}"
        for found in report["generalDiagnostics"]
    ]


def test_stubs_are_few_and_up_to_date() -> None:
    """公開名や型を変えたのに ``tests/make_stubs.py`` を実行していないと失敗する。"""
    fresh = make_stubs.stubs()
    committed = {
        path: path.read_text(encoding="utf-8") for path in make_stubs.SOURCE.rglob("*.pyi")
    }
    assert len(committed) <= 20
    assert meaning(fresh) == meaning(committed), "run: python tests/make_stubs.py"


def meaning(files: Mapping[Path, str]) -> dict[str, str]:
    """構文木。書き出したときの空白やかっこは、Python の版によって違う。"""
    return {str(path): ast.dump(ast.parse(text)) for path, text in files.items()}


@pytest.mark.parametrize(
    "command", [["ruff", "check"], ["ruff", "format", "--check"]], ids=["check", "format"]
)
def test_style(command: Sequence[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout[-3000:]


def test_the_package_is_typed_and_a_planted_error_is_found(tmp_path: Path) -> None:
    assert complaints(pyright(ROOT)) == []
    copy = checkout(tmp_path / "copy")
    for file in ("alerting/rules/model.py", "04_alerting/rollback.py"):
        with (copy / "chapter8_samples" / file).open("a", encoding="utf-8") as source:
            source.write('\nPLANTED: int = "text"\n')
    found = complaints(pyright(copy))
    assert [line.split(":")[0] for line in found] == ["rollback.py", "model.py"], found
    assert all("reportAssignmentType" in line for line in found)


def from_checkout(directory: Path) -> Path:
    (directory / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    return Path(sys.executable)


def from_editable_install(directory: Path) -> Path:
    python = new_environment(directory / "venv")
    (site_packages(directory / "venv") / "editable.pth").write_text(f"{ROOT}\n", encoding="utf-8")
    return python


def from_wheel(directory: Path) -> Path:
    from packaging_builds import install, wheel

    python = new_environment(directory / "venv")
    install(wheel(directory / "dist"), directory / "venv")
    return python


@pytest.mark.parametrize("install", [from_checkout, from_editable_install, from_wheel])
def test_a_readers_editor_sees_the_types(install: Callable[[Path], Path], tmp_path: Path) -> None:
    python = install(tmp_path)
    (tmp_path / "app.py").write_text(READER, encoding="utf-8")
    report = pyright(tmp_path, python, "app.py")
    assert report["summary"]["filesAnalyzed"] == 1
    assert complaints(report) == []
    (tmp_path / "app.py").write_text(READER + WRONG, encoding="utf-8")
    wrong = complaints(pyright(tmp_path, python, "app.py"))
    assert [line.split(": ")[2] for line in wrong] == ["reportAssignmentType"] * 2, wrong


def test_a_page_module_at_most_warns_that_its_source_is_elsewhere(tmp_path: Path) -> None:
    from_checkout(tmp_path)
    pages = [(s, p.stem) for s in SECTIONS for p in (ROOT / "chapter8_samples" / s).glob("*.pyi")]
    lines = [f"import chapter8_samples.{s}.{page}" for s, page in pages if page != "__init__"]
    (tmp_path / "app.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = complaints(pyright(tmp_path, sys.executable, "app.py"))
    assert len(lines) == 14
    assert {line.split(": ")[2] for line in found} <= {"reportMissingModuleSource"}, found
