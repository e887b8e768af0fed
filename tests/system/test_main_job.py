"""``python -m chapter8_samples``: シナリオが最後まで通り、何も残さずに終わること。"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import without_settings
from samples import ROOT, run_as_reader

pytestmark = pytest.mark.slow
CHECKOUT = {"PYTHONPATH": str(ROOT)}
DEADLINE_SECONDS = 240


def run_job(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["-m", "chapter8_samples", *arguments]
    return run_as_reader(command, directory, environment=CHECKOUT, timeout=DEADLINE_SECONDS)


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("reader")
    run = run_job(directory)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    return directory, run.stdout


def test_every_step_holds(first_run: tuple[Path, str]) -> None:
    _, out = first_run
    steps = re.findall(r"^\[ ?(\d+)/(\d+)\] \S+ .* (OK|NG) ", out, re.MULTILINE)
    total = int(steps[0][1])
    assert [int(number) for number, _, _ in steps] == list(range(1, total + 1))
    assert {mark for _, _, mark in steps} == {"OK"}


def test_tells_what_comes_next(first_run: tuple[Path, str]) -> None:
    directory, out = first_run
    assert "python -m chapter8_samples ui" in out
    assert str(directory / "health_report.html") in out


def test_report_is_one_file_with_charts(first_run: tuple[Path, str]) -> None:
    directory, _ = first_run
    html = (directory / "health_report.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 4
    assert not re.search(r"""(?:src|href)=["']?(?:https?:|//)""", html)
    for mark in ("release", "alert", "rollback", "resolved"):
        assert f'class="mark {mark}"' in html


def test_report_can_be_rebuilt(first_run: tuple[Path, str]) -> None:
    directory, _ = first_run
    original = (directory / "health_report.html").read_text(encoding="utf-8")
    run = run_job(directory, "report", "-o", "again.html")
    assert run.returncode == 0, run.stdout + run.stderr
    assert (directory / "again.html").read_text(encoding="utf-8") == original


@pytest.mark.parametrize("option", ["--keep", "--fresh"])
def test_runs_again(first_run: tuple[Path, str], option: str) -> None:
    directory, _ = first_run
    run = run_job(directory, option)
    assert run.returncode == 0, run.stdout + run.stderr


def test_user_settings_are_not_touched(tmp_path: Path) -> None:
    """利用者のサーバーや鍵が設定されていても、シナリオはそこへ何も送らない。"""
    environment = CHECKOUT | {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "OPENAI_API_KEY": "sk-real",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    }
    run = run_as_reader(
        ["-m", "chapter8_samples"], tmp_path, environment=environment, timeout=DEADLINE_SECONDS
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="only on POSIX: process groups")
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = without_settings(dict(os.environ)) | CHECKOUT
    environment["CHAPTER8_LAB"] = str(tmp_path / ".chapter8")
    job = subprocess.Popen(
        [sys.executable, "-u", "-m", "chapter8_samples"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert job.stdout is not None
    for line in job.stdout:
        if line.startswith("[ 5/"):
            break
    time.sleep(1)  # 問い合わせの最中に
    job.send_signal(signal.SIGINT)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130, out + err
    assert "Traceback" not in err and "中断しました" in out
    with pytest.raises(ProcessLookupError):
        os.killpg(job.pid, 0)  # 同じグループのプロセスが 1 つも残っていない


def test_nothing_to_report_is_said_plainly(tmp_path: Path) -> None:
    run = run_job(tmp_path, "report")
    assert run.returncode == 1
    assert "先に python -m chapter8_samples を実行" in run.stdout
