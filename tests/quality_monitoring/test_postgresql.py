"""PostgreSQL に保存したときの、長さの制限と検索。SQLite は長さを調べないので、ここで確かめる。"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import AssessmentSource
from mlflow.exceptions import MlflowException
from ports import free_port
from quality_monitoring.two_runs import judge_once_in_two_runs

from chapter8_samples.quality_monitoring import (
    FeedbackRequest,
    FeedbackValidationError,
    log_rating_feedback,
    log_text_feedback,
    log_thumbs_feedback,
    log_user_correction,
    summarize_feedback,
)

FOUND = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOUND, reason="PostgreSQL is not in /usr/lib/postgresql"),
]


def as_postgres(*command: str) -> list[str]:
    """PostgreSQL は root では動かない。"""
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else list(command)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """空のデータベース。必ず止める。"""
    pytest.importorskip("psycopg2", reason="needs psycopg2-binary")
    home = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # ソケットの名前は 107 文字まで
    if os.geteuid() == 0:
        import pwd

        user = pwd.getpwnam("postgres")
        os.chown(home, user.pw_uid, user.pw_gid)
    port = free_port()
    tools, data = FOUND[-1], str(home / "data")
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={home}"
    options = f"{settings} -c fsync=off"
    control = as_postgres(str(tools / "pg_ctl"), "-D", data, "-w", "-l", str(home / "log"))
    try:
        initdb = as_postgres(str(tools / "initdb"), "-D", data, "-U", "mlflow", "-A", "trust", "-N")
        subprocess.run([*initdb, "-E", "UTF8"], check=True, stdout=sys.stderr, cwd=home)
        start = [*control, "-o", options, "start"]
        subprocess.run(start, check=True, stdout=subprocess.DEVNULL, cwd=home)
        yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
    finally:
        stop = [*control, "-m", "immediate", "stop"]
        subprocess.run(stop, check=False, stdout=subprocess.DEVNULL, cwd=home)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def experiment(postgresql: str) -> str:
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    mlflow.set_tracking_uri(postgresql)
    return mlflow.set_experiment("postgresql").experiment_id


def traces_where(experiment: str, condition: str) -> set[str]:
    found = mlflow.search_traces(
        locations=[experiment], filter_string=condition, return_type="list", include_spans=False
    )
    return {trace.info.trace_id for trace in found}


def test_limits_and_filters(experiment: str, ask: Any) -> None:
    voted, rated, silent = ask(3)
    longest = "あ" * 250
    log_thumbs_feedback(voted, False, longest, "理" * 10_000, feedback_id=longest)
    log_text_feedback(voted, "長" * 10_000, longest, category=longest)
    log_user_correction(voted, "正" * 10_000, longest, correction_type=longest)
    log_rating_feedback(rated, 4, "user-1")
    log_thumbs_feedback(voted, True, longest)  # 考え直した

    # 251 文字は、ここで断らなければ PostgreSQL が断る
    with pytest.raises(FeedbackValidationError, match="251 characters, the limit is 250"):
        log_thumbs_feedback(voted, True, longest + "あ")
    source = AssessmentSource("HUMAN", longest + "あ")
    with pytest.raises(MlflowException, match=r"value too long for type character varying\(250\)"):
        mlflow.log_feedback(trace_id=voted, name="x", value=True, source=source)
    with pytest.raises(FeedbackValidationError, match="10001 characters"):
        FeedbackRequest(trace_id=voted, name="x", value=True, user_id="u", rationale="x" * 10_001)

    assert traces_where(experiment, "feedback.user_thumbs IS NULL") == {rated, silent}
    assert traces_where(experiment, "feedback.user_thumbs IS NOT NULL") == {voted}
    assert traces_where(experiment, "feedback.user_rating = '4'") == {rated}
    now = datetime.now(timezone.utc)
    summary = summarize_feedback("postgresql", now - timedelta(hours=1), now + timedelta(hours=1))
    assert summary.thumbs.total == 1


def test_two_backfills_at_once_judge_each_pair_once(postgresql: str, ask: Any) -> None:
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    mlflow.set_tracking_uri(postgresql)
    experiment_id = mlflow.set_experiment("two-runs").experiment_id
    ask(6)
    judge_once_in_two_runs(experiment_id, 6)
