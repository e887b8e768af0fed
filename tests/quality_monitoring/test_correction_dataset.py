"""訂正から作った評価データセット。"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from mlflow.genai.datasets import search_datasets

from chapter8_samples.quality_monitoring import corrections_to_dataset, log_user_correction


@pytest.mark.slow
def test_corrected_traces_become_rows(store: str, ask: Any) -> None:
    first, second, _ = ask(3)
    log_user_correction(first, "古い答え", "u-1")
    log_user_correction(first, "30 日以内です。", "u-2")
    log_user_correction(second, "送料は無料です。", "u-1")
    rows = corrections_to_dataset("quality", dataset_name="regressions")
    expected = [row["expectations"]["expected_response"] for row in rows]
    assert expected == ["30 日以内です。", "送料は無料です。"]
    assert [set(row) for row in rows] == [{"inputs", "expectations"}] * 2
    assert [row["inputs"]["question"] for row in rows] == ["注文 0 の返品", "注文 1 の返品"]
    corrections_to_dataset("quality", dataset_name="regressions")
    (dataset,) = search_datasets(experiment_ids=[store])
    assert len(dataset.to_df()) == 2


@pytest.mark.slow
def test_the_rows_are_what_correctness_reads(store: str, ask: Any, stub_llm: Any) -> None:
    from mlflow.genai import evaluate  # pyright: ignore[reportUnknownVariableType]
    from mlflow.genai.scorers import Correctness

    for trace_id, truth in zip(ask(2), ("30 日以内です。", "送料は無料です。"), strict=True):
        log_user_correction(trace_id, truth, "u-1")
    rows = corrections_to_dataset("quality")
    answers = {row["inputs"]["question"]: row["expectations"] for row in rows}

    def right(question: str, **_: Any) -> str:
        return answers[question]["expected_response"]

    def wrong(question: str, **_: Any) -> str:
        return "富士山の高さは 3776 メートルです。"

    judge = Correctness(model="openai:/gpt-4.1-mini")
    scores = [
        evaluate(data=rows, predict_fn=app, scorers=[judge]).metrics["correctness/mean"]
        for app in (right, wrong)
    ]
    assert scores == [1.0, 0.0]


@pytest.mark.slow
def test_a_new_correction_wins_over_what_an_evaluation_copied(store: str, ask: Any) -> None:
    from mlflow.genai import evaluate  # pyright: ignore[reportUnknownVariableType]
    from mlflow.genai.scorers import scorer

    @scorer
    def answered(outputs: Any) -> bool:
        return bool(outputs)

    def app(question: str, **_: Any) -> str:
        return question

    def truths(name: str) -> list[str]:
        rows = corrections_to_dataset("quality", dataset_name=name)
        (dataset,) = search_datasets(experiment_ids=[store])
        assert len(dataset.to_df()) == len(rows)
        saved = [row["expected_response"] for row in dataset.to_df()["expectations"]]
        told = [row["expectations"]["expected_response"] for row in rows]
        assert sorted(saved) == sorted(told)  # 同じ時刻の訂正の順は決まらない
        return saved

    first, second = ask(2)
    log_user_correction(second, "別の答え", "u-1")
    log_user_correction(first, "OLD", "u-1")
    assert sorted(truths("truth")) == ["OLD", "別の答え"]
    evaluate(data=corrections_to_dataset("quality"), predict_fn=app, scorers=[answered])
    log_user_correction(first, "NEW", "u-1")
    assert sorted(truths("truth")) == ["NEW", "別の答え"]


def test_the_window_and_wrong_calls(store: str, ask: Any) -> None:
    (trace_id,) = ask()
    log_user_correction(trace_id, "正解", "u-1")
    now = datetime.now(timezone.utc)
    assert len(corrections_to_dataset("quality", now - timedelta(hours=1), now)) == 1
    assert corrections_to_dataset("quality", now + timedelta(hours=1)) == []
    with pytest.raises(ValueError, match="time zone"):
        corrections_to_dataset("quality", datetime(2026, 1, 1))
    with pytest.raises(ValueError, match="no experiment"):
        corrections_to_dataset("nothing")
