"""本物の mlflow server が、クライアントの呼び出しなしで採点する。"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from chapter8_samples._lab.servers.mlflow_server import MlflowServer
from chapter8_samples.quality_monitoring import (
    JudgeEndpointError,
    change_sample_rate,
    ensure_judge_endpoint,
    pause_scorer,
    resume_scorer,
    server_scored_until,
    setup_quality_scorers,
)


def verdicts(experiment_id: str) -> dict[str, list[str]]:
    found = MlflowClient().search_traces(locations=[experiment_id], include_spans=False)
    return {t.info.trace_id: sorted(a.name for a in t.info.assessments) for t in found}


def scored_within(seconds: float, experiment_id: str, wanted: dict[str, list[str]]) -> bool:
    deadline = time.monotonic() + seconds
    while not wanted.items() <= verdicts(experiment_id).items():
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def test_a_judge_endpoint_needs_a_server(tracking_uri: str) -> None:
    with pytest.raises(JudgeEndpointError, match="MLFLOW_TRACKING_URI"):
        ensure_judge_endpoint(api_key="x")


def test_a_refusal_names_the_server_setting(mlflow_server_url: str) -> None:
    with pytest.raises(JudgeEndpointError, match="ALLOWED_SCHEMES"):
        ensure_judge_endpoint("refused", api_key="x", api_base="http://127.0.0.1:1/v1")


def test_an_empty_key_is_refused_before_it_is_stored(mlflow_server_url: str) -> None:
    with pytest.raises(JudgeEndpointError, match="api_key"):
        ensure_judge_endpoint("empty", api_key="")


def test_without_an_endpoint_the_client_scores(mlflow_server_url: str) -> None:
    statuses = setup_quality_scorers("server-without-endpoint")
    assert {s.runs for s in statuses} == {"client"}


def test_a_paused_scorer_can_be_resumed_after_it_moved(mlflow_server_url: str) -> None:
    gateway = ensure_judge_endpoint("moving", api_key="x")
    for before, after in ((gateway, "openai:/gpt-4.1-mini"), ("openai:/gpt-4.1-mini", gateway)):
        experiment = f"moving-from-{before.partition(':')[0]}"
        setup_quality_scorers(experiment, judge_model=before)
        pause_scorer(experiment, "safety_check")
        moved, *_ = setup_quality_scorers(experiment, judge_model=after)
        assert moved.sample_rate == 0
        assert resume_scorer(experiment, "safety_check").sample_rate == 1.0
        again, *_ = setup_quality_scorers(experiment, judge_model=after)
        assert again.sample_rate == 1.0


@pytest.mark.slow
def test_the_server_scores_what_it_was_told_to(tmp_path: Path, ask: Any, stub_llm: Any) -> None:
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    with MlflowServer(tmp_path / "server", jobs=True) as server:
        mlflow.set_tracking_uri(server.url)
        experiment_id = mlflow.set_experiment("continuous").experiment_id
        statuses = setup_quality_scorers("continuous", 1.0, 1.0, create_judge_endpoint=True)
        assert {s.runs for s in statuses} == {"server"}
        again = setup_quality_scorers("continuous", 1.0, 1.0)
        assert [s.version for s in again] == [1, 1, 1]

        pause_scorer("continuous", "relevance_check")
        resume_scorer("continuous", "relevance_check")
        changed = change_sample_rate("continuous", "relevance_check", 1.0)
        assert (changed.sample_rate, changed.filter_string) == (1.0, "status = 'OK'")
        pause_scorer("continuous", "groundedness_check")

        for attempt in ("最初", "設定の途中で始まった周期が、途中までの設定で採点していた"):
            wanted = {key: ["relevance_check", "safety_check"] for key in ask(5)}
            wanted |= {key: [] for key in ask(1, fail=True)}
            if scored_within(90, experiment_id, wanted):  # 採点の周期は 60 秒
                break
            assert attempt == "最初", verdicts(experiment_id)
        assert server_scored_until("continuous") is not None
        mlflow.flush_trace_async_logging()
