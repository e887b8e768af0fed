"""採点の速さの加減: 呼び出しの間隔と、同時に採点する数。"""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from mlflow.genai.scorers import Scorer, scorer

from chapter8_samples.quality_monitoring import ScoringOptions, run_scoring_cycle
from chapter8_samples.quality_monitoring.scoring.limits import Throttle


def run(one: Scorer, **options: Any) -> None:
    run_scoring_cycle("quality", [one], options=ScoringOptions(**options))


def test_the_throttle_hands_out_exact_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    monkeypatch.setattr(time, "sleep", slept.append)
    throttle = Throttle(20)
    for _ in range(6):
        throttle.wait()
    assert slept == pytest.approx([0, 0.05, 0.10, 0.15, 0.20, 0.25])


def test_calls_are_spaced_by_the_rate_limit(store: str, ask: Any) -> None:
    calls: list[float] = []

    @scorer
    def timed(outputs) -> bool:  # type: ignore[no-untyped-def]
        calls.append(time.monotonic())
        return True

    ask(6)
    run(timed, calls_per_second=20)
    calls.sort()
    # 最初の呼び出しが遅れて届くと間隔は縮む。制限がなければ 0 秒に近い
    assert calls[-1] - calls[0] >= 5 * 0.05 * 0.5


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

    ask(12)
    run(busy, concurrency=3)
    assert peak == 3
