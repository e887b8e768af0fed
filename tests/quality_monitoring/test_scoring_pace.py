"""採点の速さの加減: 呼び出しの間隔と、同時に採点する数。"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest
from mlflow.genai.scorers import Scorer, scorer

from chapter8_samples.quality_monitoring import ScoringOptions, run_scoring_cycle
from chapter8_samples.quality_monitoring.scoring import engine as scoring_engine
from chapter8_samples.quality_monitoring.scoring.limits import Throttle


def run(experiment: str, one: Scorer, **options: Any) -> None:
    run_scoring_cycle(experiment, [one], options=ScoringOptions(**options))


def test_the_throttle_hands_out_exact_slots() -> None:
    slept: list[float] = []
    throttle = Throttle(20, clock=lambda: 100.0, sleep=slept.append)
    for _ in range(6):
        throttle.wait()
    assert slept == pytest.approx([0, 0.05, 0.10, 0.15, 0.20, 0.25])
    Throttle(None, clock=lambda: 100.0, sleep=slept.append).wait()
    assert len(slept) == 6  # 上限がなければ待たない


@pytest.mark.slow
def test_every_call_asks_the_throttle(crowd: str, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    slow = partial(Throttle, clock=lambda: 100.0, sleep=slept.append)
    monkeypatch.setattr(scoring_engine, "Throttle", slow)

    @scorer
    def paced(outputs) -> bool:  # type: ignore[no-untyped-def]
        return True

    run(crowd, paced, calls_per_second=20)
    assert sorted(slept) == pytest.approx([0.05 * i for i in range(20)])


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
    run(store, busy, concurrency=3)
    assert peak == 3
