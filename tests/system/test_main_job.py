"""``python -m chapter8_samples``: シナリオが最後まで通り、何も残さずに終わること。

ふつうの 1 回は、tests/test_pages.py が ``pytest`` だけで必ず実行する。
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import mlflow
import pytest
from conftest import without_settings
from samples import ROOT, check_steps, run_as_reader

pytestmark = pytest.mark.system
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


def traces_of_the_bot(directory: Path) -> Counter[str]:
    """エクスペリメントごとの、シナリオのトレースの数。"""
    client = mlflow.MlflowClient(f"sqlite:///{(directory / '.chapter8/mlflow.db').as_posix()}")
    experiments = client.search_experiments(filter_string=f"name = '{EXPERIMENT}'")
    return Counter(
        trace.info.experiment_id
        for experiment in experiments
        for trace in client.search_traces(
            locations=[experiment.experiment_id], max_results=500, include_spans=False
        )
    )


@pytest.mark.timeout(600)
def test_runs_fresh_and_again_beside_the_users_settings(tmp_path: Path) -> None:
    """``--fresh`` は前のデータを消して始める。次の実行は、前の分を別の名前で残して空から始める。

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
    for options in (["--fresh"], []):
        run = run_job(tmp_path, *options, environment=environment)
        assert run.returncode == 0, run.stdout + run.stderr
        check_steps(run.stdout)
        counts.append(traces_of_the_bot(tmp_path))
    (fresh,), (again,) = (list(found.items()) for found in counts)
    assert fresh[1] == again[1] > 0 and fresh[0] != again[0]


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
    assert "先に python -m chapter8_samples を実行" in run.stderr
