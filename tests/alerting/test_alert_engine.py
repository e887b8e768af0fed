"""状態機械: 発報は一度、解消も一度。再起動しても、壊れても、失敗しても。"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from chapter8_samples.alerting.delivery import (
    Alert,
    Delivery,
    NotificationHandler,
    SignedWebhookNotificationHandler,
    json_bytes,
)
from chapter8_samples.alerting.engine import AlertEngine, StateHeldError
from chapter8_samples.alerting.engine.file import StateFile
from chapter8_samples.alerting.metrics.measures import MetricSample, MetricSourceError
from chapter8_samples.alerting.notification_handlers import (
    ConsoleNotificationHandler,
    MultiChannelNotifier,
)
from chapter8_samples.alerting.rules import (
    AlertConfig,
    AlertConfigError,
    AlertRule,
    Inhibit,
    MuteWindow,
)

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
        return MetricSample(value, n)

    def split(
        self, metric: str, window: timedelta, at: datetime, by: str
    ) -> dict[str, MetricSample]:
        """``error_rate|v1`` という名前の値を、ラベルごとに。``None`` のラベルは窓にない。"""
        own = {k: k.partition("|")[2] for k in self.values if k.startswith(f"{metric}|")}
        found = {label: self.sample(k, window, at) for k, label in own.items()}
        return {label: sample for label, sample in found.items() if sample.n}

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
        self, alerts: Alert | Iterable[Alert], *, only: Mapping[str, Collection[str]] | None = None
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


def test_a_rule_that_begins_to_fail_later_is_told_once_it_lasts(tmp_path: Path) -> None:
    """ずっと失敗しているルールが一つあっても、サーバーが落ちたことは知らされる。"""
    lost = MetricSourceError("server is down")
    blip_then_lost = [0, 0, 0, lost, 0, 0, lost]
    source = Scripted(error_rate=[lost], trace_count=blip_then_lost)
    rules = config(rule(), rule("busy", metric="trace_count"), evaluation_failure_for="30s")
    told = [
        (step, alert.summary.count("server is down"))
        for step in range(12)
        for alert in AlertEngine(rules, source, state_path=tmp_path / "alerts.db").evaluate(
            START + step * STEP
        )
    ]
    assert told == [(1, 1), (7, 2)]


def test_a_failing_rule_pages_with_its_reason_and_no_numbers_of_another_metric() -> None:
    source = Scripted(error_rate=[ValueError("bad")])
    for fields, severity in (({}, "critical"), ({"watchdog_severity": "warning"}, "warning")):
        engine = AlertEngine(config(rule(), evaluation_failure_for="0s", **fields), source)
        (alert,) = engine.evaluate(START)
        assert (alert.name, alert.severity.value) == ("alert_evaluation_failed", severity)
        assert alert.summary == "errors: ValueError: bad"
        assert (alert.metric, alert.value, alert.threshold, alert.n) == ("", None, None, None)
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


def test_a_mute_window_crosses_midnight_or_is_the_whole_day() -> None:
    tokyo = timezone(timedelta(hours=9))
    night = MuteWindow(start="22:00", end="06:00", timezone="Asia/Tokyo")
    for window, muted in (
        (night, [0, 1, 2, 3, 4, 5, 22, 23]),
        (MuteWindow(), list(range(24))),
        (MuteWindow(start="09:00", end="09:00"), list(range(24))),
    ):
        hours = [h for h in range(24) if window.covers(datetime(2026, 1, 2, h, 59, 30, 0, tokyo))]
        assert hours == muted
    wrong: Any = {"start": "22:00+09:00", "end": "25:00", "timezone": "Asia/Tokio"}
    with pytest.raises(AlertConfigError) as caught:
        MuteWindow(**wrong)
    assert len(caught.value.problems) == 3


def test_each_route_has_its_own_pace() -> None:
    critical = {"match": {"severity": "critical"}, "to": ["page"], "repeat": "1m"}
    routes: Any = [critical, {"match": {}, "to": ["mail"]}]
    rules = [rule(name="down", severity="critical"), rule(name="slow", severity="warning")]
    receivers: Any = {"page": {"type": "console"}, "mail": {"type": "console"}}
    loaded = AlertConfig(rules=rules, routes=routes, receivers=receivers, repeat="10m")
    engine = AlertEngine(loaded, Scripted(error_rate=[1]))
    told = [
        alert.name
        for minute in range(3)
        for alert in engine.evaluate(START + timedelta(minutes=minute))
    ]
    assert sorted(told) == ["down", "down", "down", "slow"]


def test_a_firing_alert_may_be_repeated() -> None:
    engine = AlertEngine(config(rule(), repeat="1m"), Scripted(error_rate=[1]))
    assert [i for i, *_ in run(engine, 5)] == [0, 2, 4]


def test_a_reminder_with_the_same_value_is_no_repeat_of_the_delivery_before() -> None:
    engine = AlertEngine(config(rule(), repeat="1m"), Scripted(error_rate=[1]))
    hook = SignedWebhookNotificationHandler("https://example.com/hook", "s3cret")
    told = [alert for i in range(5) for alert in engine.evaluate(START + i * STEP)]
    ids = [hook.headers(a, json_bytes(hook.payload(a)))["webhook-id"] for a in told]
    assert len(set(ids)) == 3  # 同じ ID では、受け手が捨てる


def test_active_alerts_are_offered_to_handlers_that_need_them_every_cycle() -> None:
    recorder = Recorder()
    engine = AlertEngine(config(rule()), Scripted(error_rate=[1, 1, 0]), recorder)
    run(engine, 3)
    assert recorder.alive == ["errors", "errors", ""]
    assert engine.active() == []
    assert engine.last_samples()["errors"].value == 0


@pytest.mark.parametrize("method", ["notify", "keep_alive"])
def test_a_notifier_that_raises_loses_nothing_and_sends_nothing_twice(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, path = Recorder(), tmp_path / "alerts.db"

    def evaluate(step: int) -> None:
        source = Scripted(error_rate=[1])
        engine = AlertEngine(config(rule()), source, recorder, state_path=path)
        engine.evaluate(START + step * STEP)

    with monkeypatch.context() as faulty:
        faulty.setattr(recorder, method, broken)
        evaluate(0)
    evaluate(1)
    evaluate(2)
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


def test_a_clock_set_back_stops_neither_the_firing_nor_the_end() -> None:
    source = Scripted(error_rate=[1])
    engine = AlertEngine(config(rule(for_="1m", keep_firing_for="1m"), repeat="2m"), source)
    assert engine.evaluate(START + timedelta(days=365)) == []  # 1 年進んでいた時計で pending になる
    assert run(engine, 7) == [(2, "firing", "errors"), (6, "firing", "errors")]
    engine.source = Scripted(error_rate=[0])
    assert run(engine, 3) == [(2, "resolved", "errors")]


def test_an_alert_keeps_its_start_and_never_ends_before_it_when_the_clock_steps_back() -> None:
    engine = AlertEngine(config(rule(), repeat="1m"), Scripted(error_rate=[1]))
    moments = [START + timedelta(minutes=minute) for minute in (60, 50, 52)]
    told = [alert for moment in moments for alert in engine.evaluate(moment)]
    assert [alert.starts_at for alert in told] == [START + timedelta(minutes=60)] * 2
    engine.source = Scripted(error_rate=[0])
    (resolved,) = engine.evaluate(START + timedelta(minutes=53))
    assert resolved.starts_at == told[0].starts_at == resolved.ends_at


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


def test_everything_due_goes_out_in_one_call() -> None:
    recorder = Recorder()
    rules = config(*(rule(f"r{i}") for i in range(5)))
    AlertEngine(rules, Scripted(error_rate=[1]), recorder).evaluate(START)
    assert (recorder.calls, len(recorder.sent)) == (1, 5)


class Flaky(NotificationHandler):
    """``fail`` の間は届かず、後で送り直せる通知先。"""

    def __init__(self, fail: bool = False) -> None:
        self.fail, self.sent = fail, list[str]()

    def deliver(self, alert: Alert) -> Delivery:
        self.sent += [] if self.fail else [alert.status.value]
        return self.result(alert, ok=not self.fail, retryable=self.fail)


def notifier(routes: dict[str, Sequence[str]] | None = None, **handlers: Any) -> Any:
    made = MultiChannelNotifier(wait_seconds=30, fallback=handlers.pop("fallback", None))
    for name, handler in handlers.items():
        made.add_handler(name, handler)
    if routes:
        made.set_severity_routing(routes)
    return made


def test_what_a_renamed_receiver_was_owed_goes_by_the_present_routes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, page, chat, last = tmp_path / "alerts.db", Flaky(), Flaky(), Flaky()
    source, rules = Scripted(error_rate=[1]), config(rule())
    before = notifier(slack=Flaky(fail=True), page=page)
    AlertEngine(rules, source, before, state_path=path).evaluate(START)
    after = notifier({"warning": ["chat"]}, chat=chat, page=page)
    AlertEngine(rules, source, after, state_path=path).evaluate(START + STEP)
    assert (chat.sent, page.sent) == (["firing"], ["firing"])
    assert "no longer routed to slack; using chat" in caplog.text
    AlertEngine(rules, source, after, state_path=path).evaluate(START + 2 * STEP)
    assert chat.sent == ["firing"]
    other = tmp_path / "other.db"
    AlertEngine(rules, source, before, state_path=other).evaluate(START)
    nobody = notifier({"warning": []}, chat=chat, fallback=last)
    AlertEngine(rules, source, nobody, state_path=other).evaluate(START + STEP)
    assert (last.sent, chat.sent) == (["firing"], ["firing"])


def test_only_the_receiver_that_missed_it_gets_it_again(tmp_path: Path) -> None:
    slack, page = Flaky(fail=True), Flaky()
    engine = AlertEngine(config(rule()), Scripted(error_rate=[1]), notifier(slack=slack, page=page))
    engine.evaluate(START)
    slack.fail = False
    run(engine, 3, first=1)
    assert (slack.sent, page.sent) == (["firing"], ["firing"])


def test_a_severity_edited_while_firing_reaches_the_one_to_be_paged(tmp_path: Path) -> None:
    lowered, raised = ["critical", *["warning"] * 3], ["warning", *["critical"] * 3]
    cases = [
        (lowered, "1m", ["firing", "firing", "resolved"]),  # 開いたインシデントは、閉じられる
        (raised, None, ["firing", "resolved"]),  # 繰り返しを待たずに呼ぶ
    ]
    for severities, repeat, paged in cases:
        page, chat = Flaky(), Flaky()
        routes = {"critical": ["page", "chat"], "warning": ["chat"]}
        channels = notifier(routes, page=page, chat=chat)
        for step, severity in enumerate(severities):
            rules = config(rule(severity=severity), repeat=repeat)
            path, source = tmp_path / f"{repeat}.db", Scripted(error_rate=[1, 1, 1, 0])
            AlertEngine(rules, source, channels, state_path=path).evaluate(START + step * STEP)
        assert page.sent == paged
        assert chat.sent == ["firing", "firing", "resolved"]


class Hanging(NotificationHandler):
    """許されるまで返らない通知先。"""

    def __init__(self) -> None:
        self.go, self.sent = threading.Event(), list[str]()

    def deliver(self, alert: Alert) -> Delivery:
        assert self.go.wait(60)
        self.sent.append(alert.name)
        return self.result(alert, ok=True)


@pytest.mark.parametrize("count", [6, pytest.param(1000, marks=pytest.mark.slow)])
def test_while_one_channel_hangs_the_others_have_everything_within_a_second(count: int) -> None:
    hanging, lines = Hanging(), list[str]()
    channels = notifier(slow=hanging, page=ConsoleNotificationHandler(lines.append))
    channels.wait_seconds = 0.5  # 評価が通知先を待つ上限
    rules = config(*(rule(f"r{i}") for i in range(count)))
    engine = AlertEngine(rules, Scripted(error_rate=[1]), channels)
    try:
        engine.evaluate(START)
        assert (len(lines), hanging.sent) == (count, [])
        assert engine.evaluate(START + STEP) == []
        assert len(lines) == count
    finally:
        hanging.go.set()
    channels.stop()
    engine.close()
    assert sorted(set(hanging.sent)) == sorted(hanging.sent) and len(hanging.sent) <= count


def test_a_state_is_not_given_away_while_something_is_being_sent(tmp_path: Path) -> None:
    hanging, path = Hanging(), tmp_path / "alerts.db"
    channels = notifier(slow=hanging)
    channels.wait_seconds = 0.05
    source, rules = Scripted(error_rate=[1]), config(rule())
    first = AlertEngine(rules, source, channels, state_path=path)
    first.evaluate(START)
    second = AlertEngine(rules, source, notifier(page=Flaky()), state_path=path)
    with pytest.raises(StateHeldError, match=f"held by pid {os.getpid()} on"):
        second.evaluate(START + STEP)
    hanging.go.set()
    channels.stop()
    first.close()
    assert second.evaluate(START + STEP) == []
    assert hanging.sent == ["errors"]


def test_what_did_not_begin_before_the_end_is_left_to_the_next_run(tmp_path: Path) -> None:
    hanging, page, path = Hanging(), Flaky(), tmp_path / "alerts.db"
    channels = notifier(slow=hanging)
    channels.wait_seconds = 0.05
    rules = config(rule("a"), rule("b"))
    engine = AlertEngine(rules, Scripted(error_rate=[1]), channels, state_path=path)
    engine.evaluate(START)
    threading.Timer(0.2, hanging.go.set).start()
    channels.stop()
    engine.close()
    assert hanging.sent == ["a"]
    next_run = AlertEngine(rules, Scripted(error_rate=[1]), notifier(slow=page), state_path=path)
    assert next_run.evaluate(START + STEP) == []
    assert (hanging.sent, page.sent) == (["a"], ["firing"])  # b だけが、一度


def test_a_second_watch_stands_by_until_the_first_ends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, recorders = tmp_path / "alerts.db", [Recorder(), Recorder()]
    source, rules, stops = (
        Scripted(error_rate=[1]),
        config(rule()),
        [threading.Event() for _ in "12"],
    )
    engines = [AlertEngine(rules, source, own, state_path=path) for own in recorders]
    watches = [
        threading.Thread(target=engine.run_forever, args=(0.02,), kwargs={"stop": stop})
        for engine, stop in zip(engines, stops, strict=True)
    ]
    watches[0].start()
    wait_for(lambda: bool(recorders[0].alive))
    watches[1].start()
    wait_for(lambda: "standing by: alert state" in caplog.text)
    assert recorders[1].alive == []
    stops[0].set()
    wait_for(lambda: bool(recorders[1].alive))
    stops[1].set()
    for watch in watches:
        watch.join()
    assert [own.sent for own in recorders] == [[("firing", "errors")], []]
    assert caplog.text.count("standing by") == 1


def wait_for(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def test_each_value_of_a_label_is_an_alert_of_its_own(tmp_path: Path) -> None:
    """悪い版だけが発報し、戻して使われなくなれば(標本がなくなれば)解消する。"""
    path, bad = tmp_path / "alerts.db", [0, 1, 1, None, None, None]
    source = Scripted(**{"error_rate|v1": [0], "error_rate|v2": bad})
    rules = config(rule(by="tag:version", keep_firing_for="30s"), labels={"service": "bot"})
    changes = [
        (i, alert.status.value, dict(alert.labels))
        for i in range(6)
        for alert in AlertEngine(rules, source, state_path=path).evaluate(START + i * STEP)
    ]
    labels = {"service": "bot", "version": "v2"}
    assert changes == [(1, "firing", labels), (3, "resolved", labels)]
    saved = StateFile(path).hold()
    assert saved is not None
    assert {state.label for state in saved.rules.values() if state.rule == "errors"} == {"v1"}


def test_a_rule_may_compare_with_an_earlier_window() -> None:
    """先週は 200 件だったのに、今は 1 件しかない。値は、先週に対する比。"""
    source = Scripted(trace_count=[200, 200, 200, 1])
    rules = config(rule(metric="trace_count", op="<", threshold=0.05, window="1m", compare="1m"))
    engine = AlertEngine(rules, source)
    assert engine.evaluate(START + 2 * STEP) == []
    (alert,) = engine.evaluate(START + 3 * STEP)
    assert (alert.status.value, alert.value) == ("firing", 0.005)
