"""``python -m chapter8_samples``: シナリオが最後まで通り、何も残さずに終わること。

最初の 1 回は ``pytest`` だけで必ず実行する。ほかの起動のしかたは ``system``。
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlflow
import pytest
from conftest import without_settings
from samples import ROOT, run_as_reader

CHECKOUT = {"PYTHONPATH": str(ROOT)}
DEADLINE_SECONDS = 240
EXPERIMENT = "/production/support-bot"


def run_job(
    directory: Path, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return run_as_reader(
        ["-m", "chapter8_samples", *arguments],
        directory,
        environment=CHECKOUT | (environment or {}),
        timeout=DEADLINE_SECONDS,
    )


def check_steps(out: str) -> None:
    """すべての手順が OK で終わった。"""
    steps = re.findall(r"^\[ ?(\d+)/(\d+)\] \S+ .* (OK|NG) ", out, re.MULTILINE)
    total = int(steps[0][1])
    assert [int(number) for number, _, _ in steps] == list(range(1, total + 1))
    assert {mark for _, _, mark in steps} == {"OK"}


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("reader")
    run = run_job(directory)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stderr == ""
    return directory, run.stdout


def test_every_step_holds(first_run: tuple[Path, str]) -> None:
    _, out = first_run
    check_steps(out)


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


def traces_of_the_bot(directory: Path) -> Counter[str]:
    """エクスペリメントごとの、シナリオのトレースの数。"""
    client = mlflow.MlflowClient(f"sqlite:///{(directory / '.chapter8/mlflow.db').as_posix()}")
    experiments = client.search_experiments(filter_string=f"name LIKE '{EXPERIMENT}%'")
    return Counter(
        trace.info.experiment_id
        for experiment in experiments
        for trace in client.search_traces(
            locations=[experiment.experiment_id], max_results=500, include_spans=False
        )
    )


@pytest.mark.system
@pytest.mark.timeout(600)
def test_runs_fresh_and_again_beside_the_users_settings(tmp_path: Path) -> None:
    """``--fresh`` は前のデータを消して始め、``--keep`` は同じエクスペリメントに書き足す。

    どちらも、利用者のサーバーや鍵が設定されていても、そこへは何も送らない。
    """
    environment = {
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "OPENAI_API_KEY": "sk-real",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
    }
    (tmp_path / ".chapter8").mkdir()
    (tmp_path / ".chapter8/mlflow.db").write_text("left by an older version", encoding="utf-8")
    counts = []
    for option in ("--fresh", "--keep"):
        run = run_job(tmp_path, option, environment=environment)
        assert run.returncode == 0, run.stdout + run.stderr
        check_steps(run.stdout)
        counts.append(traces_of_the_bot(tmp_path))
    (fresh,), (kept,) = (list(found.items()) for found in counts)
    assert fresh[1] > 0 and kept == (fresh[0], 2 * fresh[1])


@pytest.mark.system
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


@pytest.mark.system
def test_nothing_to_report_is_said_plainly(tmp_path: Path) -> None:
    run = run_job(tmp_path, "report")
    assert run.returncode == 1
    assert "先に python -m chapter8_samples を実行" in run.stdout
