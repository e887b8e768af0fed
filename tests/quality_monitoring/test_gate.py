"""昇格前の検査: 区間の誤りの率、判定、評価の組み方、8.4 への渡し方。"""

from __future__ import annotations

import math
import os
import random
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import Feedback
from mlflow.genai.scorers import Safety, scorer

from chapter8_samples.quality_monitoring import (
    JudgeNotConfiguredError,
    compare_releases,
    compare_verdicts,
)


@pytest.fixture(autouse=True)
def _few_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_GENAI_EVAL_MAX_WORKERS", "2")


def verdicts(source: random.Random, questions: int, *rates: float) -> list[list[bool | None]]:
    return [[source.random() < rate for _ in range(questions)] for rate in rates]


def share(verdict: str, rounds: int, questions: int, *rates: float) -> float:
    """``rounds`` 回のうち、その判定になった割合。"""
    source = random.Random(f"{verdict}{questions}{rates}")
    found = [compare_verdicts(*verdicts(source, questions, *rates)) for _ in range(rounds)]
    return sum(result.verdict == verdict for result in found) / rounds


def test_equal_releases_are_rarely_called_worse_and_a_drop_is_found() -> None:
    for questions, rate in ((20, 0.5), (50, 0.9), (100, 0.7), (200, 0.9)):
        assert share("worse", 2_000, questions, rate, rate) <= 0.05, (questions, rate)
    assert share("worse", 500, 100, 0.9, 0.7) >= 0.9


def test_a_release_that_is_worse_by_the_margin_is_rarely_called_not_worse() -> None:
    for questions, rate in ((60, 0.95), (120, 0.9), (240, 0.8)):
        found = share("not worse", 1_000, questions, rate, rate - 0.1)
        assert found <= 0.05, (questions, rate)


def test_the_questions_of_the_docstring_show_it_in_four_of_five_cases() -> None:
    text = str(compare_verdicts.__doc__)
    rates, *rows = (line.split() for line in text.splitlines() if line.count("   ") > 4)
    counts = rows[0]
    for rate, questions in zip(rates[-5:], counts[-5:], strict=True):
        passed = float(rate.rstrip("%")) / 100
        found = share("not worse", 800, int(questions), passed, passed)
        assert 0.75 <= found <= 0.88, (rate, questions, found)


def test_worse_agrees_with_mcnemars_test() -> None:
    for lost in range(30):
        for gained in range(30):
            old = [True] * lost + [False] * gained + [True] * 40
            new = [False] * lost + [True] * gained + [True] * 40
            result = compare_verdicts(old, new, margin=0.01)
            z = (lost - gained - 1) / math.sqrt(lost + gained) if lost + gained else 0
            assert (result.verdict == "worse") is (z > 1.6448536), (lost, gained)


@given(st.lists(st.tuples(*[st.sampled_from([True, False, None])] * 2), max_size=60))
def test_the_interval_holds_the_difference_and_turns_with_the_sides(pairs: list[tuple]) -> None:
    old, new = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    result, turned = compare_verdicts(old, new), compare_verdicts(new, old)
    assert -1 <= result.lower <= (result.difference or 0) <= result.upper <= 1
    assert result.pairs + result.unjudged == len(pairs)
    assert turned.lower == pytest.approx(-result.upper, abs=1e-9)


def test_few_questions_prove_nothing() -> None:
    assert compare_verdicts([], []).verdict == "not enough data"
    assert compare_verdicts([True] * 20, [True] * 20).verdict == "not enough data"
    assert compare_verdicts([True] * 60, [None] * 60).unjudged == 60
    assert compare_verdicts([True] * 60, [True] * 60).verdict == "not worse"


def test_what_the_judge_of_one_release_could_not_read_proves_nothing() -> None:
    """採点できない答えばかりの候補が、残りの答えだけで昇格してはならない。"""
    judged: list[bool | None] = [True] * 60
    found = compare_verdicts(judged + [True] * 40, judged + [None] * 40)
    assert (found.verdict, found.pairs, found.unjudged) == ("not enough data", 60, 40)
    assert found.lower < -0.4 and found.upper > 0.4
    assert compare_verdicts(judged + [None] * 40, judged + [True] * 40).verdict != "not worse"
    assert compare_verdicts(judged + [None] * 40, judged + [None] * 40).verdict == "not worse"


def test_bad_arguments_name_the_value() -> None:
    for margin in (0, 1, 10, -0.1, math.nan, "0.1", True):
        with pytest.raises(ValueError, match=f"margin.*{margin}"):
            compare_verdicts([], [], margin=margin)
    with pytest.raises(ValueError, match="got 1 of the baseline and 0 of the candidate"):
        compare_verdicts([True], [])
    with pytest.raises(ValueError, match="no question"):
        compare_releases([], good, good, [says_good])
    scorers: list[Any] = [[], [says_good, says_good], says_good, [lambda outputs: True]]
    for wrong in scorers:
        with pytest.raises(ValueError, match="list of at least one scorer, with unique names, got"):
            compare_releases(["a"], good, good, wrong)
    for row in (1, None, ["a"], {"question": "a"}, {"inputs": "a"}):
        with pytest.raises(ValueError, match="a question is a string or"):
            compare_releases(["a", row], good, good, [says_good])
    releases: list[Any] = [None, "prompts:/answer/2"]
    for release in releases:
        with pytest.raises(ValueError, match=r"candidate must be a function.*got"):
            compare_releases(["a"], good, release, [says_good])
    with pytest.raises(JudgeNotConfiguredError, match="OPENAI_API_KEY"):
        compare_releases(["a"], good, good, [Safety(model="openai:/gpt-4.1-mini")])


