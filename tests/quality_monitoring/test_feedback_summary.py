"""集計は、有効な人の評価だけを数え、少ない件数を断定しない。"""

from __future__ import annotations

import random
from datetime import datetime, timedelta, timezone
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import AssessmentSource, Feedback

from chapter8_samples.quality_monitoring import (
    log_issue_report,
    log_rating_feedback,
    log_thumbs_feedback,
    summarize_feedback,
)
from chapter8_samples.quality_monitoring.feedback.summary import Rate, agreement


@pytest.mark.slow
def test_only_valid_human_feedback_counts(store: str, ask: Any) -> None:
    first, second, _ = ask(3)
    mlflow.set_trace_tag(first, "prompt.version", "v1")
    log_thumbs_feedback(first, False, "a")
    log_thumbs_feedback(first, True, "a")  # 考え直した
    log_thumbs_feedback(second, False, "b")
    log_rating_feedback(second, 2, "b")
    log_issue_report(second, "slow", "遅い", "b")
    mlflow.log_feedback(trace_id=second, name="user_thumbs", value=True)  # コードによる評価
    found = summarize_feedback("quality")
    assert (found.traces, found.rated_traces) == (3, 2)
    assert found.thumbs == Rate(1, 2)
    assert found.by_version == {"unknown": Rate(0, 1), "v1": Rate(1, 1)}
    assert found.by_user == {"a": Rate(1, 1), "b": Rate(0, 1)}
    assert (found.mean_rating, found.issues) == (2.0, {"slow": 1})


def test_one_user_counts_once_and_odd_values_do_not_count(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    values: list[tuple[str, Any]] = [
        ("user_thumbs", False),
        ("user_thumbs", True),  # 別のプロセスから同時に押された
        ("user_rating", "good"),  # 画面から、数でない値が入れられた
    ]
    source = AssessmentSource("HUMAN", "a")
    for at_ms, (name, value) in enumerate(values, start=1_767_225_600_000):
        given = Feedback(name=name, value=value, source=source, create_time_ms=at_ms)
        mlflow.log_assessment(trace_id, given)
    mlflow.log_feedback(
        trace_id=trace_id, name="user_thumbs", value="yes", source=AssessmentSource("HUMAN", "b")
    )
    found = summarize_feedback("quality")
    assert (found.thumbs, found.ratings) == (Rate(1, 1), ())


def test_linked_prompts_name_the_version(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    linked = '[{"name": "support", "version": "3"}]'
    mlflow.set_trace_tag(trace_id, "mlflow.linkedPrompts", linked)
    log_thumbs_feedback(trace_id, True, "a")
    assert summarize_feedback("quality").by_version == {"support/3": Rate(1, 1)}


def test_the_window_is_half_open(store: str, ask: Any) -> None:
    ask(2)
    now = datetime.now(timezone.utc)
    assert summarize_feedback("quality", now - timedelta(hours=2), now).traces == 2
    assert summarize_feedback(store, now, now + timedelta(hours=1)).traces == 0


def test_wilson_intervals() -> None:
    low, high = Rate(10, 10).interval
    assert (round(low, 3), high) == (0.722, 1.0)
    assert Rate(0, 0).value is None and Rate(0, 0).interval == (0.0, 1.0)
    assert Rate(1, 2).interval[0] < 0.1 and Rate(500, 1000).interval[0] > 0.46


def test_wrong_calls_are_refused(store: str) -> None:
    with pytest.raises(ValueError, match="timezone-aware"):
        summarize_feedback("quality", datetime(2026, 1, 1))
    with pytest.raises(ValueError, match="no experiment"):
        summarize_feedback("nowhere")
    with pytest.raises(ValueError, match="no experiment"):
        summarize_feedback("999")


def test_judges_are_compared_with_the_votes_of_users(store: str, ask: Any) -> None:
    judge = AssessmentSource("LLM_JUDGE", "openai:/gpt-4.1-mini")
    votes = [("yes", True)] * 2 + [("no", False), (True, False), ("no", None), ("fine", True)]
    for trace_id, (verdict, vote) in zip(ask(6), votes, strict=True):
        mlflow.log_feedback(trace_id=trace_id, name="safety", value="no", source=judge)
        mlflow.log_feedback(trace_id=trace_id, name="safety", value=verdict, source=judge)
        mlflow.log_feedback(trace_id=trace_id, name="length", value=120)  # はい・いいえではない
        if vote is not None:
            log_thumbs_feedback(trace_id, not vote, "a")
            log_thumbs_feedback(trace_id, vote, "a")  # 考え直した方だけを比べる
    found = summarize_feedback("quality").judge_agreement
    assert found.keys() == {"safety"}
    assert (found["safety"].pairs, found["safety"].kappa) == (4, pytest.approx(0.5))


PAIRS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(pairs=PAIRS)
def test_kappa_is_that_of_scikit_learn_inside_its_interval(pairs: list[tuple[bool, bool]]) -> None:
    from sklearn.metrics import cohen_kappa_score

    found = agreement(pairs)
    if len({side for pair in pairs for side in pair}) == 1:
        assert (found.kappa, found.interval) == (None, (-1.0, 1.0))
        return
    assert found.kappa == pytest.approx(cohen_kappa_score(*zip(*pairs, strict=True)))
    low, high = found.interval
    assert -1 <= low <= found.kappa + 1e-9 and found.kappa - 1e-9 <= high <= 1 + 1e-9


def test_the_interval_of_kappa_covers_the_truth() -> None:
    dice, covered = random.Random(1), 0
    for _ in range(1000):  # ユーザーの 8 割が良いとし、ジャッジは 9 割でそれに一致する
        votes = [dice.random() < 0.8 for _ in range(50)]
        low, high = agreement([(v == (dice.random() < 0.9), v) for v in votes]).interval
        same, judged = 0.9, 0.8 * 0.9 + 0.2 * 0.1
        chance = 0.8 * judged + 0.2 * (1 - judged)
        covered += low <= (same - chance) / (1 - chance) <= high
    assert covered >= 940
