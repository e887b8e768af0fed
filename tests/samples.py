"""サンプルの一覧と、読者と同じやり方での実行。"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


CHAPTER = "the whole chapter"
ENVIRONMENT = dict(os.environ)  # テストが変える前


def sample_id(path: Path) -> str:
    return f"{path.parent.name[:2]}/{path.stem}"


RUNS: Mapping[str, Sequence[str | Path]] = {CHAPTER: ["-m", "chapter8_samples"]} | {
    sample_id(path): [path] for path in SAMPLES
}
"""名前と、``python`` に渡す引数。"""


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
    env = without_settings(ENVIRONMENT) | settings | dict(environment or {})
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