@scorer
def says_good(outputs: object) -> str:
    return "yes" if outputs == "good" else "no"


def good(question: str) -> str:
    return "good"


def bad(question: str) -> str:
    if question == "q1":
        raise RuntimeError("no answer")
    return "bad"


QUESTIONS = [f"q{number}" for number in range(6)]


def unable(question: str) -> str:
    raise RuntimeError("no key")


def test_a_candidate_that_cannot_answer_at_all_is_worse(store: str) -> None:
    """MLflow は、1 件目に答えられない版を評価せず、例外にする。"""
    result = compare_releases(QUESTIONS, good, unable, [says_good])
    assert (result.verdict, result.candidate.failed) == ("worse", 6)
    with pytest.raises(ValueError, match="the baseline answered none of the questions: see run"):
        compare_releases(QUESTIONS, unable, unable, [says_good])
    assert "MLFLOW_GENAI_EVAL_SKIP_TRACE_VALIDATION" not in os.environ


def test_every_question_is_asked_once(store: str, caplog: pytest.LogCaptureFixture) -> None:
    """同じ質問を 60 回答えても、1 問分の証拠にしかならない。"""
    asked: list[str] = []

    def counting(question: str) -> str:
        asked.append(question)
        return "good"

    result = compare_releases(["a", "a", "b"], counting, good, [says_good])
    assert (sorted(asked), result.baseline.questions) == (["a", "b"], 2)
    assert result.verdict == "not enough data" and not result
    assert "1 repeated questions are asked once" in caplog.text


def test_both_releases_answer_every_question_apart_from_production(store: str) -> None:
    mlflow.set_experiment("production")
    result = compare_releases(QUESTIONS, good, bad, [says_good], experiment_name="evaluation")
    assert result.verdict == "worse" and not result
    assert "says_good: worse (100% -> 0% on 6 questions" in str(result)
    assert (result.baseline.failed, result.candidate.failed) == (0, 1)
    assert result.candidate.cost_usd is None and "unknown" in str(result)
    production, evaluation = (
        mlflow.get_experiment_by_name(name).experiment_id for name in ("production", "evaluation")
    )
    assert mlflow.search_traces(locations=[production], return_type="list") == []
    runs = mlflow.search_runs(experiment_ids=[evaluation], output_format="list")
    assert {run.info.run_name for run in runs} == {"baseline", "candidate"}
    assert mlflow.set_experiment("production").experiment_id == production


def test_what_is_not_proven_passes_only_on_request(store: str, caplog) -> None:
    allowed = compare_releases(QUESTIONS[:1], good, good, [says_good], allow_unproven=True)
    assert allowed and allowed.verdict == "not enough data"
    assert "an unproven release is allowed: says_good: not enough data" in caplog.text


def test_every_scorer_has_to_be_not_worse_and_says_why_it_has_no_verdict(
    store: str, caplog: pytest.LogCaptureFixture
) -> None:
    @scorer(pass_if=lambda length: length <= 3)
    def short(outputs: str) -> int:
        return len(outputs)

    @scorer
    def elsewhere(outputs: object) -> Feedback:
        return Feedback(name="other", value="yes")

    @scorer
    def broken(outputs: str) -> bool:
        raise ValueError("judge is down")

    scorers = [short, elsewhere, broken]
    questions = [{"inputs": {"question": f"q{number}"}} for number in range(8)]
    result = compare_releases(questions, bad_but_short, good, scorers)
    found = {scorer.scorer: scorer for scorer in result.scorers}
    assert found["short"].verdict == result.verdict == "worse"
    for name in ("elsewhere", "broken"):
        assert (found[name].verdict, found[name].unjudged) == ("not enough data", 8)
        assert f"{name}: not enough data (no pair was judged)" in str(result)
    assert "'elsewhere' judged no answer: it returns nothing named 'elsewhere'" in caplog.text
    assert "'broken' judged no answer: judge is down" in caplog.text


def bad_but_short(question: str) -> str:
    return "bad"


def test_a_number_without_pass_if_is_refused(store: str) -> None:
    @scorer
    def length(outputs: str) -> int:
        return len(outputs)

    with pytest.raises(ValueError, match=r"'length' returned 4.*pass_if"):
        compare_releases(QUESTIONS[:1], good, good, [length])


def test_quality_criteria_are_handed_over_or_refused(store: str, monkeypatch) -> None:
    """2 つの版の MLflow は 1 つの環境に入らないので、引数の有無だけが違う代役で試す。"""
    told: list[str | None] = []
    real = mlflow.genai.evaluate

    def evaluate_317(data, scorers, predict_fn=None):
        return real(data, scorers, predict_fn)

    monkeypatch.setattr(mlflow.genai, "evaluate", evaluate_317)
    with pytest.raises(ValueError, match=r"quality_criteria needs mlflow>=3\.18"):
        compare_releases(QUESTIONS, good, good, [says_good], quality_criteria="says_good >= 0.9")

    def evaluate(data, scorers, predict_fn=None, *, quality_criteria=None):
        told.append(quality_criteria)
        return real(data, scorers, predict_fn)

    monkeypatch.setattr(mlflow.genai, "evaluate", evaluate)
    compare_releases(QUESTIONS[:1], good, good, [says_good], quality_criteria="says_good >= 0.9")
    assert told == [None, "says_good >= 0.9"]
