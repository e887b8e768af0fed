"""登録と状態の変更は、何度呼んでも同じ結果になり、接続先の違いを隠す。"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import (
    PIIDetection,
    Safety,
    ScorerSamplingConfig,
    UserFrustration,
    scorer,
)
from mlflow.genai.scorers.registry import list_scorer_versions
from ports import free_port

from chapter8_samples.quality_monitoring import (
    RECOMMENDED_SAMPLE_RATES,
    JudgeEndpointError,
    JudgePrice,
    ScorerNotFoundError,
    ScorerPlan,
    ScorerSetupError,
    ScoringError,
    change_sample_rate,
    delete_all_scorers,
    demonstrate_scorer_lifecycle,
    ensure_judge_endpoint,
    estimate_monthly_judge_cost,
    evaluate_with_scorers,
    get_scorer_status,
    list_scorer_statuses,
    pause_scorer,
    remove_scorer,
    resume_scorer,
    run_scoring_cycle,
    scorer_lifecycle,
    setup_builtin_scorers,
    setup_custom_guidelines_scorer,
    setup_quality_scorers,
    setup_scorers,
    stop_all_scorers,
)
from chapter8_samples.quality_monitoring.scoring import registry
from chapter8_samples.quality_monitoring.scoring.judge_endpoint import resolve_judge_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_readme_quick_start_needs_nothing(tmp_path: Path) -> None:
    code = (
        "from chapter8_samples.quality_monitoring.scorer_setup import setup_quality_scorers\n"
        "found = setup_quality_scorers(experiment_name='/production/my-llm-app', "
        "safety_sample_rate=1.0, quality_sample_rate=0.5)\n"
        "for s in found: print(s.name, s.registered, s.runs, s.sample_rate, s.reason)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = result.stdout.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["safety_check", "True", "client", "1.0"],
        ["relevance_check", "True", "client", "0.5"],
        ["groundedness_check", "True", "client", "0.5"],
    ]
    assert all("OPENAI_API_KEY" in line for line in lines)


@pytest.mark.slow
def test_setup_twice_makes_no_new_version(store: str) -> None:
    first = setup_quality_scorers("quality", custom_guidelines=["丁寧", "簡潔"])
    second = setup_quality_scorers("quality", custom_guidelines=["丁寧", "簡潔"])
    assert [s.version for s in first] == [s.version for s in second] == [1] * 4
    for status in second:
        assert len(list_scorer_versions(name=status.name, experiment_id=store)) == 1


@pytest.mark.slow
def test_other_processes_make_no_new_version(store: str) -> None:
    assert [s.version for s in setup_quality_scorers("quality")] == [1, 1, 1]
    code = (
        "import sys, mlflow; mlflow.set_tracking_uri(sys.argv[1])\n"
        "from chapter8_samples.quality_monitoring import setup_quality_scorers\n"
        "print(*(s.version for s in setup_quality_scorers('quality')))"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", code, mlflow.get_tracking_uri()],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")  # 集合の並び順が変わる種
    ]
    assert [process.communicate(timeout=120)[0] for process in running] == ["1 1 1\n"] * 2


def test_a_changed_definition_makes_one_new_version(store: str) -> None:
    setup_custom_guidelines_scorer("quality", "丁寧", judge_model="openai:/gpt-4o")
    status = setup_custom_guidelines_scorer("quality", "簡潔", judge_model="openai:/gpt-4o")
    assert status.version == 2


def test_setup_does_not_change_the_active_experiment(store: str) -> None:
    setup_builtin_scorers("another")
    with mlflow.start_span("x") as span:
        pass
    trace = mlflow.get_trace(span.trace_id)
    assert trace is not None and trace.info.experiment_id == store


def test_custom_code_is_not_registered_outside_databricks(store: str, ask: Any) -> None:
    @scorer
    def apologises(outputs) -> bool:  # type: ignore[no-untyped-def]
        return "申し訳" in outputs

    (status,) = setup_scorers("quality", [ScorerPlan(scorer=apologises)])
    assert (status.registered, status.runs, status.version) == (False, "client", None)
    assert list_scorer_statuses("quality") == []  # 一覧を壊さない
    ask(1)
    assert run_scoring_cycle("quality", [status]).scored == 1


def test_rates_out_of_range_change_nothing(store: str) -> None:
    rates: list[Any] = [0, 1.5, True, -1, "1", None]
    for rate in rates:
        with pytest.raises(ScorerSetupError, match="sample_rate"):
            setup_quality_scorers("quality", quality_sample_rate=rate)
    assert list_scorer_statuses("quality") == []  # 何も登録しないうちに断る
    setup_scorers("quality", [ScorerPlan(scorer=PIIDetection(name="pii"), sample_rate=0.5)])
    for rate in rates:
        with pytest.raises(ScorerSetupError, match="sample_rate"):
            change_sample_rate("quality", "pii", rate)
    assert get_scorer_status("quality", "pii").sample_rate == 0.5


def test_duplicate_names_are_refused(store: str) -> None:
    plans = [
        ScorerPlan(scorer=PIIDetection(name="pii")),
        ScorerPlan(scorer=PIIDetection(name="pii")),
    ]
    with pytest.raises(ScorerSetupError, match="unique"):
        setup_scorers("quality", plans)


def test_the_judge_model_can_be_chosen(store: str) -> None:
    assert resolve_judge_model() == "openai:/gpt-4.1-mini"
    assert resolve_judge_model("anthropic:/claude") == "anthropic:/claude"
    os.environ["MLFLOW_GENAI_JUDGE_DEFAULT_MODEL"] = "openai:/gpt-4o"
    assert resolve_judge_model() == "openai:/gpt-4o"


def test_another_process_finds_rate_and_filter(store: str) -> None:
    setup_quality_scorers("quality", 1.0, 0.25, filter_string="tag.plan = 'vip'")
    found = {s.name: (s.sample_rate, s.filter_string) for s in list_scorer_statuses("quality")}
    assert found == {
        "safety_check": (1.0, "tag.plan = 'vip'"),
        "relevance_check": (0.25, "tag.plan = 'vip'"),
        "groundedness_check": (0.25, "tag.plan = 'vip'"),
    }


@pytest.mark.slow
def test_pause_and_resume_keep_rate_and_filter(store: str, ask: Any, stub_llm: Any) -> None:
    setup_builtin_scorers("quality", 0.5, 0.5)
    assert pause_scorer("quality", "safety_check").sample_rate == 0
    assert change_sample_rate("quality", "safety_check", 0.75).sample_rate == 0  # まだ休止中
    resumed = resume_scorer("quality", "safety_check")
    assert (resumed.sample_rate, resumed.filter_string) == (0.75, "status = 'OK'")
    assert change_sample_rate("quality", "safety_check", 1.0, filter_string=None) == (
        get_scorer_status("quality", "safety_check")
    )
    assert get_scorer_status("quality", "safety_check").filter_string is None


@pytest.mark.slow
def test_paused_scorers_do_not_score_and_stay_paused_after_a_deployment(
    store: str, ask: Any
) -> None:
    setup_builtin_scorers("quality")
    assert {s.sample_rate for s in stop_all_scorers("quality")} == {0.0}
    again = setup_builtin_scorers("quality")
    ask(1)
    pii = ScorerPlan(scorer=PIIDetection(name="pii"))
    report = run_scoring_cycle("quality", [*again, *setup_scorers("quality", [pii])])
    assert set(report.scorers) == {"pii"}
    assert len(report.elsewhere) == 3
    assert all("resume_scorer" in s.reason for s in again)


def test_delete_needs_confirmation_and_removes_every_version(store: str) -> None:
    setup_custom_guidelines_scorer("quality", "丁寧", judge_model="openai:/a")
    setup_custom_guidelines_scorer("quality", "簡潔", judge_model="openai:/a")
    with pytest.raises(ScorerSetupError, match="confirm"):
        delete_all_scorers("quality")
    assert delete_all_scorers("quality", confirm=True) == ["custom_guidelines"]
    assert list_scorer_statuses("quality") == []


@pytest.mark.slow
def test_a_deleted_scorer_does_not_come_back_paused(store: str) -> None:
    setup_scorers("quality", [ScorerPlan(scorer=PIIDetection(name="pii"))])
    pause_scorer("quality", "pii")
    remove_scorer("quality", "pii")
    (status,) = setup_scorers("quality", [ScorerPlan(scorer=PIIDetection(name="pii"))])
    assert status.sample_rate == 1.0


def test_what_fails_half_way_can_be_tried_again(
    store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """スコアラーは変わったが、エクスペリメントのタグを書けなかった。"""
    plan = ScorerPlan(scorer=PIIDetection(name="pii"), sample_rate=0.5)
    rates: dict[str, ScorerSamplingConfig | None] = {}
    find = registry._find

    def found(name: str, experiment_id: str) -> Any:
        pii = find(name, experiment_id)
        if pii is not None:
            pii._sampling_config = rates.get(name)
        return pii

    def start(pii: Any, *, sampling_config: Any = None, **_: Any) -> Any:
        rates[pii.name] = sampling_config
        return pii

    def no_tag(*_: Any) -> None:
        raise MlflowException("the connection was reset")

    monkeypatch.setattr(registry, "who_runs", lambda _: ("server", ""))
    monkeypatch.setattr(registry, "_find", found)
    for name in ("start", "stop", "update"):
        monkeypatch.setattr(PIIDetection, name, start)
    setup_scorers("quality", [plan])
    pause_scorer("quality", "pii")
    with monkeypatch.context() as broken, pytest.raises(ScorerSetupError, match="reset"):
        broken.setattr(registry, "keep_setting", no_tag)
        resume_scorer("quality", "pii")
    assert resume_scorer("quality", "pii").sample_rate == 0.5
    assert setup_scorers("quality", [plan])[0].sample_rate == 0.5  # 次のデプロイ
    with monkeypatch.context() as broken, pytest.raises(MlflowException):
        broken.setattr(scorer_lifecycle, "keep_setting", no_tag)
        remove_scorer("quality", "pii")
    remove_scorer("quality", "pii")


def test_unknown_names_are_one_error(store: str) -> None:
    for operation in (pause_scorer, resume_scorer, remove_scorer, get_scorer_status):
        with pytest.raises(ScorerNotFoundError, match="nothing"):
            operation("quality", "nothing")
    with pytest.raises(ScorerSetupError, match="no experiment"):
        list_scorer_statuses("nowhere")


def test_any_name_mlflow_takes_can_be_paused_and_deleted(store: str) -> None:
    name = "丁寧(敬語)? 100%"
    setup_scorers("quality", [ScorerPlan(scorer=PIIDetection(name=name), sample_rate=0.5)])
    assert pause_scorer("quality", name).sample_rate == 0
    assert resume_scorer("quality", name).sample_rate == 0.5
    assert delete_all_scorers("quality", confirm=True) == [name]


def test_a_judge_without_guidelines_is_refused(store: str) -> None:
    empty: list[str | list[str]] = ["", "  ", [], [""]]
    for guidelines in empty:
        with pytest.raises(ScorerSetupError, match="guidelines"):
            setup_custom_guidelines_scorer("quality", guidelines)
    with pytest.raises(JudgeEndpointError, match="api_key"):  # 空の鍵も、保存する前に断る
        ensure_judge_endpoint(api_key="")
    with pytest.raises(JudgeEndpointError, match="MLFLOW_TRACKING_URI"):
        ensure_judge_endpoint(api_key="x")


def test_a_judge_model_without_a_provider_is_refused_at_set_up(store: str) -> None:
    for model in ("gpt-4.1-mini", "openai/gpt-4.1-mini", "openai:/", ""):
        judge = Safety(name="s", model=model or "x")
        with pytest.raises(ScorerSetupError, match="has no provider"):
            setup_scorers("quality", [ScorerPlan(scorer=judge)])
        with pytest.raises(ScoringError, match="has no provider"):
            run_scoring_cycle("quality", [judge])
    with pytest.raises(ScorerSetupError, match=r"'gpt-4\.1-mini' has no provider"):
        setup_quality_scorers("quality", judge_model="gpt-4.1-mini")
    assert list_scorer_statuses("quality") == []


FIRST_DEPLOY = """
import sys
from concurrent.futures import ThreadPoolExecutor
from chapter8_samples.quality_monitoring import setup_quality_scorers
def deploy(_):
    return sorted(s.name for s in setup_quality_scorers("app", tracking_uri=sys.argv[1]))
