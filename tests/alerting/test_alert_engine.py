"""状態機械: 発報は一度、解消も一度。再起動しても、壊れても、失敗しても。"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from chapter8_samples.alerting.alert_config import AlertConfig, Inhibit, MuteWindow
from chapter8_samples.alerting.delivery.posting import (
    Alert,
    Delivery,
)
from chapter8_samples.alerting.engine import AlertEngine
from chapter8_samples.alerting.metrics.measures import MetricSample, MetricSourceError
from chapter8_samples.alerting.rules.model import AlertConfigError, AlertRule

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
STEP = timedelta(seconds=30)


class Scripted:
    """指標ごとに決まった値を返す出どころ。例外を入れれば、その回は失敗する。"""

    def __init__(self, **values: Sequence[float | Exception | None]) -> None:
        self.values = values

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        series = self.values[metric]
        value = series[min(round((at - START) / STEP), len(series) - 1)]
        if isinstance(value, Exception):
            raise value
        n = 0 if value is None else 100
        return MetricSample(metric=metric, value=value, n=n, start=at - window, end=at)

    def split(self, metric: str, window: timedelta, at: datetime, by: str) -> list[MetricSample]:
        """``error_rate|v1`` という名前の値を、ラベルごとに。``None`` のラベルは窓にない。"""
        own = {k: k.partition("|")[2] for k in self.values if k.startswith(f"{metric}|")}
        found = [replace(self.sample(k, window, at), label=label) for k, label in own.items()]
        return [sample for sample in found if sample.n]

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int = 3) -> list[str]:
        return ["tr-1"]


class Recorder:
    """送られたものを記録する通知先。``fail`` の間は、送り直せる失敗になる。"""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.calls = 0
        self.fail = False
        self.alive: list[str] = []

    def notify(
        self, alerts: Alert | Iterable[Alert], *, only: Iterable[str] | None = None
    ) -> list[Delivery]:
        alerts = [alerts] if isinstance(alerts, Alert) else list(alerts)
        self.calls += 1
        if not self.fail:
            self.sent += [(alert.status.value, alert.name) for alert in alerts]
        return [
            Delivery(handler="h", fingerprint=a.fingerprint, ok=not self.fail, retryable=self.fail)
            for a in alerts
        ]

    def keep_alive(self, alerts: Sequence[Alert]) -> list[Delivery]:
        self.alive.append(",".join(a.name for a in alerts))
        return []


def rule(name: str = "errors", **fields: Any) -> AlertRule:
    known: dict[str, Any] = {"name": name, "metric": "error_rate", "threshold": 0.5, **fields}
    return AlertRule(**known)


def config(*rules: AlertRule, **fields: Any) -> AlertConfig:
    return AlertConfig(rules=rules, offset="0s", **fields)  # type: ignore[arg-type]


def run(engine: AlertEngine, steps: int, first: int = 0) -> list[tuple[int, str, str]]:
    """(回, 状態, 名前) の列。"""
    return [
        (i, alert.status.value, alert.name)
        for i in range(first, first + steps)
        for alert in engine.evaluate(START + i * STEP)
    ]


@pytest.mark.parametrize(
    ("fields", "values", "expected"),
    [
        ({}, [0, 1, 1, 0, 0], [(1, "firing"), (3, "resolved")]),
        ({"for_": "30s"}, [0, 1, 0, 1, 1, 0], [(4, "firing"), (5, "resolved")]),
        ({"for_": "1m"}, [1, 1, 1, 1], [(2, "firing")]),
        ({"keep_firing_for": "1m"}, [1, 0, 1, 0, 0, 0], [(0, "firing"), (4, "resolved")]),
        ({"clear_threshold": 0.2}, [0.6, 0.3, 0.6, 0.1], [(0, "firing"), (3, "resolved")]),
        ({"no_data": "keep"}, [1, None, None, 0], [(0, "firing"), (3, "resolved")]),
        ({"no_data": "ok"}, [1, None, 1], [(0, "firing"), (1, "resolved"), (2, "firing")]),
        ({"no_data": "alert", "for_": "1m"}, [0, None, None, None], [(3, "firing")]),
        ({"op": "<", "threshold": 0.5}, [1, 0, 1], [(1, "firing"), (2, "resolved")]),
    ],
)
def test_only_changes_are_reported(
    fields: dict[str, Any], values: list[float | None], expected: list[tuple[int, str]]
) -> None:
    engine = AlertEngine(config(rule(**fields)), Scripted(error_rate=values))
    assert run(engine, len(values)) == [(i, status, "errors") for i, status in expected]


def test_an_alert_keeps_its_identity_from_firing_to_resolved() -> None:
    engine = AlertEngine(config(rule(), labels={"service": "bot"}), Scripted(error_rate=[0, 1, 0]))
    changes = [a for i in range(3) for a in engine.evaluate(START + i * STEP)]
    firing, resolved = changes
    assert firing.fingerprint == resolved.fingerprint
    assert firing.starts_at == resolved.starts_at == START + STEP
    assert resolved.ends_at == START + 2 * STEP
    assert firing.examples == ("tr-1",)
    assert firing.labels == {"service": "bot"}


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_restart_at_any_moment_changes_nothing(tmp_path: Path, cut: int) -> None:
    values = [0, 1, 1, 1, 0, 1, 0, 0, 0, 0]
    rules = config(rule(for_="30s", keep_firing_for="1m"))
    whole = run(AlertEngine(rules, Scripted(error_rate=values)), len(values))
    path = tmp_path / "alerts.db"
    before = run(AlertEngine(rules, Scripted(error_rate=values), state_path=path), cut)
    after = AlertEngine(rules, Scripted(error_rate=values), state_path=path)
    assert before + run(after, len(values) - cut, first=cut) == whole
    assert len(whole) == 2


def test_a_job_that_starts_anew_each_time_notifies_like_a_process_that_stays(
    tmp_path: Path,
) -> None:
    rates = [0.02, 0.06, 0.02, 0.20, 0.09, 0.21, 0.04, 0.19, 0.18, 0.04, 0.06, 0.02, 0.01, 0.01]
    assert sum(rate > 0.05 for rate in rates) == 7  # 値だけを比べていたら
    limits: dict[str, Any] = {"threshold": 0.05, "clear_threshold": 0.03}
    rules = config(rule(for_="30s", keep_firing_for="1m", **limits))
    whole = run(AlertEngine(rules, Scripted(error_rate=rates)), len(rates))
    path, anew = tmp_path / "alerts.db", list[tuple[int, str, str]]()
    for step in range(len(rates)):
        engine = AlertEngine(rules, Scripted(error_rate=rates), state_path=path)
        anew += run(engine, 1, first=step)
    assert anew == whole == [(4, "firing", "errors"), (12, "resolved", "errors")]


def test_one_failing_rule_does_not_stop_the_others() -> None:
    lost = MetricSourceError("server is down")
    source = Scripted(error_rate=[lost, lost, lost, 0], trace_count=[1, 1, 0, 0])
    rules = config(rule(), rule("busy", metric="trace_count"), evaluation_failure_for="30s")
    engine = AlertEngine(rules, source)
    assert run(engine, 4) == [
        (0, "firing", "busy"),
        (1, "firing", "alert_evaluation_failed"),
        (2, "resolved", "busy"),
        (3, "resolved", "alert_evaluation_failed"),
    ]


def test_a_failing_rule_is_named_with_its_reason() -> None:
    source = Scripted(error_rate=[ValueError("bad")])
    engine = AlertEngine(config(rule(), evaluation_failure_for="0s"), source)
    (alert,) = engine.evaluate(START)
    assert "errors: ValueError: bad" in alert.summary
    assert engine.failures == {"errors": "ValueError: bad"}


def test_what_could_not_be_sent_is_sent_later_even_after_a_restart(tmp_path: Path) -> None:
    path, recorder = tmp_path / "alerts.db", Recorder()
    source, rules = Scripted(error_rate=[1, 1, 1]), config(rule())
    recorder.fail = True
    engine = AlertEngine(rules, source, recorder, state_path=path)
    run(engine, 1)
    assert recorder.sent == []
    recorder.fail = False
    restarted = AlertEngine(rules, source, recorder, state_path=path)
    assert run(restarted, 2, first=1) == []  # 変化は最初の 1 回だけ
    assert recorder.sent == [("firing", "errors")]


def test_an_unsent_firing_never_arrives_after_its_resolution() -> None:
    recorder = Recorder()
    engine = AlertEngine(config(rule()), Scripted(error_rate=[1, 0, 0]), recorder)
    recorder.fail = True
    run(engine, 1)
    recorder.fail = False
    run(engine, 2, first=1)
    assert recorder.sent == [("resolved", "errors")]


def test_a_critical_alert_mutes_the_warning_until_it_clears() -> None:
    inhibit = Inhibit(when={"severity": "critical"}, mute={"severity": "warning"})
    rules = config(
        rule("page", severity="critical"), rule("warn", metric="trace_count"), inhibit=(inhibit,)
    )
    source = Scripted(error_rate=[1, 0, 0, 0], trace_count=[1, 1, 0, 0])
    assert run(AlertEngine(rules, source), 4) == [
        (0, "firing", "page"),
        (1, "resolved", "page"),
        (1, "firing", "warn"),
        (2, "resolved", "warn"),
    ]


def test_a_muted_alert_that_resolves_in_silence_is_never_mentioned() -> None:
    quiet = MuteWindow(start="00:00", end="00:01")  # START から 1 分間
    engine = AlertEngine(config(rule(), mute=(quiet,)), Scripted(error_rate=[1, 0, 0, 0]))
    assert run(engine, 4) == []
    late = AlertEngine(config(rule(), mute=(quiet,)), Scripted(error_rate=[1, 1, 1, 0]))
    assert run(late, 4) == [(2, "firing", "errors"), (3, "resolved", "errors")]


def test_a_mute_window_crosses_midnight() -> None:
    night = MuteWindow(start="22:00", end="06:00", days=("fri",), timezone="Asia/Tokyo")
    tokyo = timezone(timedelta(hours=9))
    covered: Callable[[int, int], bool] = lambda day, hour: night.covers(  # noqa: E731
        datetime(2026, 1, day, hour, tzinfo=tokyo)
    )
    assert covered(2, 23) and covered(3, 5)  # 1 月 2 日は金曜
    assert not covered(2, 21) and not covered(3, 6) and not covered(3, 23) and not covered(2, 5)


def test_repeats_stop_when_somebody_takes_the_alert() -> None:
    engine = AlertEngine(config(rule(), repeat="1m"), Scripted(error_rate=[1]))
    assert [i for i, *_ in run(engine, 5)] == [0, 2, 4]
    engine.acknowledge("errors")
    assert run(engine, 4, first=5) == []
    with pytest.raises(KeyError, match="no rule named"):
        engine.acknowledge("nobody")


def test_active_alerts_are_offered_to_handlers_that_need_them_every_cycle() -> None:
    recorder = Recorder()
    engine = AlertEngine(config(rule()), Scripted(error_rate=[1, 1, 0]), recorder)
    run(engine, 3)
    assert recorder.alive == ["errors", "errors", ""]
    assert engine.phases()["errors"] == "inactive"
    assert engine.last_samples()["errors"].value == 0


def test_a_mute_window_is_checked_when_it_is_made() -> None:
    with pytest.raises(AlertConfigError) as caught:
        MuteWindow(start="22:00+09:00", end="25:00", days=("Mon",), timezone="Asia/Tokio")
    assert len(caught.value.problems) == 4


def test_a_mute_window_from_midnight_to_midnight_is_the_whole_day() -> None:
    at = START + timedelta(hours=23, minutes=59, seconds=30)
    assert MuteWindow().covers(at) and MuteWindow(start="09:00", end="09:00").covers(at)


def test_a_notifier_that_raises_loses_nothing() -> None:
    recorder = Recorder()
    engine = AlertEngine(config(rule()), Scripted(error_rate=[1]), recorder)
    healthy, recorder.notify = recorder.notify, broken  # type: ignore[method-assign]
    engine.evaluate(START)
    recorder.notify = healthy  # type: ignore[method-assign]
    engine.evaluate(START + STEP)
    assert recorder.sent == [("firing", "errors")]


def broken(*_: Any, **__: Any) -> Any:
    raise RuntimeError("bug in the notifier")


def test_alerts_are_sent_although_the_state_cannot_be_saved(tmp_path: Path) -> None:
    recorder, folder = Recorder(), tmp_path / "state"
    engine = AlertEngine(
        config(rule()), Scripted(error_rate=[1]), recorder, state_path=folder / "alerts.db"
    )
    folder.write_text("a file where the folder should be", encoding="utf-8")
    engine.evaluate(START)
    assert recorder.sent == [("firing", "errors")]
    assert "alert_state" in engine.failures


def test_an_alert_is_acknowledged_by_its_fingerprint_too() -> None:
    engine = AlertEngine(config(rule(), repeat="30s"), Scripted(error_rate=[1]))
    engine.evaluate(START)
    engine.acknowledge(engine.active()[0].fingerprint)
    assert engine.evaluate(START + 2 * STEP) == []


def test_a_clock_set_back_stops_neither_the_firing_nor_the_end() -> None:
    source = Scripted(error_rate=[1])
    engine = AlertEngine(config(rule(for_="1m", keep_firing_for="1m"), repeat="2m"), source)
    assert engine.evaluate(START + timedelta(days=365)) == []  # 1 年進んでいた時計で pending になる
    assert run(engine, 7) == [(2, "firing", "errors"), (6, "firing", "errors")]
    engine.source = Scripted(error_rate=[0])
    assert run(engine, 3) == [(2, "resolved", "errors")]


def test_an_alert_never_ends_before_it_started() -> None:
    source = Scripted(error_rate=[1])
    engine = AlertEngine(config(rule()), source)
    (firing,) = engine.evaluate(START + timedelta(days=1))
    engine.source = Scripted(error_rate=[0])
    (resolved,) = engine.evaluate(START)
    assert resolved.starts_at == firing.starts_at == resolved.ends_at


def test_two_alerts_that_mute_each_other_are_not_both_lost() -> None:
    inhibit = Inhibit(when={"severity": "critical"}, mute={})
    rules = config(
        rule("a", severity="critical"),
        rule("b", severity="critical"),
        rule("c"),
        inhibit=(inhibit,),
    )
    engine = AlertEngine(rules, Scripted(error_rate=[1]))
    assert {name for _, _, name in run(engine, 2)} == {"a", "b"}


def test_the_day_of_a_mute_window_does_not_depend_on_the_locale() -> None:
    class Japanese(datetime):
        """日本語のロケールでは、曜日の名前は「金」になる。"""

        def strftime(self, format: str) -> str:
            return "金"

    friday = Japanese(2026, 1, 2, 12, tzinfo=timezone.utc)
    assert MuteWindow(days=("fri",)).covers(friday)
    assert not MuteWindow(days=("sat",)).covers(friday)


def test_a_mute_window_needs_a_day() -> None:
    with pytest.raises(AlertConfigError, match="the list is empty"):
        MuteWindow(days=())


def test_a_muted_alert_is_not_kept_alive_but_a_known_one_is() -> None:
    recorder = Recorder()
    quiet = MuteWindow(start="00:01", end="00:02")
    engine = AlertEngine(
        config(rule(), rule("late", metric="trace_count"), mute=(quiet,)),
        Scripted(error_rate=[1], trace_count=[0, 0, 1]),
        recorder,
    )
    run(engine, 5)
    assert recorder.alive == ["errors", "errors", "errors", "errors", "errors,late"]


def test_a_notifier_that_fails_to_keep_alive_sends_nothing_twice(tmp_path: Path) -> None:
    recorder, path = Recorder(), tmp_path / "alerts.db"
    recorder.keep_alive = broken  # type: ignore[method-assign]
    for i in range(3):
        engine = AlertEngine(config(rule()), Scripted(error_rate=[1]), recorder, state_path=path)
        engine.evaluate(START + i * STEP)
    assert recorder.sent == [("firing", "errors")]


def test_the_alert_about_a_failure_shows_no_numbers_of_another_metric() -> None:
    source = Scripted(error_rate=[ValueError("bad")])
    (alert,) = AlertEngine(config(rule(), evaluation_failure_for="0s"), source).evaluate(START)
    assert (alert.metric, alert.value, alert.threshold, alert.n) == ("", None, None, None)


@pytest.mark.parametrize("changed", [rule("renamed"), rule(labels={"team": "ops"})])
def test_a_rule_removed_while_firing_is_resolved_once(changed: AlertRule, tmp_path: Path) -> None:
    """設定を直して再起動しても、前の名前やラベルで開いた PagerDuty のインシデントが閉じる。"""
    notifier, path = Recorder(), tmp_path / "alerts.db"
    calm = Scripted(error_rate=[1, 0])
    fired = AlertEngine(config(rule()), calm, notifier, state_path=path).evaluate(START)
    engine = AlertEngine(config(changed), calm, notifier, state_path=path)
    resolved = engine.evaluate(START + STEP)
    assert [(a.status.value, a.fingerprint) for a in resolved] == [
        ("resolved", fired[0].fingerprint)
    ]
    assert notifier.sent == [("firing", "errors"), ("resolved", "errors")]
    again = AlertEngine(config(changed), calm, notifier, state_path=path)
    assert again.evaluate(START + 2 * STEP) == []
