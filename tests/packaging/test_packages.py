"""節のパッケージを、読者とアプリが使うすべての形で import する。"""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path

import pytest
from samples import ROOT, SAMPLES, SECTIONS, alias_of, run_as_reader

CHECKOUT = {"PYTHONPATH": str(ROOT)}
SETUP_FUNCTIONS = {
    "production_tracing": "setup_production_tracing",
    "cost_tracking": "setup_cost_tracking",
    "quality_monitoring": "setup_quality_scorers",
    "alerting": "setup_alerting",
    "opentelemetry": "setup_otlp_export",
}
FIRST_IMPORT_FROM_16_THREADS = """
import importlib, sys, threading
sys.setswitchinterval(1e-6)
packages = [importlib.import_module(f"chapter8_samples.{section}") for section in sys.argv[1:]]
names = [(package, name) for package in packages for name in package.__all__]
barrier, errors = threading.Barrier(16), []
def first_import(start):
    barrier.wait()
    for package, name in names[start:] + names[:start]:
        try:
            getattr(package, name)
        except BaseException as error:
            errors.append(f"{name}: {error!r}")
threads = [
    threading.Thread(target=first_import, args=(number * len(names) // 16,)) for number in range(16)
]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(names), *errors[:5], sep="\\n")
"""
FIRST_IMPORT_OF_PACKAGES = """
import sys, threading
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(16)
def first_import(number):
    barrier.wait()
    try:
        if number % 2:
            from chapter8_samples.alerting import AlertRule, quick_rollback
        else:
            from chapter8_samples.cost_tracking import CostCalculator, CostTracker
    except BaseException as error:
        print(repr(error))
threads = [threading.Thread(target=first_import, args=(number,)) for number in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
SPAWN = """
import multiprocessing
from chapter8_samples.cost_tracking import CostCalculator
def price(model):
    return CostCalculator().calculate(model=model, input_tokens=1000, output_tokens=500)
if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        print(pool.map(price, ['gpt-4o']))
"""


def test_both_packages_offer_every_public_name_setup_first() -> None:
    for section, folder in SECTIONS.items():
        package = importlib.import_module(f"chapter8_samples.{section}")
        numbered = importlib.import_module(f"chapter8_samples.{folder}")
        assert package.__all__[0] == SETUP_FUNCTIONS[section]
        assert len(package.__all__) == len(set(package.__all__))
        assert dir(package) == sorted(package.__all__) == dir(numbered)
        for name in package.__all__:
            assert getattr(package, name) is getattr(numbered, name), name
        for place in (package, numbered):
            with pytest.raises(AttributeError, match="no_such_name"):
                _ = place.no_such_name


def test_every_page_is_importable_under_both_names() -> None:
    for page in SAMPLES:
        public = importlib.import_module(alias_of(page))
        numbered = importlib.import_module(f"chapter8_samples.{page.parent.name}.{page.stem}")
        assert Path(str(public.__file__)) == Path(str(numbered.__file__)) == page


def test_pickle_keeps_the_class() -> None:
    from chapter8_samples.alerting import AlertRule, AlertSeverity

    rule = AlertRule(name="slow", metric="latency_p95_ms", threshold=1)
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert pickle.loads(pickle.dumps(AlertSeverity.CRITICAL)) is AlertSeverity.CRITICAL


def test_import_is_lazy(tmp_path: Path) -> None:
    sections = ", ".join(f"chapter8_samples.{section}" for section in SECTIONS)
    code = f"import sys, {sections}; print('mlflow' in sys.modules, 'yaml' in sys.modules)"
    run = run_as_reader(["-c", code], tmp_path, environment=CHECKOUT)
    assert run.stdout.split() == ["False", "False"], run.stderr


def test_first_import_of_all_public_names_from_16_threads(tmp_path: Path) -> None:
    """どの節の公開名でも、最初の import が何本のスレッドで同時に起きてもよい。"""
    arguments = ["-c", FIRST_IMPORT_FROM_16_THREADS, *SECTIONS]
    run = run_as_reader(arguments, tmp_path, environment=CHECKOUT)
    count, *errors = run.stdout.splitlines()
    assert int(count) > 100 and errors == [], run.stdout + run.stderr


def test_first_import_of_the_packages_from_16_threads(tmp_path: Path) -> None:
    """パッケージ自身も、まだ誰も import していない。"""
    for _ in range(4):
        run = run_as_reader(["-c", FIRST_IMPORT_OF_PACKAGES], tmp_path, environment=CHECKOUT)
        assert run.returncode == 0 and run.stdout.strip() == "", run.stdout + run.stderr


def test_spawned_process_finds_the_functions(tmp_path: Path) -> None:
    (tmp_path / "spawn.py").write_text(SPAWN, encoding="utf-8")
    run = run_as_reader(["spawn.py"], tmp_path, environment=CHECKOUT)
    assert run.stdout.strip() == "[0.0075]", run.stderr


def test_a_page_runs_with_m_under_both_names_without_a_warning(tmp_path: Path) -> None:
    for name in SECTIONS["cost_tracking"], "cost_tracking":
        page = f"chapter8_samples.{name}.cost_calculator"
        run = run_as_reader(["-W", "error", "-m", page], tmp_path, environment=CHECKOUT)
        assert run.returncode == 0, run.stderr
