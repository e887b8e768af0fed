"""番号付きフォルダーと別名が、どの使い方でも同じモジュールになること。"""

from __future__ import annotations

import ast
import importlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import make_stubs
import pytest
from samples import ROOT, SAMPLES, SECTIONS, alias_of, run_as_reader, sample_id

import chapter8_samples

SETUP_FUNCTIONS = {
    "production_tracing": "setup_production_tracing",
    "cost_tracking": "setup_cost_tracking",
    "quality_monitoring": "setup_quality_scorers",
    "alerting": "setup_alerting",
    "opentelemetry": "setup_otlp_export",
}
FIRST_IMPORT_FROM_MANY_THREADS = """
import importlib, sys, threading
sys.setswitchinterval(1e-6)
names = sys.argv[1:]
barrier, errors = threading.Barrier(len(names)), []
def first_import(name):
    barrier.wait()
    try:
        importlib.import_module(name)
        from chapter8_samples.alerting import AlertRule
    except BaseException as error:
        errors.append(f"{name}: {error!r}")
threads = [threading.Thread(target=first_import, args=(name,)) for name in names]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(*errors, sep="\\n")
"""


@pytest.mark.parametrize("section", SECTIONS)
def test_both_names_are_one_object(section: str) -> None:
    alias = importlib.import_module(f"chapter8_samples.{section}")
    numbered = importlib.import_module(f"chapter8_samples.{SECTIONS[section]}")
    assert alias is numbered is getattr(chapter8_samples, section)


@pytest.mark.parametrize("path", SAMPLES, ids=sample_id)
def test_modules_are_loaded_once(path: Path) -> None:
    alias = importlib.import_module(alias_of(path))
    assert alias is importlib.import_module(f"chapter8_samples.{path.parent.name}.{path.stem}")


@pytest.mark.parametrize(("section", "name"), SETUP_FUNCTIONS.items())
def test_setup_function_is_exported(section: str, name: str) -> None:
    package = importlib.import_module(f"chapter8_samples.{section}")
    assert callable(getattr(package, name))
    assert name in dir(package) and name in package.__all__


@pytest.mark.parametrize("section", SECTIONS)
def test_every_exported_name_exists(section: str) -> None:
    package = importlib.import_module(f"chapter8_samples.{section}")
    missing = [name for name in package.__all__ if not hasattr(package, name)]
    assert missing == []
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = package.no_such_name


def test_pickle_keeps_the_class() -> None:
    from chapter8_samples.alerting import AlertRule, AlertSeverity

    numbered = importlib.import_module("chapter8_samples.04_alerting")
    assert numbered.AlertRule is AlertRule
    assert pickle.loads(pickle.dumps(AlertSeverity.CRITICAL)) is AlertSeverity.CRITICAL


def test_import_is_lazy(tmp_path: Path) -> None:
    code = (
        "import sys, chapter8_samples.production_tracing, chapter8_samples.quality_monitoring;"
        "print('mlflow' in sys.modules)"
    )
    run = run_as_reader(["-c", code], tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert run.stdout.strip() == "False", run.stderr


def test_first_import_from_many_threads(tmp_path: Path) -> None:
    """別名・番号・サブモジュールを混ぜて、16 スレッドが同時に最初の import をする。"""
    names = [
        "chapter8_samples.alerting",
        "chapter8_samples.alerting.alert_config",
        "chapter8_samples.alerting.alert_config",
        "chapter8_samples.alerting.notification_handlers",
    ] * 4
    for _ in range(8):
        arguments = ["-c", FIRST_IMPORT_FROM_MANY_THREADS, *names]
        run = run_as_reader(arguments, tmp_path, environment={"PYTHONPATH": str(ROOT)})
        assert run.returncode == 0 and run.stdout.strip() == "", run.stdout + run.stderr


def test_spawned_process_finds_the_functions(tmp_path: Path) -> None:
    script = tmp_path / "spawn.py"
    script.write_text(
        "import multiprocessing\n"
        "from chapter8_samples.cost_tracking import CostCalculator\n"
        "def price(model):\n"
        "    return CostCalculator().calculate(model=model, input_tokens=1000, output_tokens=500)\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(price, ['gpt-4o']))\n",
        encoding="utf-8",
    )
    run = run_as_reader([script], tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert run.stdout.strip() == "[0.0075]", run.stderr


def test_numbered_name_runs_with_m_without_a_warning(tmp_path: Path) -> None:
    for name in ("02_cost_tracking", "cost_tracking"):
        run = run_as_reader(
            ["-W", "error", "-m", f"chapter8_samples.{name}.cost_calculator"],
            tmp_path,
            environment={"PYTHONPATH": str(ROOT)},
        )
        assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_alias_folders_are_up_to_date(tmp_path: Path) -> None:
    """公開名や型を変えたのに ``tests/make_stubs.py`` を実行していないと失敗する。"""
    make_stubs.generate(tmp_path)
    for section in SECTIONS:
        fresh, committed = tmp_path / section, ROOT / "chapter8_samples" / section
        names = {path.name for path in fresh.iterdir()}
        assert names == {
            path.name for path in committed.iterdir() if path.suffix in (".py", ".pyi")
        }
        old = [n for n in sorted(names) if meaning(fresh / n) != meaning(committed / n)]
        assert old == [], "run: python tests/make_stubs.py"


def meaning(path: Path) -> str:
    """構文木。書き出したときの空白やかっこは、Python の版によって違う。"""
    return ast.dump(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["ruff", "check"], ["ruff", "format", "--check"], ["pyright", "--pythonpath", sys.executable]],
    ids=["ruff check", "ruff format", "pyright"],
)
def test_types_and_style(command: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.slow
def test_editors_see_the_types_behind_the_alias(tmp_path: Path) -> None:
    """利用者のファイルで、別名からの import が型付きで解決され、誤りが見つかること。"""
    app = tmp_path / "app.py"
    app.write_text(
        "from chapter8_samples.cost_tracking import CostCalculator\n"
        "from chapter8_samples.alerting.rollback import ModelRollbackManager\n"
        "usd: float = CostCalculator().calculate('gpt-4o', 1000, 500)\n"
        "history: int = ModelRollbackManager('m').get_rollback_history()\n",
        encoding="utf-8",
    )
    settings = json.dumps({"extraPaths": [str(ROOT)]})
    (tmp_path / "pyrightconfig.json").write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    (error,) = json.loads(run.stdout)["generalDiagnostics"]
    assert error["range"]["start"]["line"] == 3 and "list[Change]" in error["message"]
