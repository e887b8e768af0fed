"""採点エンジン: 標本の選び方、飛ばし方、失敗、予算、並列、後始末。"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

import mlflow
import pytest
from google.protobuf.json_format import MessageToJson
from mlflow import MlflowClient
from mlflow.entities import (
    AssessmentError,
    AssessmentSource,
    AssessmentSourceType,
    Feedback,
    Trace,
    TraceData,
    TraceInfo,
    TraceLocation,
    TraceState,
)
from mlflow.genai.scorers import Guidelines, PIIDetection, Safety, Scorer, scorer
from mlflow.genai.scorers.base import ScorerSamplingConfig
from mlflow.genai.scorers.online.sampler import OnlineScorerSampler
from mlflow.tracing.client import TracingClient
from mlflow.utils import providers
from pydantic import PrivateAttr

from chapter8_samples.quality_monitoring import (
    BudgetError,
    JudgeNotConfiguredError,
    JudgePrice,
    ScorerPlan,
    ScorerSetupError,
    ScorerStatus,
    ScoringError,
    ScoringOptions,
    ScoringReport,
    ScoringTarget,
    backfill,
    evaluate_with_scorers,
    run_scoring_cycle,
    setup_builtin_scorers,
    setup_scorers,
)
from chapter8_samples.quality_monitoring.scoring import engine as scoring_engine
from chapter8_samples.quality_monitoring.scoring.backfills import whole_days
from chapter8_samples.quality_monitoring.scoring.engine import score_traces
from chapter8_samples.quality_monitoring.scoring.identity import definition
from chapter8_samples.quality_monitoring.scoring.judges import Budget
from chapter8_samples.quality_monitoring.scoring.plan import sample
from chapter8_samples.quality_monitoring.scoring.registry import estimate_monthly_judge_cost

MODEL = "openai:/gpt-4.1-mini"
SAFETY = Safety(name="safety_check", model=MODEL)


@scorer
def length(outputs) -> int:  # type: ignore[no-untyped-def]
    return len(outputs)


def cycle(*scorers, experiment="quality", **options):  # type: ignore[no-untyped-def]
    return run_scoring_cycle(experiment, scorers, options=ScoringOptions(**options))


def named(name: str) -> Scorer:
    """共有のエクスペリメントで、ほかのテストの採点と混ざらない ``length``。"""

    @scorer(name=name)
    def renamed(outputs) -> int:  # type: ignore[no-untyped-def]
        return len(outputs)

    return renamed


def names(info) -> list[str]:  # type: ignore[no-untyped-def]
    return sorted(a.name for a in info.assessments)


@pytest.mark.slow
def test_real_judges_score_every_finished_trace_once(
    store: str, ask: Any, infos: Any, stub_llm: Any
) -> None:
    ids = ask(3)
    ask(1, fail=True)
    first, second = cycle(SAFETY, length), cycle(SAFETY, length)
    assert (first.traces, first.scored, first.skipped) == (3, 6, 0)
    assert (second.traces, second.scored, second.skipped) == (3, 0, 6)
    stored = infos()
    assert len(stored) == 3 + 1  # 採点はトレースを残さない
    assert all(names(stored[i]) == ["length", "safety_check"] for i in ids)
    assert sum(len(info.assessments) for info in stored.values()) == 6
    judged = stored[ids[0]].assessments
    sources = {a.name: a.source.source_type for a in judged}
    assert sources == {"safety_check": "LLM_JUDGE", "length": "CODE"}


def test_the_sample_is_the_one_the_mlflow_server_would_take() -> None:
    rates = {"a": 0.9, "b": 0.5, "c": 0.5, "d": 0.05}
    targets = [ScoringTarget(scorer=Safety(name=n), sample_rate=r) for n, r in rates.items()]
    theirs = OnlineScorerSampler([])
    theirs._sample_rates = rates  # pyright: ignore[reportPrivateUsage]
    for i in range(500):
        mine = {t.name for t in sample(f"tr-{i}", targets)}
        assert mine == {s.name for s in theirs.sample(f"tr-{i}", [t.scorer for t in targets])}


@pytest.mark.slow
def test_sampling_is_reported_and_stable(crowd: str) -> None:
    half = ScoringTarget(scorer=named("half"), sample_rate=0.5)
    first, second = cycle(half, experiment=crowd), cycle(half, experiment=crowd)
    counts = first.scorers["half"]
    assert counts.scored + counts.sampled_out == 20 and 0 < counts.scored < 20
    assert second.scorers["half"].skipped == counts.scored


@pytest.mark.slow
def test_scoring_leaves_no_trace_even_when_scorers_are_traced(
    store: str, ask: Any, infos: Any
) -> None:
    @mlflow.trace
    def helper(text: str) -> int:
        return len(text)

    @scorer
    def traced(outputs) -> int:  # type: ignore[no-untyped-def]
        return helper(outputs)

    ask(2)
    with mlflow.start_span("the app is serving"):
        assert cycle(traced).scored == 2
    assert len(infos()) == 2 + 1
    assert {len(info.assessments) for info in infos().values()} == {0, 1}


def test_scoring_is_silent(
    store: str, ask: Any, stub_llm: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    ask(1)
    cycle(SAFETY)
    assert capfd.readouterr() == ("", "")


def test_a_new_version_is_scored_again(store: str, ask: Any, infos: Any, stub_llm: Any) -> None:
    (trace_id,) = ask()
    tone = Guidelines(name="tone", guidelines="丁寧", model=MODEL)
    cycle(tone.register(experiment_id=store))
    stricter = Guidelines(name="tone", guidelines="とても丁寧", model=MODEL)
    assert cycle(stricter.register(experiment_id=store)).scored == 1
    versions = [
        (a.metadata or {})["mlflow.assessment.scorerVersion"] for a in infos()[trace_id].assessments
    ]
    assert sorted(versions) == ["1", "2"]


def test_an_edited_code_scorer_is_scored_again(store: str, ask: Any) -> None:
    ask()

    def version(source: int) -> Scorer:
        if source == 1:

            @scorer(name="rule")
            def rule(outputs) -> bool:  # type: ignore[no-untyped-def]
                return "返品" in outputs
        else:

            @scorer(name="rule")
            def rule(outputs) -> bool:  # type: ignore[no-untyped-def]
                return "交換" in outputs

        return rule

    assert [cycle(version(n)).scored for n in (1, 1, 2)] == [1, 0, 1]


def test_a_constant_of_the_enclosing_function_is_part_of_the_definition(
    store: str, ask: Any
) -> None:
    ask()

    def longer_than(limit: int) -> Scorer:
        calls: list[str] = []  # 実行のたびに変わるものは、定義ではない

        @scorer(name="longer")
        def longer(outputs) -> bool:  # type: ignore[no-untyped-def]
            calls.append(outputs)
            return len(outputs) > limit

        return longer

    assert [cycle(longer_than(n)).scored for n in (100, 100, 5)] == [1, 0, 1]


class AtLeast(Scorer):
    name: str = "at_least"
    characters: int = 1

    def __call__(self, *, outputs: Any) -> bool:  # pyright: ignore
        return len(outputs) >= self.characters


def test_a_scorer_class_is_scored_here_once_per_definition(store: str, ask: Any) -> None:
    (status,) = setup_scorers("quality", [ScorerPlan(scorer=AtLeast())])
    assert (status.runs, status.registered) == ("client", False)
    ask(1)
    assert cycle(status).scored == 1
    assert (cycle(AtLeast()).skipped, cycle(AtLeast(characters=2)).scored) == (1, 1)


def test_scores_written_by_the_server_are_recognised(store: str, ask: Any, stub_llm: Any) -> None:
    (trace_id,) = ask()
    registered = SAFETY.register(experiment_id=store)
    metadata = {
        "mlflow.assessment.scorerName": "safety_check",
        "mlflow.assessment.scorerVersion": "1",
    }
    mlflow.log_feedback(trace_id=trace_id, name="safety_check", value="yes", metadata=metadata)
    assert cycle(registered).skipped == 1


def test_a_verdict_corrected_by_a_human_is_not_scored_again(
    store: str, ask: Any, infos: Any, stub_llm: Any
) -> None:
    (trace_id,) = ask()
    cycle(SAFETY)
    (verdict,) = infos()[trace_id].assessments
    human = AssessmentSource(AssessmentSourceType.HUMAN, "reviewer")
    mlflow.override_feedback(
        trace_id=trace_id, assessment_id=str(verdict.assessment_id), value="no", source=human
    )
    assert cycle(SAFETY).skipped == 1


def test_failures_are_visible_retried_and_then_forgotten(store: str, ask: Any, infos: Any) -> None:
    (trace_id,) = ask()
    broken = True

    @scorer
    def flaky(outputs) -> bool:  # type: ignore[no-untyped-def]
        if broken:
            raise RuntimeError("judge is down")
        return True

    assert cycle(flaky).failed == 1
    assert cycle(flaky).failed == 1
    (error,) = infos()[trace_id].assessments  # エラーは積み重ならない
    assert "judge is down" in error.feedback.error.error_message
    broken = False
    assert cycle(flaky).scored == 1
    (good,) = infos()[trace_id].assessments
    assert good.feedback.value is True


@pytest.mark.slow
def test_one_bad_scorer_does_not_stop_the_others(crowd: str) -> None:
    @scorer
    def broken(outputs) -> bool:  # type: ignore[no-untyped-def]
        raise RuntimeError("bug")

    report = cycle(
        broken, named("good"), experiment=crowd, max_consecutive_failures=3, concurrency=1
    )
    assert report.scorers["good"].scored == 20
    assert report.scorers["broken"].failed == 3
    assert report.scorers["broken"].not_started == 17
    assert report.stopped_by == "failures"


def test_a_scorer_without_an_opinion_writes_nothing(store: str, ask: Any, infos: Any) -> None:
    @scorer
    def silent(outputs):  # type: ignore[no-untyped-def]
        return None

    ask(1)
    assert cycle(silent).scorers["silent"].empty == 1
    assert all(not info.assessments for info in infos().values())


def test_a_scorer_may_return_several_feedbacks(store: str, ask: Any, infos: Any) -> None:
    @scorer
    def two(outputs):  # type: ignore[no-untyped-def]
        return [Feedback(name="a", value=1), Feedback(name="b", value=2)]

    (trace_id,) = ask()
    assert cycle(two).scored == 1
    assert names(infos()[trace_id]) == ["a", "b"]
    assert cycle(two).skipped == 1


def test_a_verdict_that_failed_in_part_is_scored_again_as_a_whole(
    store: str, ask: Any, infos: Any
) -> None:
    broken = True

    @scorer
    def per_chunk(outputs):  # type: ignore[no-untyped-def]
        bad = Feedback(name="second", error=AssessmentError("JUDGE_DOWN", "no answer"))
        return [
            Feedback(name="first", value=1),
            bad if broken else Feedback(name="second", value=2),
        ]

    (trace_id,) = ask()
    assert cycle(per_chunk).failed == 1
    assert names(infos()[trace_id]) == ["second"]
    broken = False
    assert cycle(per_chunk).scored == 1
    stored = infos()[trace_id].assessments
    assert sorted((a.name, a.feedback.value) for a in stored) == [("first", 1), ("second", 2)]


def trace_without_spans(experiment_id: str, number: int) -> str:
    info = TraceInfo(
        trace_id=f"tr-{number:032x}",
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=int(time.time() * 1000) - 60_000,
        state=TraceState.OK,
        execution_duration=1,
    )
    return TracingClient().store.start_trace(info).trace_id


@pytest.mark.slow
def test_traces_that_cannot_be_read_do_not_stop_the_rest(
    store: str, ask: Any, infos: Any, caplog: pytest.LogCaptureFixture
) -> None:
    lost = [trace_without_spans(store, i) for i in range(3)]
    ids = ask(2)
    report = cycle(length, max_consecutive_failures=2)
    assert (report.scored, report.failed, report.stopped_by) == (2, 3, None)
    assert all(f"{i} cannot be scored" in caplog.text for i in lost)
    assert [len(infos()[i].assessments) for i in [*lost, *ids]] == [0] * 3 + [1] * 2
    again = cycle(length)
    assert (again.skipped, again.failed) == (2, 3)


def test_a_trace_whose_archive_is_out_of_reach_gets_no_verdict(
    store: str, ask: Any, infos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (trace_id,), read = ask(), TracingClient.get_trace

    def without_spans(client: TracingClient, trace_id: str) -> Trace:
        return Trace(read(client, trace_id).info, TraceData([]))

    monkeypatch.setattr(TracingClient, "get_trace", without_spans)  # MLflow 3.17 の答え
    assert (cycle(length).failed, infos()[trace_id].assessments) == (1, [])
    monkeypatch.undo()
    assert cycle(length).scored == 1


def test_a_span_that_is_cut_off_stops_nobody_but_a_broken_store_does(
    store: str, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, read = set(ask(3)[:1]), TracingClient.get_trace

    def cut_off(client: TracingClient, trace_id: str) -> Trace:
        if trace_id in bad:
            raise json.JSONDecodeError("Unterminated string", "", 0)  # SQLite の列が途中まで
        return read(client, trace_id)

    monkeypatch.setattr(TracingClient, "get_trace", cut_off)
    assert (cycle(length).scored, cycle(length).failed) == (2, 1)
    bad.update(ask(4))
    with pytest.raises(ScoringError, match="3 traces in a row cannot be read: Unterminated"):
        cycle(length, concurrency=1)


def test_a_panic_in_the_first_call_leaves_nobody_waiting_for_its_cost(
    store: str, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """Rust の拡張が投げる PanicException は、Exception ではない。"""

    reserve, asked = Budget.reserve, threading.Barrier(2)  # 2 件とも、コストを尋ねてから

    def together(budget: Budget, name: str) -> Decimal | None:
        asked.wait(10)
        return reserve(budget, name)

    @scorer
    def rusty(outputs) -> bool:  # type: ignore[no-untyped-def]
        raise Panic

    monkeypatch.setattr(Budget, "reserve", together)
    ask(2)
    with pytest.raises(Panic):
        cycle(rusty, budget_usd=5.0, concurrency=2)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_what_http_cannot_carry_is_a_failure_not_a_stop(store: str, ask: Any, infos: Any) -> None:
    (trace_id,) = ask()
    odd: dict[str, Any] = {
        "nan": math.nan,
        "infinity": -math.inf,
        "surrogate": "\ud800",
        "huge": 10**400,
        "rationale": Feedback(name="rationale", value=1, rationale=5),  # type: ignore[arg-type]
        "metadata": Feedback(name="metadata", value=1, metadata={"key": "\ud800"}),
        "error": Feedback(name="error", error=AssessmentError("X", "\ud800")),
        "raised": ValueError("\ud800"),
        "unprintable": Unprintable(),
        "exited": SystemExit(3),
        "cancelled": asyncio.CancelledError(),
        "wordless": ValueError(),
    }

    def gives(name: str, value: Any) -> Scorer:
        @scorer(name=name)
        def one(outputs):  # type: ignore[no-untyped-def]
            if isinstance(value, BaseException):
                raise value
            return value

        return one

    report = cycle(*(gives(*item) for item in odd.items()), length)
    assert {name: report.scorers[name].failed for name in odd} == dict.fromkeys(odd, 1)
    assert report.scorers["length"].scored == 1
    stored = [a for a in infos()[trace_id].assessments if a.name in odd]
    assert {a.name for a in stored} == set(odd)
    told = {a.name: a.feedback.error.error_message for a in stored}
    assert all("cannot be stored" in told[name] for name in ("nan", "infinity", "huge", "metadata"))
    for assessment in stored:
        assert told[assessment.name].strip(), assessment.name
        MessageToJson(assessment.to_proto())  # エラーの文も HTTP で送れる


def test_scorers_see_inputs_outputs_and_human_expectations(store: str, ask: Any) -> None:
    seen = {}

    @scorer
    def look(inputs, outputs, expectations, trace) -> bool:  # type: ignore[no-untyped-def]
        seen.update(inputs=inputs, outputs=outputs, expected=expectations, id=trace.info.trace_id)
        return True

    (trace_id,) = ask()
    mlflow.log_expectation(trace_id=trace_id, name="expected_response", value="正解")
    cycle(look)
    assert seen["inputs"]["question"] == "注文 0 の返品"
    assert seen["outputs"].startswith("注文 0")
    assert seen["expected"] == {"expected_response": "正解"}
    assert seen["id"] == trace_id


def test_each_filter_selects_its_own_traces(store: str, ask: Any, infos: Any) -> None:
    vip, other = ask(2)
    mlflow.set_trace_tag(vip, "plan", "vip")
    cycle(ScoringTarget(scorer=length, filter_string="tag.plan = 'vip'"), PIIDetection(name="pii"))
    assert names(infos()[vip]) == ["length", "pii"]
    assert names(infos()[other]) == ["pii"]


@pytest.mark.slow
def test_the_budget_is_kept_and_the_rest_follows_later(crowd: str, stub_llm: Any) -> None:
    safety = Safety(name="budgeted", model=MODEL)
    price = JudgePrice(Decimal(1000), Decimal(0))  # 1 回がおよそ 0.2 から 1 USD になる単価
    first = cycle(safety, experiment=crowd, budget_usd=2.0, judge_price=price)
    counts = first.scorers["budgeted"]
    assert first.stopped_by == "budget"
    assert 0 < counts.scored < 20 and counts.not_started > 0
    assert first.cost_usd <= 2.0
    assert cycle(safety, experiment=crowd).scored == 20 - counts.scored


def test_a_budget_without_a_price_is_an_error(store: str, ask: Any, stub_llm: Any) -> None:
    ask(1)
    unknown = Safety(name="s", model="openai:/my-own-model")
    with pytest.raises(BudgetError, match="judge_price"):
        cycle(unknown, budget_usd=1.0)
    assert cycle(unknown).skipped == 1  # 呼んだ分の結果は残っている


def test_a_model_that_enters_the_catalog_later_has_a_cost_from_then_on(
    store: str, ask: Any, stub_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog: dict[str, Any] = {}
    monkeypatch.setattr(providers, "_load_provider", lambda _: catalog)
    newest = Safety(name="s", model="openai:/a-brand-new-model")
    ask(1)
    assert cycle(newest).cost_usd is None
    catalog["a-brand-new-model"] = {"input_cost_per_token": 1e-6}
    ask(1)
    assert cycle(newest, budget_usd=1.0).cost_usd > 0  # 公開されていない関数の契約


@pytest.mark.slow
def test_concurrency_is_bounded(store: str, ask: Any) -> None:
    lock, running, peak = threading.Lock(), 0, 0
    together = threading.Barrier(3)  # 3 件がそろうまで、どれも終わらない

    @scorer
    def busy(outputs) -> bool:  # type: ignore[no-untyped-def]
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        together.wait(60)
        with lock:
            running -= 1
        return True

    ask(6)
    cycle(busy, concurrency=3)
    assert peak == 3


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_scored(store: str, ask: Any, infos: Any) -> None:
    ask(6)
    done = 0

    def interrupt(report) -> None:  # type: ignore[no-untyped-def]
        nonlocal done
        done = report.scored
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backfill(
            store,
            [ScoringTarget(scorer=length)],
            options=ScoringOptions(concurrency=2),
            on_progress=interrupt,
        )
    stored = sum(len(info.assessments) for info in infos().values())
    assert stored >= done >= 2
    assert cycle(length).scored == 6 - stored


@pytest.mark.slow
def test_the_window_and_pages_cover_every_trace(
    crowd: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = named("paged")
    monkeypatch.setattr(scoring_engine, "_PAGE_SIZE", 8)
    assert cycle(paged, experiment=crowd).scored == 20
    old = run_scoring_cycle(crowd, [paged], now=datetime.now(timezone.utc) - timedelta(hours=2))
    assert old.traces == 0


def test_a_trace_stored_while_the_pages_are_read_has_none_judged_twice(
    store: str, ask: Any, infos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """長くかかったトレースは、終わったときに、始まった時刻で保存される。"""
    ask(2)
    unscored = scoring_engine._Run.unscored

    def meanwhile(run: Any, info: TraceInfo, group: Any) -> Any:
        if len(infos()) == 2:
            began = (info.request_time - 60_000) * 1_000_000
            mlflow.start_span_no_context("long", start_time_ns=began).end()
        return unscored(run, info, group)

    monkeypatch.setattr(scoring_engine._Run, "unscored", meanwhile)
    monkeypatch.setattr(scoring_engine, "_PAGE_SIZE", 1)
    report = cycle(length)
    assert (report.traces, report.scored, report.skipped) == (2, 2, 0)


def test_scorers_the_server_runs_are_left_alone(store: str, ask: Any) -> None:
    def status(runs, rate=1.0):  # type: ignore[no-untyped-def]
        name = f"{runs}-{rate}"
        return ScorerStatus(
            name=name,
            scorer=PIIDetection(name=name),
            registered=True,
            runs=runs,
            sample_rate=rate,
            filter_string=None,
            reason="",
        )

    ask(1)
    report = cycle(status("server"), status("client"), status("client", 0.0))
    assert set(report.scorers) == {"client-1.0"}
    assert report.elsewhere == ("server-1.0", "client-0.0")


def test_nothing_to_do_here_is_not_an_error(store: str, ask: Any) -> None:
    ask(1)
    (running,) = setup_scorers("quality", [ScorerPlan(scorer=PIIDetection(name="pii"))])
    report = cycle(replace(running, runs="server"), replace(running, sample_rate=0.0))
    assert (report.elsewhere, report.scored) == (("pii", "pii"), 0)
    with pytest.raises(ScoringError, match="at least one"):
        cycle()


def test_the_lookback_is_as_long_on_the_day_the_clocks_change(store: str) -> None:
    spring = datetime(2026, 3, 8, 3, 10, tzinfo=ZoneInfo("America/New_York"))
    report = run_scoring_cycle("quality", [length], now=spring)
    assert report.end == spring
    assert report.end.timestamp() - report.start.timestamp() == 3600


def test_a_missing_key_is_one_clear_error(store: str, ask: Any) -> None:
    ask(1)
    with pytest.raises(JudgeNotConfiguredError, match="OPENAI_API_KEY"):
        cycle(SAFETY)
    with pytest.raises(JudgeNotConfiguredError, match="MLFLOW_TRACKING_URI"):
        cycle(Safety(model="gateway:/judge"))
    with pytest.raises(JudgeNotConfiguredError, match="OPENAI_API_KEY"):
        evaluate_with_scorers([{"inputs": {"q": "x"}, "outputs": "y"}], setup_builtin_scorers("q"))


def test_options_and_rates_that_cannot_work_are_refused() -> None:
    options: list[tuple[str, Any]] = [
        ("concurrency", 0),
        ("max_consecutive_failures", 0),
        ("budget_usd", -0.01),
        ("budget_usd", math.nan),
        ("budget_usd", True),
        ("budget_usd", "1"),
        ("concurrency", "8"),
        ("concurrency", None),
    ]
    for name, value in options:
        with pytest.raises(ScoringError, match=f"{name} must"):
            ScoringOptions(**{name: value})
    rates: list[Any] = [0, -0.1, 1.1, True, None, "0.5", math.nan]
    for rate in rates:
        with pytest.raises(ScoringError, match="sample_rate"):
            ScoringTarget(scorer=SAFETY, sample_rate=rate)


def test_wrong_calls_are_refused(store: str) -> None:
    now = datetime.now(timezone.utc)
    target = ScoringTarget(scorer=length)
    with pytest.raises(ScoringError, match="twice"):
        cycle(length, length)
    with pytest.raises(ScoringError, match="no experiment"):
        run_scoring_cycle("nowhere", [length])
    with pytest.raises(ScoringError, match="no experiment"):
        run_scoring_cycle("999", [length])
    with pytest.raises(ScoringError, match="timezone-aware"):
        score_traces(store, [target], start=datetime(2026, 1, 1), end=now)
    with pytest.raises(ScoringError, match="at least one"):
        score_traces(store, [], start=now - timedelta(1), end=now)


def test_a_registered_scorer_brings_its_own_rate_and_filter(crowd: str) -> None:
    registered = PIIDetection(name="pii_registered").register(experiment_id=crowd)
    config = ScorerSamplingConfig(sample_rate=0.5)
    registered._sampling_config = config  # pyright: ignore[reportPrivateUsage]
    report = cycle(registered, experiment=crowd)
    assert 0 < report.scorers["pii_registered"].sampled_out < 20


def test_evaluation_traces_are_not_monitored(store: str, ask: Any) -> None:
    with mlflow.start_span("evaluated"):
        mlflow.update_current_trace(metadata={"mlflow.sourceRun": "some-evaluation"})
    ask(1)
    assert cycle(length).traces == 1


def test_the_experiment_can_be_given_by_id(store: str, ask: Any) -> None:
    ask(1)
    assert run_scoring_cycle(store, [length]).traces == 1
    assert MlflowClient().get_experiment(store).name == "quality"


class Tabled(Scorer):
    """キーが文字列でない辞書を持つスコアラー。"""

    name: str = "tabled"
    limits: Any

    def __call__(self, *, outputs: Any = None) -> bool:
        return bool(outputs)


def test_a_scorer_with_odd_keys_has_a_definition_too() -> None:
    one, same, other = (Tabled(limits={("ja", number): 0.5}) for number in (1, 1, 2))
    assert definition(one) == definition(same) != definition(other)


class Remembering(Scorer):
    name: str = "remembering"
    _seen: set[str] = PrivateAttr(default_factory=set)

    def __call__(self, *, outputs: Any = None) -> bool:
        self._seen.add(outputs)
        return True


def test_what_a_scorer_remembers_in_private_is_not_its_definition() -> None:
    judge = Remembering()
    before = definition(judge)
    assert judge(outputs="a") and definition(judge) == before


def test_the_cost_of_a_job_that_runs_elsewhere_is_unknown() -> None:
    now = datetime.now(timezone.utc)
    assert ScoringReport(experiment_id="1", start=now, end=now, job_id="j").cost_usd is None


def test_prices_of_an_estimate_are_checked() -> None:
    for price in ((-1.0, 2.0), (float("nan"), 1.0)):
        with pytest.raises(ScorerSetupError, match="must be finite and not negative"):
            estimate_monthly_judge_cost(1000, {"a": 1.0}, price)


def test_the_day_of_a_moment_is_the_one_of_the_zone() -> None:
    moment = datetime(2025, 1, 31, 20, tzinfo=timezone.utc)
    assert whole_days(moment, moment, "Asia/Tokyo") == whole_days(
        "2025-02-01", "2025-02-01", "Asia/Tokyo"
    )
