"""バックフィル: 期間、見積もり、再開、強制終了の後でも抜けも重複もない。"""

from __future__ import annotations

import inspect
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Feedback
from mlflow.genai.scorers import Guidelines, PIIDetection, Safety, Scorer, scorer

from chapter8_samples.quality_monitoring import (
    BackfillError,
    ScorerPlan,
    ScoringOptions,
    ScoringTarget,
    backfill,
    backfill_date_range,
    backfill_last_week,
    backfill_new_scorer,
    backfill_with_custom_sample_rates,
    backfill_with_scorer_names,
    list_scorer_statuses,
    pause_scorer,
    setup_scorers,
)

MODEL = "openai:/gpt-4.1-mini"
ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_by_name_uses_the_rates_and_says_the_default_window(
    crowd: str, stub_llm: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rates = {"pii_all": 1.0, "pii_half": 0.5}
    plans = [ScorerPlan(scorer=PIIDetection(name=n), sample_rate=r) for n, r in rates.items()]
    setup_scorers("crowd", plans)
    report = backfill_with_scorer_names(crowd, list(rates))
    assert report.scorers["pii_all"].scored == 20
    assert 0 < report.scorers["pii_half"].sampled_out < 20
    assert report.end - report.start == timedelta(days=7)
    (said,) = [r.getMessage() for r in caplog.records if "no start_time" in r.getMessage()]
    assert "only the last 7 days" in said and str(report.start) in said
    caplog.clear()
    backfill_last_week(crowd, ["pii_all"], dry_run=True)
    assert "no start_time" not in caplog.text  # 自分で 7 日間を選んだ人には言わない


def test_a_dry_run_counts_calls_and_money_and_writes_nothing(
    store: str, ask: Any, infos: Any, stub_llm: Any
) -> None:
    ask(3)
    targets = [
        ScoringTarget(scorer=Safety(name="safety_check", model=MODEL)),
        ScoringTarget(scorer=PIIDetection(name="pii")),
    ]
    plan = backfill(store, targets, dry_run=True)
    assert (plan.traces, plan.scored, plan.judge_calls) == (3, 6, 3)
    assert plan.cost_usd == pytest.approx(3 * (600 * 0.40 + 60 * 1.60) / 1e6)
    assert backfill_new_scorer(store, PIIDetection(name="new"), 1.0, dry_run=True).scored == 3
    assert list_scorer_statuses("quality") == []
    assert not stub_llm.requests
    assert all(not info.assessments for info in infos().values())


@pytest.mark.slow
def test_a_dry_run_counts_only_what_is_left(store: str, ask: Any, stub_llm: Any) -> None:
    target = ScoringTarget(scorer=Safety(name="safety_check", model=MODEL))
    ask(2)
    done = backfill(store, [target])
    ask(2)
    plan = backfill(store, [target], dry_run=True)
    assert done.cost_usd and (plan.skipped, plan.judge_calls) == (2, 2)


def test_an_unknown_price_is_not_zero(store: str, ask: Any) -> None:
    ask(1)
    target = ScoringTarget(scorer=Safety(name="s", model="openai:/my-own-model"))
    plan = backfill(store, [target], dry_run=True)
    assert (plan.cost_usd, plan.unpriced) == (None, ("s",))


@pytest.mark.slow
def test_running_again_scores_nothing(crowd: str) -> None:
    targets = [ScoringTarget(scorer=PIIDetection(name="pii_again"))]
    first, second = backfill(crowd, targets), backfill(crowd, targets)
    assert (first.scored, second.scored, second.skipped) == (20, 0, 20)


@pytest.mark.slow
def test_a_new_scorer_is_registered_and_scores_the_past(
    store: str, ask: Any, infos: Any, stub_llm: Any
) -> None:
    ask(2)
    tone = Guidelines(name="tone", guidelines="丁寧", model=MODEL)
    estimate = backfill_new_scorer(store, tone, sample_rate=1.0, dry_run=True)
    report = backfill_new_scorer(store, tone, sample_rate=1.0, days_back=1)
    assert estimate.judge_calls == report.scored == 2
    versions = {
        (a.metadata or {}).get("mlflow.assessment.scorerVersion")
        for info in infos().values()
        for a in info.assessments
    }
    assert versions == {"1"}  # 見積もりだけでは登録しない


def test_code_scorers_can_be_backfilled_too(store: str, ask: Any) -> None:
    @scorer
    def length(outputs) -> int:  # type: ignore[no-untyped-def]
        return len(outputs)

    ask(1)
    assert backfill_new_scorer(store, length, sample_rate=1.0).scored == 1


def test_a_date_range_is_whole_local_days(store: str, ask: Any) -> None:
    setup_scorers("quality", [ScorerPlan(scorer=PIIDetection(name="pii"))])
    ask(1)
    report = backfill_date_range(store, ["pii"], "2026-03-07", date(2026, 3, 8), dry_run=True)
    assert report.start == datetime(2026, 3, 6, 15, tzinfo=timezone.utc)
    assert report.end == datetime(2026, 3, 8, 15, tzinfo=timezone.utc)
    new_york = backfill_date_range(
        store, ["pii"], "2026-03-08", "2026-03-08", tz="America/New_York", dry_run=True
    )
    elapsed = new_york.end.astimezone(timezone.utc) - new_york.start.astimezone(timezone.utc)
    assert elapsed == timedelta(hours=23)  # 夏時間に変わる日
    assert report.traces == 0


def test_custom_rates_take_dicts_or_targets(store: str, ask: Any) -> None:
    ask(1)
    pii = PIIDetection(name="pii")
    configs = [{"scorer": pii, "sample_rate": 1.0}]
    assert backfill_with_custom_sample_rates(store, configs).scored == 1
    assert backfill_with_custom_sample_rates(store, [ScoringTarget(scorer=pii)]).skipped == 1


def test_wrong_calls_are_refused_before_any_work(store: str) -> None:
    setup_scorers("quality", [ScorerPlan(scorer=PIIDetection(name="pii"))])
    now = datetime.now(timezone.utc)
    with pytest.raises(BackfillError, match="no time zone"):
        backfill_with_scorer_names(store, ["pii"], datetime(2026, 1, 1))
    with pytest.raises(BackfillError, match="not before"):
        backfill_with_scorer_names(store, ["pii"], now, now - timedelta(days=1))
    with pytest.raises(BackfillError, match="at least one"):
        backfill_with_scorer_names(store, [])
    with pytest.raises(BackfillError, match="must be a list"):
        backfill_last_week(store, "pii")
    with pytest.raises(BackfillError, match=r"registered: \['pii'\]"):
        backfill_last_week(store, ["typo"])
    with pytest.raises(BackfillError, match="unique"):
        backfill_last_week(store, ["pii", "pii"])
    for nowhere in ("999", "quality"):
        with pytest.raises(BackfillError, match="no experiment with id"):
            backfill_last_week(nowhere, ["pii"])
        with pytest.raises(BackfillError, match="no experiment with id"):
            backfill(nowhere, [ScoringTarget(scorer=PIIDetection(name="p"))], dry_run=True)
    pause_scorer("quality", "pii")
    with pytest.raises(BackfillError, match="stopped"):
        backfill_last_week(store, ["pii"])


def test_a_new_scorer_is_not_registered_when_the_call_is_wrong(store: str) -> None:
    pii = PIIDetection(name="pii")
    with pytest.raises(TypeError, match="dryrun"):
        backfill_new_scorer(store, pii, dryrun=True)  # type: ignore[call-arg]
    for days in (0, -3):
        with pytest.raises(BackfillError, match="not before"):
            backfill_new_scorer(store, pii, days_back=days)
    for rate in (0, 1.5):
        with pytest.raises(BackfillError, match="sample_rate"):
            backfill_new_scorer(store, pii, sample_rate=rate)
    with pytest.raises(BackfillError, match="no experiment with id 'quality'"):
        backfill_new_scorer("quality", pii)
    with pytest.raises(BackfillError, match="has no provider"):
        backfill_new_scorer(store, Safety(name="s", model="gpt-4.1-mini"))
    assert list_scorer_statuses("quality") == []


def test_a_config_that_cannot_work_is_one_clear_error(store: str) -> None:
    pii = PIIDetection(name="pii")
    configs: list[dict[str, Any]] = [
        {"scorer": pii, "sample_rate": None},
        {"scorer": pii, "sample_rate": "half"},
        {"scorer": pii, "sample_rate": 1.5},
        {"scorer": pii, "rate": 0.5},
        {"scorer": "pii", "sample_rate": 0.5},
        {"sample_rate": 0.5},
    ]
    for config in configs:
        with pytest.raises(BackfillError, match=r"scorer|rate"):
            backfill_with_custom_sample_rates(store, [config])


def test_dates_and_time_zones_that_do_not_exist_are_named(store: str) -> None:
    days: list[tuple[Any, Any, Any]] = [
        ("2026-13-01", "2026-12-01", "Asia/Tokyo"),
        ("2026-12-01", "12/31", "Asia/Tokyo"),
        ("2026-12-01", None, "Asia/Tokyo"),
        ("2026-12-01", "9999-12-31", "Asia/Tokyo"),
        ("2026-12-01", "2026-12-31", "Tokyo"),
        ("2026-12-01", "2026-12-31", None),
    ]
    for first, last, tz in days:
        with pytest.raises(BackfillError, match=f"{last!r}, {tz!r}"):
            backfill_date_range(store, ["pii"], first, last, tz=tz)


@pytest.mark.slow
def test_progress_is_reported_and_options_apply(store: str, ask: Any) -> None:
    ask(3)
    seen: list[int] = []
    backfill(
        store,
        [ScoringTarget(scorer=PIIDetection(name="pii"))],
        options=ScoringOptions(concurrency=1),
        on_progress=lambda report: seen.append(report.scored),
    )
    assert seen == [1, 2, 3]


def judges() -> list[Scorer]:
    @scorer
    def two(outputs):  # type: ignore[no-untyped-def]
        return [Feedback(name="first", value=1), Feedback(name="second", value=2)]

    return [Safety(name="safety", model=MODEL), PIIDetection(name="pii"), two]


TRACES = 100
KILLED = f"""
import sys
import mlflow
from mlflow.entities import Feedback
from mlflow.genai.scorers import PIIDetection, Safety, scorer
from chapter8_samples.quality_monitoring import ScoringTarget, backfill
MODEL = {MODEL!r}
{inspect.getsource(judges).replace(" -> list[Scorer]", "")}
mlflow.set_tracking_uri(sys.argv[1])
report = backfill(
    sys.argv[2],
    [ScoringTarget(scorer=judge) for judge in judges()],
    on_progress=lambda report: print(report.scored, flush=True),
)
print("done", report.scored, report.skipped)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL (POSIX)")
def test_killed_at_random_points_and_run_again(
    store: str, ask: Any, stub_llm: Any, tmp_path: Path
) -> None:
    """3 つのスコアラー(1 つは評価を 2 つ返す)の採点を、SIGKILL で 4 回止める。"""
    ask(TRACES)
    program = tmp_path / "killed.py"
    program.write_text(KILLED, encoding="utf-8")  # @scorer の定義は、ファイルから読める必要がある
    command = [sys.executable, str(program), mlflow.get_tracking_uri(), store]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for more in random.Random(8).sample(range(5, TRACES * 3 // 5), 4):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while int(process.stdout.readline()) < more:
            pass
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    scored, skipped = run.stdout.rpartition("done")[2].split()
    assert 0 < int(skipped) < TRACES * 3 and int(scored) + int(skipped) == TRACES * 3
    again = backfill(store, [ScoringTarget(scorer=judge) for judge in judges()])
    assert (again.scored, again.skipped) == (0, TRACES * 3)
    assert again.seconds < 60  # 止まっていないこと
    stored = [
        a.name
        for trace in mlflow.search_traces(
            locations=[store], max_results=2000, return_type="list", include_spans=False
        )
        for a in trace.info.assessments
    ]
    assert Counter(stored) == dict.fromkeys(("safety", "pii", "first", "second"), TRACES)
