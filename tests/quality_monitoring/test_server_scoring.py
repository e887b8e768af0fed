"""本物の mlflow server が、クライアントの呼び出しなしで採点する。"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from mlflow.genai.scorers import Safety, Scorer, scorer
from quality_monitoring.two_runs import judge_once_in_two_runs

from chapter8_samples._lab.servers.mlflow_server import MlflowServer
from chapter8_samples.quality_monitoring import (
    JudgeEndpointError,
    change_sample_rate,
    ensure_judge_endpoint,
    pause_scorer,
    resume_scorer,
    run_scoring_cycle,
    setup_quality_scorers,
)

pytestmark = pytest.mark.slow

# サーバーの採点の周期は 60 秒で、設定では変えられない
EVERY_15_SECONDS = """
from contextlib import suppress
with suppress(ImportError):
    from huey.consumer import Scheduler
    Scheduler.periodic_task_seconds = 15
"""


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


def test_a_refusal_names_the_server_setting(mlflow_server_url: str) -> None:
    with pytest.raises(JudgeEndpointError, match="ALLOWED_SCHEMES"):
        ensure_judge_endpoint("refused", api_key="x", api_base="http://127.0.0.1:1/v1")


def test_an_endpoint_half_made_with_an_old_key_is_repaired(mlflow_server_url: str) -> None:
    secrets = f"{mlflow_server_url}/api/3.0/mlflow/gateway/secrets"
    old = {"secret_name": "half-key", "secret_value": {"api_key": "sk-old-key-AAAA"}}
    requests.post(f"{secrets}/create", json={**old, "provider": "openai"}).raise_for_status()
    assert ensure_judge_endpoint("half", api_key="sk-new-key-BBBB") == "gateway:/half"
    listed = requests.get(f"{secrets}/list").json()["secrets"]
    (kept,) = [secret for secret in listed if secret["secret_name"] == "half-key"]
    assert kept["masked_values"]["api_key"].endswith("BBBB")


def test_without_an_endpoint_the_client_scores(mlflow_server_url: str) -> None:
    statuses = setup_quality_scorers("server-without-endpoint")
    assert {s.runs for s in statuses} == {"client"}


def test_two_backfills_at_once_judge_each_pair_once(mlflow_server_url: str, ask: Any) -> None:
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    experiment_id = mlflow.set_experiment("two-runs").experiment_id
    ask(6)
    judge_once_in_two_runs(experiment_id, 6)


def test_a_value_the_server_cannot_take_is_a_failure_not_a_stop(
    mlflow_server_url: str, ask: Any
) -> None:
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    experiment_id = mlflow.set_experiment("unstorable").experiment_id
    values = {"nan": math.nan, "infinity": -math.inf, "surrogate": "\ud800", "good": 1}

    def returns(name: str) -> Scorer:
        @scorer(name=name)
        def odd(outputs):  # type: ignore[no-untyped-def]
            return values[name]

        return odd

    (trace_id,) = ask()
    report = run_scoring_cycle(experiment_id, [returns(name) for name in values])
    failed = {name: counts.failed for name, counts in report.scorers.items()}
    assert failed == {"nan": 1, "infinity": 1, "surrogate": 1, "good": 0}
    stored: Any = MlflowClient().get_trace(trace_id).info.assessments
    errors = {a.name: a.feedback.error for a in stored}
    assert set(errors) == set(values) and errors.pop("good") is None
    assert all("cannot be stored" in error.error_message for error in errors.values())


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


def test_the_server_scores_what_it_was_told_to(tmp_path: Path, ask: Any, stub_llm: Any) -> None:
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    often = tmp_path / "often" / "sitecustomize.py"
    often.parent.mkdir()
    often.write_text(EVERY_15_SECONDS, encoding="utf-8")
    environment = {"PYTHONPATH": str(often.parent)}
    with MlflowServer(tmp_path / "server", jobs=True, env=environment) as server:
        mlflow.set_tracking_uri(server.url)
        experiment_id = mlflow.set_experiment("continuous").experiment_id
        statuses = setup_quality_scorers("continuous", 1.0, 1.0, create_judge_endpoint=True)
        assert {s.runs for s in statuses} == {"server"}
        again = setup_quality_scorers("continuous", 1.0, 1.0)
        assert [s.version for s in again] == [1, 1, 1]
        assert ensure_judge_endpoint(api_key="sk-other") == "gateway:/judge"  # 作り直さない
        verdict: Any = Safety(name="asked_now", model="gateway:/judge")(outputs="30 日以内です。")
        assert (verdict.feedback.value, verdict.source.source_id) == ("yes", "gateway:/judge")

        pause_scorer("continuous", "relevance_check")
        resume_scorer("continuous", "relevance_check")
        changed = change_sample_rate("continuous", "relevance_check", 1.0)
        assert (changed.sample_rate, changed.filter_string) == (1.0, "status = 'OK'")
        pause_scorer("continuous", "groundedness_check")

        for attempt in ("最初", "設定の途中で始まった周期が、途中までの設定で採点していた"):
            wanted = {key: ["relevance_check", "safety_check"] for key in ask(5)}
            wanted |= {key: [] for key in ask(1, fail=True)}
            if scored_within(90, experiment_id, wanted):
                break
            assert attempt == "最初", verdicts(experiment_id)
        mlflow.flush_trace_async_logging()
