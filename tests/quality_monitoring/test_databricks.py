"""本物の Databricks クライアントで、登録から削除、バックフィルまでを通す。"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import mlflow
import pytest
from mlflow.genai.scorers import Guidelines, Safety, Scorer, scorer
from quality_monitoring.fake_workspace import FakeWorkspace

from chapter8_samples.quality_monitoring import (
    BackfillError,
    ScorerNotFoundError,
    ScorerPlan,
    backfill_date_range,
    backfill_last_week,
    backfill_new_scorer,
    backfill_with_custom_sample_rates,
    backfill_with_scorer_names,
    change_sample_rate,
    delete_all_scorers,
    get_scorer_status,
    list_scorer_statuses,
    pause_scorer,
    remove_scorer,
    resume_scorer,
    setup_quality_scorers,
    setup_scorers,
)

pytestmark = pytest.mark.slow  # databricks-agents の読み込みだけで数秒かかる

NAME = "/production/my-llm-app"


@pytest.fixture
def workspace() -> Iterator[FakeWorkspace]:
    pytest.importorskip("databricks.agents", reason="needs databricks-agents")
    with FakeWorkspace() as fake:
        os.environ.update(DATABRICKS_HOST=fake.url, DATABRICKS_TOKEN="secret")
        mlflow.set_tracking_uri("databricks")
        yield fake


def configured(workspace: FakeWorkspace) -> dict[str, tuple[float, str | None]]:
    (scorers,) = workspace.scorers.values()
    return {s["name"]: (s["sample_rate"], s.get("filter_string")) for s in scorers}


def test_setup_registers_and_starts_managed_judges(workspace: FakeWorkspace) -> None:
    statuses = setup_quality_scorers(NAME, 1.0, 0.5, "丁寧に答える")
    assert {s.runs for s in statuses} == {"databricks"}
    assert configured(workspace) == {
        "safety_check": (1.0, "status = 'OK'"),
        "relevance_check": (0.5, "status = 'OK'"),
        "groundedness_check": (0.5, "status = 'OK'"),
        "custom_guidelines": (0.5, "status = 'OK'"),
    }
    (scorers,) = workspace.scorers.values()
    safety = json.loads(scorers[0]["serialized_scorer"])
    assert safety["builtin_scorer_class"] == "Safety"
    assert safety["builtin_scorer_pydantic_data"].get("model") is None
    assert {call.token for call in workspace.calls} <= {"Bearer secret", ""}


def test_setup_twice_sends_no_second_change(workspace: FakeWorkspace) -> None:
    setup_quality_scorers(NAME)
    writes = len(workspace.sent("PATCH", "/1")) + len(workspace.sent("POST", "/1"))
    setup_quality_scorers(NAME)
    assert len(workspace.sent("PATCH", "/1")) + len(workspace.sent("POST", "/1")) == writes


def test_custom_code_is_registered_on_databricks(workspace: FakeWorkspace) -> None:
    @scorer
    def apologises(outputs):  # type: ignore[no-untyped-def]
        return "申し訳" in str(outputs)

    (status,) = setup_scorers(NAME, [ScorerPlan(scorer=apologises, sample_rate=0.1)])
    assert status.registered and status.runs == "databricks"
    assert configured(workspace)["apologises"][0] == 0.1


def test_the_lifecycle_keeps_rate_and_filter(workspace: FakeWorkspace) -> None:
    setup_quality_scorers(NAME)
    changed = change_sample_rate(NAME, "safety_check", 0.25)
    assert (changed.sample_rate, changed.filter_string) == (0.25, "status = 'OK'")
    assert pause_scorer(NAME, "safety_check").sample_rate == 0
    assert configured(workspace)["safety_check"][0] == 0
    resumed = resume_scorer(NAME, "safety_check")
    assert (resumed.sample_rate, resumed.filter_string) == (0.25, "status = 'OK'")
    assert configured(workspace)["safety_check"] == (0.25, "status = 'OK'")
    remove_scorer(NAME, "safety_check")
    with pytest.raises(ScorerNotFoundError, match="safety_check"):
        get_scorer_status(NAME, "safety_check")
    assert delete_all_scorers(NAME, confirm=True) == ["relevance_check", "groundedness_check"]
    assert list_scorer_statuses(NAME) == []


def live() -> None:
    """隣にもう 1 つスコアラーがあるところで、登録してから削除するまで。"""
    setup_scorers(NAME, [ScorerPlan(scorer=Safety(name="neighbour"), sample_rate=0.1)])
    setup_scorers(NAME, [ScorerPlan(scorer=Safety(name="safety_check"), sample_rate=0.5)])
    change_sample_rate(NAME, "safety_check", 0.25)
    change_sample_rate(NAME, "safety_check", 0.25, filter_string=None)
    change_sample_rate(NAME, "safety_check", 0.25, filter_string="tag.plan = 'vip'")
    pause_scorer(NAME, "safety_check")
    resume_scorer(NAME, "safety_check")
    setup_scorers(NAME, [ScorerPlan(scorer=Safety(name="safety_check"), sample_rate=1.0)])
    remove_scorer(NAME, "safety_check")


def test_a_running_scorer_is_changed_by_update(
    workspace: FakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    updated: list[float | None] = []
    update = Scorer.update

    def noted(self: Scorer, **change: Any) -> Scorer:
        updated.append(change["sampling_config"].sample_rate)
        return update(self, **change)

    monkeypatch.setattr(Scorer, "update", noted)
    live()
    assert updated == [0.25, 0.25, 0.25, 0.0, 1.0]  # 0.0 は停止。最初の開始と再開は start()


def test_the_requests_of_a_scorers_life(workspace: FakeWorkspace) -> None:
    """登録、開始、更新、停止、削除の要求の本文。一覧の全体を送り直すので、隣の設定も確かめる。"""
    live()
    (created,) = workspace.sent("POST", "/scheduled-scorers/1")
    (first,) = created["scheduled_scorers"]["scorers"]
    assert (first["name"], first["sample_rate"]) == ("neighbour", 0.0)
    assert first["builtin"] == {"name": "neighbour"}
    assert json.loads(first["serialized_scorer"])["builtin_scorer_class"] == "Safety"

    refused, *patches = workspace.sent("PATCH", "/scheduled-scorers/1")
    assert refused["scheduled_scorers"] == created["scheduled_scorers"]  # まだないので POST になる
    assert {patch["update_mask"] for patch in patches} == {"scheduled_scorers.scorers"}
    lists = [patch["scheduled_scorers"]["scorers"] for patch in patches]
    settings = [
        {item["name"]: (item["sample_rate"], item.get("filter_string")) for item in items}
        for items in lists
    ]
    only_ok, vip = "status = 'OK'", "tag.plan = 'vip'"
    assert settings[0] == {"neighbour": (0.1, only_ok)}
    assert {setting["neighbour"] for setting in settings} == {(0.1, only_ok)}
    assert [setting.get("safety_check") for setting in settings[1:]] == [
        (0.0, None),  # 登録
        (0.5, only_ok),  # 開始
        (0.25, only_ok),  # 割合だけを変える: フィルターは残る
        (0.25, ""),  # フィルターをやめる: None は「変えない」になるので、空にする
        (0.25, vip),
        (0.0, vip),  # 停止
        (0.25, vip),  # 再開
        (1.0, only_ok),  # デプロイで割合とフィルターが変わった
        None,  # 削除
    ]
    definitions = {item["serialized_scorer"] for items in lists for item in items}
    assert len(definitions) == 2  # 割合を変えても、定義は変わらない
    assert [s.name for s in list_scorer_statuses(NAME)] == ["neighbour"]


def test_a_filter_can_be_dropped(workspace: FakeWorkspace) -> None:
    setup_quality_scorers(NAME)
    assert change_sample_rate(NAME, "safety_check", 1.0, filter_string=None).filter_string is None
    status = setup_quality_scorers(NAME, filter_string=None)[0]
    writes = len(workspace.sent("PATCH", "/1"))
    assert setup_quality_scorers(NAME, filter_string=None)[0] == status
    assert len(workspace.sent("PATCH", "/1")) == writes  # 空のフィルターを、違いとみなさない


def test_a_deployment_does_not_resume_what_an_operator_paused(workspace: FakeWorkspace) -> None:
    setup_quality_scorers(NAME)
    pause_scorer(NAME, "safety_check")
    status = setup_quality_scorers(NAME)[0]
    assert (status.sample_rate, "resume" in status.reason) == (0.0, True)
    assert configured(workspace)["safety_check"][0] == 0


def test_backfill_by_name_sends_the_current_rate_and_the_window(workspace: FakeWorkspace) -> None:
    setup_quality_scorers(NAME)
    start, end = (datetime(2026, 1, day, tzinfo=timezone.utc) for day in (1, 2))
    report = backfill_with_scorer_names("1", ["safety_check", "relevance_check"], start, end)
    assert (report.job_id, report.scored) == ("job-1", 0)
    (body,) = workspace.backfills
    assert body["scorer_sample_rates"] == [
        {"name": "safety_check", "sample_rate": 1.0},
        {"name": "relevance_check", "sample_rate": 0.5},
    ]
    assert body["experiment_id"] == "1"
    assert body["start_timestamp_ms"] == 1767225600000
    assert body["end_timestamp_ms"] == 1767312000000


def test_the_other_four_functions_submit_jobs_too(workspace: FakeWorkspace) -> None:
    statuses = setup_quality_scorers(NAME)
    week = backfill_last_week("1", ["safety_check"])
    assert (week.end - week.start).days == 7
    days = backfill_date_range("1", ["safety_check"], "2026-01-01", "2026-01-02")
    config = {"scorer": statuses[0].scorer, "sample_rate": 0.8}
    backfill_with_custom_sample_rates("1", [config])
    tone = Guidelines(name="tone", guidelines="丁寧")
    backfill_new_scorer("1", tone, sample_rate=0.3, days_back=30)
    assert [job["scorer_sample_rates"][0]["sample_rate"] for job in workspace.backfills] == [
        1.0,
        1.0,
        0.8,
        0.3,
    ]
    assert configured(workspace)["tone"][0] == 0.3  # 開始していないと、ジョブは何も採点しない
    assert days.start.isoformat() == "2026-01-01T00:00:00+09:00"
    assert days.end.isoformat() == "2026-01-03T00:00:00+09:00"
    assert all(job["start_timestamp_ms"] < job["end_timestamp_ms"] for job in workspace.backfills)


def test_a_dry_run_submits_no_job(workspace: FakeWorkspace) -> None:
    setup_quality_scorers(NAME)
    assert backfill_last_week("1", ["safety_check"], dry_run=True).job_id is None
    assert workspace.backfills == []


def test_a_stopped_scorer_is_refused_instead_of_scoring_nothing(workspace: FakeWorkspace) -> None:
    setup_quality_scorers(NAME)
    pause_scorer(NAME, "safety_check")
    with pytest.raises(BackfillError, match="stopped"):
        backfill_last_week("1", ["safety_check"])
    assert workspace.backfills == []


def test_refusals_become_one_error_type(workspace: FakeWorkspace) -> None:
    setup_quality_scorers(NAME)
    with pytest.raises(BackfillError, match="no scorer 'nothing'"):
        backfill_last_week("1", ["nothing"])
    workspace.refuse_backfill = True
    with pytest.raises(BackfillError, match="refused"):
        backfill_last_week("1", ["safety_check"])


def test_the_client_prints_nothing(
    workspace: FakeWorkspace, capfd: pytest.CaptureFixture[str]
) -> None:
    setup_quality_scorers(NAME)
    capfd.readouterr()
    backfill_last_week("1", ["safety_check"])
    assert capfd.readouterr().out == ""