with ThreadPoolExecutor(4) as pool:
    print(*{tuple(names) for names in pool.map(deploy, range(4))})
"""


@pytest.mark.slow
def test_threads_may_set_up_a_database_that_is_not_there_yet(tmp_path: Path) -> None:
    """プロセスどうしでは、MLflow が表を作り終えるまで待つこと(表を作るのは MLflow である)。"""
    result = subprocess.run(
        [sys.executable, "-c", FIRST_DEPLOY, f"sqlite:///{(tmp_path / 'new.db').as_posix()}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert result.stdout == "('groundedness_check', 'relevance_check', 'safety_check')\n"


def test_a_server_that_is_down_is_a_setup_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ScorerSetupError, match="cannot use the AI Gateway of http"):
        setup_quality_scorers("quality", tracking_uri=f"http://127.0.0.1:{free_port()}")


def test_a_filter_that_cannot_work_is_told_at_once(store: str) -> None:
    plan = ScorerPlan(scorer=PIIDetection(name="pii"), filter_string="status is OK!")
    with pytest.raises(ScorerSetupError, match="filter"):
        setup_scorers("quality", [plan])
    assert list_scorer_statuses("quality") == []
    setup_scorers("quality", [ScorerPlan(scorer=PIIDetection(name="pii"))])
    with pytest.raises(ScorerSetupError, match="filter"):
        change_sample_rate("quality", "pii", 0.5, filter_string="status is OK!")
    assert get_scorer_status("quality", "pii").sample_rate == 1.0


@pytest.mark.slow
def test_the_demonstration_shows_states_read_back_from_the_store(store: str) -> None:
    plan = ScorerPlan(scorer=Safety(name="s", model="openai:/a"), sample_rate=0.5)
    steps = list(demonstrate_scorer_lifecycle("brand-new", plan))
    assert [(s.state, s.sample_rate) for s in steps] == [
        ("UNREGISTERED", 0.0),
        ("STARTED", 0.5),
        ("STARTED", 0.2),
        ("STOPPED", 0.0),
        ("STARTED", 0.2),
        ("UNREGISTERED", 0.0),
    ]


def test_monthly_cost_is_traffic_times_rate_times_price() -> None:
    cost = estimate_monthly_judge_cost(1000, {"a": 1.0, "b": 0.5}, judge_price=(1, 2))
    assert cost == pytest.approx(1500 * (600 * 1 + 60 * 2) / 1e6)
    price = JudgePrice(Decimal("0.40"), Decimal("1.60"))
    default = estimate_monthly_judge_cost(1000, {"a": 1.0})
    assert estimate_monthly_judge_cost(1000, {"a": 1.0}, price) == pytest.approx(default)
    for odd in (-1, math.nan, math.inf):
        with pytest.raises(ScorerSetupError, match=f"not negative, got {odd}"):
            estimate_monthly_judge_cost(odd, {"a": 1.0})
    assert set(RECOMMENDED_SAMPLE_RATES.values()) <= {1.0, 0.5, 0.1}


def test_a_scorer_of_whole_sessions_is_told_where_it_can_run(store: str) -> None:
    frustrated = UserFrustration(name="frustrated", model="openai:/gpt-4.1-mini")
    (status,) = setup_scorers("quality", [ScorerPlan(scorer=frustrated)])
    assert status.runs == "client" and "mlflow.genai.evaluate()" in status.reason

    @scorer
    def turns(session) -> int:  # type: ignore[no-untyped-def]
        return len(session)

    (custom,) = setup_scorers("quality", [ScorerPlan(scorer=turns)])
    assert custom.runs == "client" and "mlflow.genai.evaluate()" in custom.reason
    with pytest.raises(ScoringError, match=r"mlflow\.genai\.evaluate\(\)"):
        run_scoring_cycle("quality", [status])


@pytest.mark.slow
def test_that_place_is_evaluate(store: str, infos: Any, stub_llm: Any) -> None:
    @mlflow.trace
    def answer(question: str) -> str:
        mlflow.update_current_trace(metadata={"mlflow.trace.session": "s-1"})
        return f"{question}は購入から 30 日以内に承ります。"

    answer("返品")
    answer("交換")
    frustrated = UserFrustration(name="frustrated", model="openai:/gpt-4.1-mini")
    mlflow.genai.evaluate(data=mlflow.search_traces(locations=[store]), scorers=[frustrated])
    names = [a.name for info in infos().values() for a in info.assessments]
    assert names == ["frustrated"]


@pytest.mark.slow
def test_a_release_can_be_evaluated_with_the_scorers_of_production(
    store: str, stub_llm: Any
) -> None:
    statuses = setup_custom_guidelines_scorer("quality", "回答は丁寧である")
    rows = [{"inputs": {"question": "返品の期限"}, "outputs": "30 日以内に承ります。"}]
    assert evaluate_with_scorers(rows, [statuses]) == {"custom_guidelines/mean": 1.0}
