"""コストの記録は、接続先が変わっても動き続け、外されたら気づく。"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from cost_tracking.llm_spans import call, end, total_cost
from mlflow.tracing import configure
from mlflow.tracing.config import get_config

from chapter8_samples.cost_tracking import CostTracker, CostTracking, setup_cost_tracking
from chapter8_samples.cost_tracking._internals import tracking_service


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


@pytest.fixture
def other_store(tmp_path: Path, database_template: Path) -> Callable[[int], str]:
    """番号ごとに別の、空の保存先。"""

    def make(number: int = 1) -> str:
        database = shutil.copy(database_template, tmp_path / f"other{number}.db")
        return f"sqlite:///{Path(database).as_posix()}"

    return make


@pytest.mark.slow
def test_a_later_tracking_uri_changes_nothing(
    costs: CostTracking,
    tracker: CostTracker,
    other_store: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """MLflow は接続先が変わると登録を消す。どの名前で呼ばれても、付け直されている。"""
    from mlflow.tracking import set_tracking_uri

    for number, change in ((1, mlflow.set_tracking_uri), (2, set_tracking_uri)):
        change(other_store(number))
        assert costs.installed
        assert total_cost(end(call("gpt-4o", 1000, 500))) == 0.0075
    assert (costs.priced, tracker.snapshot().total.requests) == (2, 2)  # 二重に付いてもいない
    assert "removed" not in caplog.text


@pytest.mark.slow
def test_what_was_removed_stays_removed(
    costs: CostTracking, other_store: Callable[..., str]
) -> None:
    costs.uninstall()
    mlflow.set_tracking_uri(other_store())
    assert (costs.installed, get_config().span_processors) == (False, [])
    costs.install()
    mlflow.tracing.reset()
    mlflow.set_tracking_uri(other_store(2))
    assert get_config().span_processors == []


@pytest.mark.slow
def test_the_newest_setup_outlives_the_tracking_uri(
    costs: CostTracking, other_store: Callable[..., str]
) -> None:
    newer = setup_cost_tracking()
    mlflow.set_tracking_uri(other_store())
    assert (costs.installed, newer.installed) == (False, True)
    newer.uninstall()


@pytest.mark.parametrize("remove", [lambda: configure(span_processors=[]), mlflow.tracing.reset])
@pytest.mark.slow
def test_a_removal_by_others_is_noticed_and_repaired(
    costs: CostTracking, caplog: pytest.LogCaptureFixture, remove: Callable[[], object]
) -> None:
    for number in (1, 2):
        remove()
        assert costs.priced == number - 1  # 件数を読むだけでも気づく
        assert not costs.installed
        assert caplog.text.count("cost tracking was removed") == number  # 1 回外れるごとに 1 行
        assert costs.install().installed
        assert total_cost(end(call("gpt-4o", 1000, 500))) == 0.0075
    remove()
    costs.install()
    assert caplog.text.count("cost tracking was removed") == 3  # 黙って付け直さない


@pytest.mark.slow
def test_an_mlflow_that_resets_in_another_way_is_noticed(
    costs: CostTracking, other_store: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracking_service, "reset", mlflow.tracing.reset)
        mlflow.set_tracking_uri(other_store())
    assert not costs.installed
    assert "call install() again" in caplog.text


@pytest.mark.slow
def test_removing_it_oneself_or_replacing_it_is_not_warned(
    costs: CostTracking, caplog: pytest.LogCaptureFixture
) -> None:
    newer = setup_cost_tracking()
    assert not costs.installed
    newer.uninstall()
    assert not newer.installed
    assert caplog.text == ""
