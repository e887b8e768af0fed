"""サンプルの一覧と、読者と同じやり方での実行。"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from conftest import without_settings

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = sorted(ROOT.glob("chapter8_samples/[0-9]*/[a-z]*.py"))
PARTS = sorted(
    path
    for path in ROOT.glob("chapter8_samples/[a-z]*/**/*.py")
    if path.stem not in ("__init__", "__main__", "_internals")
)
BOOK = {
    "01_production_tracing": {
        "basic_setup.py",
        "graceful_shutdown.py",
        "metadata_tagging.py",
        "sampling_strategies.py",
    },
    "02_cost_tracking": {"token_tracking.py", "cost_calculator.py", "cost_analysis.sql"},
    "03_quality_monitoring": {
        "feedback_collection.py",
        "scorer_setup.py",
        "scorer_lifecycle.py",
        "backfill_scorers.py",
    },
    "04_alerting": {"alert_config.py", "notification_handlers.py", "rollback.py"},
    "05_opentelemetry": {"otlp_setup.py", "otel-collector-config.yaml"},
}
SECTIONS = {
    "production_tracing": "01_production_tracing",
    "cost_tracking": "02_cost_tracking",
    "quality_monitoring": "03_quality_monitoring",
    "alerting": "04_alerting",
    "opentelemetry": "05_opentelemetry",
}


def sample_id(path: Path) -> str:
    return f"{path.parent.name[:2]}/{path.stem}"


def alias_of(path: Path) -> str:
    """``.../04_alerting/rollback.py`` -> ``chapter8_samples.alerting.rollback``。"""
    return f"chapter8_samples.{path.parent.name[3:]}.{path.stem}"


def documented_run(path: Path) -> str:
    """モジュールの docstring の「実行::」に書かれた出力。"""
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    block = re.search(r"^実行::\n\n((?:    .*\n|\n)+)", doc + "\n", re.MULTILINE)
    assert block, f"{path.name}: docstring に「実行::」がありません"
    command, *lines = textwrap.dedent(block[1]).strip().splitlines()
    assert command == f"$ python {path.relative_to(ROOT).as_posix()}"
    return "\n".join(lines) + "\n"


def run_as_reader(
    arguments: Sequence[str | Path],
    directory: Path,
    *,
    python: str | Path = sys.executable,
    environment: Mapping[str, str] | None = None,
    encoding: str = "cp932",
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:
    """接続先の設定も鍵もない環境で実行する。出力は日本語 Windows の cp932 で受ける。"""
    settings = {"CHAPTER8_LAB": str(directory / ".chapter8"), "PYTHONIOENCODING": encoding}
    env = without_settings(dict(os.environ)) | settings | dict(environment or {})
    return subprocess.run(
        [str(python), *map(str, arguments)],
        cwd=directory,
        env=env,
        capture_output=True,
        timeout=timeout,
        encoding=encoding,
        errors="strict" if encoding == "utf-8" else "backslashreplace",
    )


def check_steps(out: str) -> None:
    """``python -m chapter8_samples`` の、すべての手順が OK で終わった。"""
    steps = re.findall(r"^\[ ?(\d+)/(\d+)\] \S+ .* (OK|NG) ", out, re.MULTILINE)
    total = int(steps[0][1])
    assert [int(number) for number, _, _ in steps] == list(range(1, total + 1))
    assert {mark for _, _, mark in steps} == {"OK"}
