"""コードのスコアラー: 登録すると黙って壊れる書き方を、登録する前に断る。"""

# pyright: reportUnknownParameterType=false, reportMissingParameterType=false
from __future__ import annotations

import json
import os
import random
from typing import Any

import mlflow
import pytest
from mlflow.entities import Feedback
from mlflow.genai.scorers import PIIDetection, Scorer, scorer

from chapter8_samples.quality_monitoring import (
    CustomScorerError,
    ScorerSetupError,
    run_scoring_cycle,
    setup_custom_code_scorer,
    validate_custom_scorer,
)

LIMIT = 3
SAMPLE = {"inputs": {"question": "返品"}, "outputs": "30 日以内"}


def helper(text: str) -> int:
    return len(text)


@scorer
def one_line(outputs): return len(outputs)  # fmt: skip


@scorer
def wrapped_one_line(
    outputs): return len(outputs)  # fmt: skip


@scorer
def outer_constant(outputs):
    return len(outputs) > LIMIT


@scorer
def outer_function(outputs):
    return helper(outputs)


@scorer
def outer_import(outputs):
    return json.dumps(outputs)


@scorer
def hidden_in_a_comprehension(outputs):
    return [c for c in outputs if c != str(LIMIT)] != []


@scorer
def calls_itself(outputs):
    return calls_itself(outputs=outputs)


@scorer
def strange_default(outputs, marker=object()):  # noqa: B008
    return outputs is not marker


@scorer  # pyright: ignore
async def asynchronous(outputs):
    return True


@scorer
def complete(inputs, outputs: Any, trace) -> Feedback:
    """外の名前は使わない。"""
    import re

    numbers = [int(n) for n in re.findall(r"\d+", str(outputs))]
    return Feedback(name="complete", value=sum(numbers), rationale=str(inputs))


def test_traps_are_refused_without_running_them() -> None:
    traps = [
        (outer_constant, "outside are lost: LIMIT"),
        (outer_function, "helper"),
        (outer_import, "json"),
        (hidden_in_a_comprehension, "LIMIT"),
        (calls_itself, "calls_itself"),
        (strange_default, "signature"),
        (asynchronous, "async"),
    ]
    for refused, why in traps:
        with pytest.raises(CustomScorerError, match=why):
            validate_custom_scorer(refused)


def test_a_body_on_the_def_line_is_refused_where_mlflow_loses_it() -> None:
    """組み立て直した 1 行の関数は、3.17 ではエラーもなく何も返さない(3.18 で直った)。"""
    os.environ["MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS"] = "true"
    kept = Scorer.model_validate(one_line.model_dump()).run(outputs="abc")
    assert kept in (3, None)
    for body in (one_line, wrapped_one_line):
        if kept:
            assert validate_custom_scorer(body, SAMPLE) == 6
        else:
            with pytest.raises(CustomScorerError, match="def line"):
                validate_custom_scorer(body)


def test_a_closure_is_refused() -> None:
    bound = 5

    @scorer
    def closure(outputs):
        return len(outputs) < bound

    with pytest.raises(CustomScorerError, match="bound"):
        validate_custom_scorer(closure, SAMPLE)


def test_what_the_traps_do_in_mlflow_itself() -> None:
    """前提: 外の変数は、組み立て直すと付いてこない。"""
    os.environ["MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS"] = "true"
    with pytest.raises(NameError, match="LIMIT"):
        Scorer.model_validate(outer_constant.model_dump()).run(outputs="abc")


def test_a_complete_scorer_gives_its_value() -> None:
    assert validate_custom_scorer(complete) is None
    assert validate_custom_scorer(complete, SAMPLE) == 30
    assert "MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS" not in os.environ


@scorer
def with_a_class_inside(outputs):
    from dataclasses import dataclass

    @dataclass
    class Limits:
        low: int = 1
        high: int = low + 99

    return Limits.low <= len(outputs) <= Limits().high


def test_a_class_defined_inside_is_not_an_outer_name() -> None:
    assert validate_custom_scorer(with_a_class_inside, SAMPLE) is True


def test_failures_on_the_sample_are_named() -> None:
    @scorer
    def wants_a_dict(outputs):
        return outputs.get("answer")

    @scorer
    def says_nothing(outputs):
        return None

    @scorer
    def differs(outputs):
        import random

        return random.random()

    with pytest.raises(CustomScorerError, match="wants_a_dict: fails on the sample: Attribute"):
        validate_custom_scorer(wants_a_dict, SAMPLE)
    with pytest.raises(CustomScorerError, match="returns None"):
        validate_custom_scorer(says_nothing, SAMPLE)
    random.seed(8)
    with pytest.raises(CustomScorerError, match="rebuilt"):
        validate_custom_scorer(differs, SAMPLE)


def test_only_functions_can_be_validated() -> None:
    with pytest.raises(CustomScorerError, match="@scorer"):
        validate_custom_scorer(PIIDetection(name="pii"))
    with pytest.raises(CustomScorerError, match="@scorer"):
        validate_custom_scorer(len)  # type: ignore[arg-type]


def test_a_real_trace_is_a_sample_and_the_cycle_scores_it(store: str, ask: Any, infos: Any) -> None:
    (trace_id,) = ask(1)
    trace = mlflow.get_trace(trace_id)
    assert trace is not None
    status = setup_custom_code_scorer("quality", complete, 1.0, sample=trace)
    assert (status.runs, status.registered, status.sample_rate) == ("client", False, 1.0)
    assert run_scoring_cycle(store, [status]).scored == 1
    (assessment,) = infos()[trace_id].assessments
    assert assessment.feedback is not None
    assert (assessment.name, assessment.feedback.value) == ("complete", 30)


def test_nothing_is_set_up_when_the_scorer_is_refused(store: str) -> None:
    with pytest.raises(ScorerSetupError, match="LIMIT"):
        setup_custom_code_scorer("quality", outer_constant, 0.5)
    tags = mlflow.MlflowClient().get_experiment(store).tags
    assert not [tag for tag in tags if "outer_constant" in tag]
