"""CostTracker: スレッド、予算、上限、リセット。"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any

import pytest

from chapter8_samples.cost_tracking import BudgetAlert, CostCalculator, CostTracker
from chapter8_samples.cost_tracking import tracker as tracker_module
from chapter8_samples.cost_tracking.tracker import OTHER, BaseCostTracker


def test_the_functions_of_listing_8_9_are_found_where_the_reader_looks() -> None:
    from chapter8_samples import cost_tracking
    from chapter8_samples.cost_tracking import token_tracking

    for name in ("setup_cost_tracking", "price_trace", "export_traces_to_parquet"):
        assert getattr(token_tracking, name) is getattr(cost_tracking, name)


def test_totals_per_model() -> None:
    tracker = CostTracker()
    tracker.record("gpt-4o", 1000, 500)
    tracker.record("gpt-4o-2024-08-06", 1000, 500, 800)
    tracker.record("my-model", 10, 10)
    now = tracker.snapshot()
    assert now.total.cost_usd == Decimal("0.0075") + Decimal("0.0065")
    assert (now.total.requests, now.total.unpriced_requests) == (3, 1)
    assert now.by_model["gpt-4o"].requests == 2
    assert now.by_model["my-model"].unpriced_requests == 1
    assert now.total.cost_usd.is_finite()


def test_each_threshold_is_announced_once() -> None:
    alerts: list[BudgetAlert] = []
    tracker = CostTracker(budget_usd=0.03, on_budget=alerts.append)
    for _ in range(6):
        tracker.record("gpt-4o", 1000, 500)
    assert [alert.threshold for alert in alerts] == [0.5, 0.8, 1.0]
    assert [alert.spent_usd for alert in alerts] == [
        Decimal("0.015"), Decimal("0.03"), Decimal("0.03"),
    ]  # fmt: skip
    assert tracker.snapshot().budget_used == 1.5
    tracker.reset()
    for _ in range(2):
        tracker.record("gpt-4o", 1000, 500)
    assert [alert.threshold for alert in alerts[3:]] == [0.5]


def test_a_failing_callback_is_logged_and_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    def fail(alert: BudgetAlert) -> None:
        raise RuntimeError("chat is down")

    tracker = CostTracker(budget_usd=0.001, on_budget=fail)
    tracker.record("gpt-4o", 1000, 500)
    assert caplog.text.count("budget callback failed") == 3
    assert tracker.snapshot().total.requests == 1


def test_a_lost_alert_is_sent_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sent = [1000.0], list[tuple[float, float]]()
    monkeypatch.setattr("chapter8_samples.cost_tracking.tracker.monotonic", lambda: clock[0])

    def notify(alert: BudgetAlert) -> None:
        sent.append((clock[0], alert.threshold))
        if alert.threshold == 0.5 and clock[0] < 1100:
            raise OSError("chat is down")

    tracker = CostTracker(budget_usd=0.015, on_budget=notify)
    for clock[0] in (1000, 1059, 1061, 1122, 1200):
        tracker.record("gpt-4o", 1000, 500)
    assert sent == [(1000, 0.5), (1059, 0.8), (1059, 1.0), (1061, 0.5), (1122, 0.5)]


def test_a_callback_may_use_the_tracker() -> None:
    seen: list[Decimal] = []
    tracker = CostTracker(budget_usd=0.001)
    tracker.on_budget = lambda alert: seen.append(tracker.snapshot().total.cost_usd)
    tracker.record("gpt-4o", 1000, 500)
    assert seen == [Decimal("0.0075")] * 3


@pytest.mark.slow
def test_no_call_is_lost_between_threads_and_resets() -> None:
    tracker = CostTracker(budget_usd=1_000_000)
    resets: list[int] = []
    stop = threading.Event()

    def reset_often() -> None:
        while not stop.is_set():
            resets.append(tracker.reset().total.requests)

    resetter = threading.Thread(target=reset_often)
    resetter.start()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4000):
            pool.submit(tracker.record, "gpt-4o-mini", 1, 1)
    stop.set()
    resetter.join()
    assert sum(resets) + tracker.snapshot().total.requests == 4000


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker_module, "_MAX_MODELS", 3)
    tracker = CostTracker()
    for i in range(10):
        tracker.record(f"model-{i}", 1, 1)
    now = tracker.snapshot()
    assert set(now.by_model) == {"model-0", "model-1", "model-2", OTHER}
    assert sum(t.requests for t in now.by_model.values()) == now.total.requests == 10


def test_a_snapshot_does_not_change() -> None:
    tracker = CostTracker()
    tracker.record("gpt-4o", 1, 1)
    before = tracker.snapshot()
    tracker.record("gpt-4o", 1, 1)
    assert before.total.requests == before.by_model["gpt-4o"].requests == 1


@pytest.mark.parametrize("threshold", [80, 0, -0.5, float("nan"), float("inf")])
def test_a_threshold_that_never_alerts_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"like 0.8 for 80%, got {threshold}"):
        CostTracker(budget_usd=1, thresholds=(0.5, threshold))


@pytest.mark.parametrize("budget", [0, -1, float("nan")])
def test_an_impossible_budget_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match="budget_usd"):
        CostTracker(budget_usd=budget)


def test_the_arguments_are_those_of_the_calculator() -> None:
    options: dict[str, Any] = {
        "cache_write_tokens": 0, "cache_write_1h_tokens": 0, "service_tier": None, "batch": False,
        "other_units": None, "at": None,
    }  # fmt: skip
    assert CostCalculator().calculate("gpt-4o", 1000, 500, 0, **options) == 0.0075
    assert CostTracker().record("gpt-4o", 1000, 500, 0, **options).priced
    with pytest.raises(TypeError, match="cache_tokens"):
        CostTracker().record("gpt-4o", 1000, 500, cache_tokens=1)
    with pytest.raises(TypeError, match="pass calculator="):
        BaseCostTracker()


def test_every_kind_of_token_is_recorded_at_its_price() -> None:
    tracker = CostTracker()
    hour = tracker.record(
        "claude-3-5-sonnet", 10**6, 0, cache_write_tokens=10**6, cache_write_1h_tokens=10**6
    )
    batch = tracker.record("gpt-4o", 10**6, 0, service_tier="batch")
    assert (hour.total_usd, batch.total_usd) == (6, Decimal("1.25"))
    assert tracker.snapshot().total.cost_usd == Decimal("7.25")


def test_a_budget_says_what_it_cannot_see(caplog: pytest.LogCaptureFixture) -> None:
    """料金表にないモデルを 1,000 回呼んでも 0 円。黙らずに、同じ通知先とログで知らせる。"""
    alerts: list[BudgetAlert] = []
    tracker = CostTracker(budget_usd=1, on_budget=alerts.append)
    for _ in range(1000):
        tracker.record("my-model", 1000, 500)
    assert [alert.threshold for alert in alerts] == [0.0] * 4
    assert [alert.unpriced_requests for alert in alerts] == [1, 10, 100, 1000]
    assert caplog.text.count("budget blind to 'my-model'") == 4
    tracker.record("gpt-4o", 10**6, 0)
    assert [(alert.threshold, alert.unpriced_requests) for alert in alerts[4:]] == [
        (0.5, 1000), (0.8, 1000), (1.0, 1000),
    ]  # fmt: skip
    assert "budget threshold 1.0 reached" in caplog.text


def test_without_a_budget_nothing_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    CostTracker().record("my-model", 1000, 500)
    assert "budget" not in caplog.text
