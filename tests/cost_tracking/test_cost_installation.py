"""コストの記録は、ほかの処理と一緒に動き、外されたら気づく。"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlflow
import pytest
from cost_tracking.llm_spans import call, end, total_cost
from mlflow.tracing import configure

from chapter8_samples.cost_tracking import CostTracker, CostTracking, setup_cost_tracking


@pytest.mark.slow
def test_other_span_processors_are_kept(costs: CostTracking) -> None:
    seen: list[str] = []

    def mask(span: Any) -> None:
        seen.append(span.name)

    configure(span_processors=[mask])
    assert not costs.installed
    costs.install()
    end(call("gpt-4o", 1, 1))
    assert (seen, costs.priced) == (["call"], 1)
    costs.uninstall()
    end(call("gpt-4o", 1, 1))
    assert (len(seen), costs.priced) == (2, 1)


def test_setting_up_twice_does_not_count_twice(costs: CostTracking, tracker: CostTracker) -> None:
    again = setup_cost_tracking(tracker=tracker)
    end(call("gpt-4o", 1000, 500))
    assert not costs.installed
    assert (costs.priced, again.priced) == (0, 1)
    assert tracker.snapshot().total.requests == 1
    again.uninstall()


@pytest.mark.slow
def test_a_later_experiment_or_the_same_uri_changes_nothing(
    costs: CostTracking, tracking_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    end(call("gpt-4o", 1000, 500))
    mlflow.set_experiment("another")
    mlflow.set_tracking_uri(tracking_uri)
    assert total_cost(end(call("gpt-4o", 1000, 500))) == 0.0075
    assert (costs.priced, costs.installed) == (2, True)
    assert "removed" not in caplog.text


@pytest.mark.parametrize(
    "remove",
    [
        lambda: configure(span_processors=[]),
        mlflow.tracing.reset,
        lambda: mlflow.set_tracking_uri("http://127.0.0.1:9"),  # 接続先を変えた
    ],
    ids=["configure", "reset", "set_tracking_uri"],
)
@pytest.mark.slow
def test_a_removal_by_others_is_noticed_and_repaired(
    costs: CostTracking,
    tracking_uri: str,
    caplog: pytest.LogCaptureFixture,
    remove: Callable[[], object],
) -> None:
    for number in (1, 2):
        remove()
        mlflow.set_tracking_uri(tracking_uri)
        assert costs.priced == number - 1  # 件数を読むだけでも気づく
        assert not costs.installed
        assert caplog.text.count("cost tracking was removed") == number  # 1 回外れるごとに 1 行
        assert costs.install().installed
        assert total_cost(end(call("gpt-4o", 1000, 500))) == 0.0075
    remove()
    costs.install()
    assert caplog.text.count("cost tracking was removed") == 3  # 黙って付け直さない


@pytest.mark.slow
def test_removing_it_oneself_or_replacing_it_is_not_warned(
    costs: CostTracking, caplog: pytest.LogCaptureFixture
) -> None:
    newer = setup_cost_tracking()
    assert not costs.installed
    newer.uninstall()
    assert not newer.installed
    assert caplog.text == ""
