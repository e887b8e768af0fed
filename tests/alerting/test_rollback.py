"""ロールバック: 戻る、取り消せる、途中で落ちても壊れない、同時には動かない。"""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from chapter8_samples.alerting.delivery import Alert, AlertSeverity, AlertStatus
from chapter8_samples.alerting.processes import machine
from chapter8_samples.alerting.releases import (
    AliasRollback,
    ConcurrentChangeError,
    CooldownError,
    GateRefusedError,
    KnownBadVersionError,
    ModelAlias,
    NoHistoryError,
    RollbackDecision,
    RollbackError,
    SameVersionError,
    UnknownVersionError,
    VerificationError,
    auto_rollback,
)
from chapter8_samples.alerting.releases.journal import Change, Lease, known_bad
from chapter8_samples.alerting.rollback import (
    ModelRollbackManager,
    PromptRollbackManager,
    get_champion_version,
    quick_rollback,
)

START = datetime(2026, 1, 1, tzinfo=timezone.utc)


class Power(BaseException):
    """電源が切れた(``except Exception`` では捕まらない)。"""


class Registry:
    """メモリー上のレジストリ。``fuse`` 回目の呼び出しの後で電源(``cut``)が切れる。"""

    name, alias = "m", "champion"

    def __init__(self, versions: int = 4) -> None:
        self.versions = {str(v) for v in range(1, versions + 1)}
        self.alias_version: str | None = None
        self.stored: dict[str, str] = {}
        self.calls, self.fuse = 0, 10**9
        self.cut: type[BaseException] = Power
        self.before_point: Callable[[], None] = lambda: None

    def _burn(self) -> None:
        self.calls += 1
        off = self.calls > self.fuse and self.cut is Power  # 電源は、切れたまま戻らない
        if self.calls == self.fuse or off:
            raise self.cut

    def current(self) -> str | None:
        self._burn()
        return self.alias_version

    def check(self, version: str) -> None:
        self._burn()
        if version not in self.versions:
            raise UnknownVersionError(f"m has no version {version}")

    def point(self, version: str | None) -> None:
        self.before_point()
        if version is not None and version not in self.versions:
            raise LookupError(f"m has no version {version}")
        self.alias_version = version
        self._burn()

    def tags(self) -> Mapping[str, str]:
        self._burn()
        return dict(self.stored)

    def put_tag(self, key: str, value: str) -> None:
        self.stored[key] = value
        self._burn()

    def uri(self, version: str | None = None) -> str:
        return f"models:/m/{version}" if version else "models:/m@champion"


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now


def engine(registry: Registry, clock: Clock | None = None, **options: Any) -> AliasRollback:
    options = {"clock": clock or Clock(), "sleep": lambda _: None, **options}
    return AliasRollback(registry, **options)


def three_versions(**options: Any) -> tuple[Registry, AliasRollback]:
    registry = Registry()
    rollback = engine(registry, **options)
    for version in (1, 2, 3):
        rollback.promote(version)
    return registry, rollback


def test_a_rollback_goes_to_the_recorded_predecessor_and_back() -> None:
    registry, rollback = three_versions()
    change = rollback.rollback(reason="bad answers")
    assert (change.from_version, change.to_version, change.state) == ("3", "2", "done")
    assert registry.alias_version == "2"
    assert engine(registry).undo().to_version == "3"  # 別のプロセスからでも取り消せる
    with pytest.raises(NoHistoryError, match="no rollback to undo"):
        rollback.undo()


def test_a_second_rollback_skips_the_version_that_was_already_bad() -> None:
    _registry, rollback = three_versions(cooldown_seconds=0)
    rollback.rollback()
    assert rollback.rollback().to_version == "1"
    with pytest.raises(NoHistoryError, match="pass target_version"):
        rollback.rollback()
    assert known_bad(rollback.history()) == {"3", "2"}


def test_an_undone_rollback_is_no_longer_a_reason_to_refuse() -> None:
    registry, rollback = three_versions(cooldown_seconds=0)
    rollback.rollback(1)
    with pytest.raises(KnownBadVersionError, match="version 3 was rolled back"):
        rollback.promote(3)
    rollback.undo()
    rollback.promote(2)
    rollback.promote(3)
    assert registry.alias_version == "3"


def test_force_overrides_the_cooldown_and_the_known_bad_list() -> None:
    _registry, rollback = three_versions()
    rollback.rollback()
    with pytest.raises(CooldownError, match="cooldown is 600 s"):
        rollback.rollback(1)
    assert rollback.rollback(1, force=True).to_version == "1"
    assert rollback.promote(3, force=True).to_version == "3"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda r: r.rollback(9), UnknownVersionError),
        (lambda r: r.rollback(3), SameVersionError),
        (lambda r: r.rollback(1, expected=2), ConcurrentChangeError),
        (lambda r: r.undo(), NoHistoryError),
        *((lambda r, v=v: r.rollback(v), UnknownVersionError) for v in (0, "", "0")),
    ],
)
def test_a_wrong_request_changes_nothing(
    call: Callable[[AliasRollback], object], error: type[RollbackError]
) -> None:
    registry, rollback = three_versions()
    before = dict(registry.stored)
    with pytest.raises(error):
        call(rollback)
    assert (registry.alias_version, registry.stored) == ("3", before)


def test_a_dry_run_checks_everything_and_writes_nothing() -> None:
    registry, rollback = three_versions()
    before = dict(registry.stored)
    assert rollback.rollback(dry_run=True).state == "dry-run"
    with pytest.raises(UnknownVersionError):
        rollback.rollback(9, dry_run=True)
    assert (registry.alias_version, registry.stored) == ("3", before)


def test_the_same_request_is_carried_out_once() -> None:
    registry, rollback = three_versions()
    first = rollback.rollback(request_id="alert-1")
    assert rollback.rollback(request_id="alert-1") == first
    assert registry.alias_version == "2"


def test_a_version_that_fails_before_the_switch_is_never_live() -> None:
    registry, _ = three_versions()
    seen: list[str | None] = []

    def smoke(uri: str) -> None:
        seen.append(registry.alias_version)
        raise ValueError("no answer")

    with pytest.raises(VerificationError, match="before the switch: no answer") as caught:
        engine(registry, smoke_check=smoke).rollback()
    assert (registry.alias_version, seen, caught.value.restored) == ("3", ["3"], True)


def test_a_version_that_fails_after_the_switch_is_taken_back() -> None:
    registry, _ = three_versions()

    def smoke(uri: str) -> None:
        if "@" in uri:
            raise ValueError("500 from the app")

    rollback = engine(registry, smoke_check=smoke)
    with pytest.raises(VerificationError, match="after the switch") as caught:
        rollback.rollback()
    assert caught.value.restored
    assert registry.alias_version == "3"
    assert rollback.history()[-1].state == "restored"
    assert known_bad(rollback.history()) == set()


def test_a_failed_first_promotion_leaves_no_alias() -> None:
    registry = Registry()

    def smoke(uri: str) -> None:
        if "@" in uri:
            raise ValueError("broken")

    with pytest.raises(VerificationError):
        engine(registry, smoke_check=smoke).promote(1)
    assert registry.alias_version is None


def test_somebody_elses_change_is_not_overwritten_by_the_restore() -> None:
    registry, rollback = three_versions()

    def smoke(uri: str) -> None:
        if "@" in uri:
            registry.alias_version = "4"  # 確認の間に、ほかの誰かが動かした
            raise ValueError("that is not what I promoted")

    with pytest.raises(VerificationError) as caught:
        engine(registry, smoke_check=smoke).rollback()
    assert not caught.value.restored
    assert registry.alias_version == "4"
    assert rollback.history()[-1].state == "superseded"


def test_a_version_moved_away_during_its_own_check_does_not_count_as_done() -> None:
    registry, _ = three_versions()

    def smoke(uri: str) -> None:
        if "@" in uri:
            registry.alias_version = "1"  # 長い確認の間に、誰かが手で戻した

    with pytest.raises(VerificationError, match="points at version 1"):
        engine(registry, smoke_check=smoke).promote(4)
    last = engine(registry).history()[-1]
    assert (last.state, registry.alias_version) == ("superseded", "1")


def test_only_one_change_at_a_time() -> None:
    registry, other = three_versions()

    def smoke(uri: str) -> None:
        if "@" in uri:  # 切り替えた後の確認の間
            with pytest.raises(ConcurrentChangeError, match="is being changed by deploy-job"):
                other.rollback()

    change = engine(registry, smoke_check=smoke, actor="deploy-job").rollback()
    assert (change.state, change.lease, other.history()[-1]) == ("done", None, change)


class Turns:
    """2 つのスレッドを、レジストリを呼ぶたびに止め、無作為に選んだ一方だけを進める。"""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.go = {name: threading.Semaphore(0) for name in "ab"}
        self.reached: queue.Queue[tuple[str, str]] = queue.Queue()

    def wait(self, step: str) -> None:
        name = threading.current_thread().name
        if name in self.go:
            self.reached.put((name, step))
            self.go[name].acquire()

    def play(self, jobs: dict[str, Callable[[], None]]) -> None:
        for name, job in jobs.items():
            threading.Thread(target=lambda j=job: (j(), self.wait("end")), name=name).start()
        at = dict(self.reached.get(timeout=10) for _ in jobs)
        while set(at.values()) != {"end"}:
            # 待つ間(settle_seconds)より速く書ける、という仮定: 書く直前の相手より先に起きない
            late = "sleep" if "put_tag" in at.values() else ""
            name = self.random.choice([n for n, step in at.items() if step not in ("end", late)])
            self.go[name].release()
            at.update([self.reached.get(timeout=10)])
        for semaphore in self.go.values():
            semaphore.release()


def promoted_at_once(seed: int, crashed: bool) -> tuple[list[str], Registry, list[Change]]:
    turns, registry, won = Turns(seed), Registry(), list[str]()
    first = engine(registry).promote(1)
    if crashed:
        registry.stored["rollback_champion_1"] = replace(first, state="prepared").to_json()
    for step in ("current", "check", "point", "tags", "put_tag"):
        call = getattr(registry, step)
        paused = lambda *given, step=step, call=call: (turns.wait(step), call(*given))[1]  # noqa: E731
        setattr(registry, step, paused)

    def promote(version: str) -> None:
        with suppress(ConcurrentChangeError):
            engine(registry, sleep=lambda _: turns.wait("sleep")).promote(version, expected=1)
            won.append(version)

    turns.play({"a": lambda: promote("2"), "b": lambda: promote("3")})
    return won, registry, engine(registry).history()


@pytest.mark.parametrize("crashed", [False, True])
def test_however_two_changes_interleave_exactly_one_is_made(crashed: bool) -> None:
    for seed in range(200):
        won, registry, history = promoted_at_once(seed, crashed)
        assert won == [registry.alias_version], seed
        last = [change for change in history if change.state == "done"][-1]
        assert (last.to_version, "prepared" in [c.state for c in history]) == (won[0], False), seed


def test_a_slow_smoke_check_does_not_erase_the_rollback_that_came_between() -> None:
    registry, other = three_versions()

    def slow(uri: str) -> None:
        other.rollback(reason="3 is bad")

    with pytest.raises(ConcurrentChangeError, match="another process changed models:/m@champion"):
        engine(registry, smoke_check=slow).promote(4)
    assert (registry.alias_version, other.history()[-1].reason) == ("2", "3 is bad")
    with pytest.raises(KnownBadVersionError):
        other.promote(3)
    assert other.undo().to_version == "3"


def prepare(rollback: AliasRollback, **lease: Any) -> None:
    """最後の変更を、``lease`` の持ち主による途中の変更に書き換える。"""
    registry: Any = rollback.target
    last = rollback.history()[-1]
    fields: Any = {"id": "x", "until": START + timedelta(minutes=5), **lease}
    change = replace(last, state="prepared", lease=Lease(**fields))
    registry.stored[f"rollback_champion_{last.seq % 8}"] = change.to_json()


def test_what_a_clock_that_was_ahead_left_behind_blocks_nothing_for_hours() -> None:
    clock = Clock()
    _, rollback = three_versions(clock=clock)
    clock.now += timedelta(days=1)
    rollback.rollback()
    clock.now -= timedelta(days=1)
    assert rollback.rollback().to_version == "1"  # 待ち時間は、明日からではない
    prepare(rollback, pid=1, machine="a pod that died", until=clock.now + timedelta(minutes=5))
    with pytest.raises(ConcurrentChangeError, match="is being changed"):
        rollback.recover()
    prepare(rollback, pid=1, machine="a pod that died", until=clock.now + timedelta(days=1))
    assert rollback.recover() is not None


def calls_of_one_rollback() -> int:
    registry, rollback = three_versions()
    before = registry.calls
    rollback.rollback()
    return registry.calls - before


@pytest.mark.parametrize("after", range(1, calls_of_one_rollback() + 1))
def test_a_power_cut_at_any_step_leaves_a_valid_alias_and_a_journal_to_recover(after: int) -> None:
    registry, rollback = three_versions()
    registry.fuse = registry.calls + after
    with pytest.raises(Power):
        rollback.rollback()
    registry.fuse = 10**9
    assert registry.alias_version in ("3", "2")
    later = Clock()
    later.now += timedelta(hours=1)  # 残ったロックの期限が切れた後
    survivor = engine(registry, later)
    survivor.recover()
    last = survivor.history()[-1]
    assert last.state in ("done", "aborted")
    if last.action == "rollback":
        assert (registry.alias_version == "2") == (last.state == "done")
    survivor.promote(4)
    assert survivor.rollback(force=True).to_version in ("3", "2")


@pytest.mark.parametrize("cut", [ConnectionError, KeyboardInterrupt])
@pytest.mark.parametrize("after", range(1, calls_of_one_rollback() + 1))
def test_a_change_broken_off_at_any_step_leaves_nothing_to_wait_for(
    after: int, cut: type[BaseException]
) -> None:
    registry, rollback = three_versions()
    registry.fuse, registry.cut = registry.calls + after, cut
    with suppress(cut, VerificationError):
        rollback.rollback()
    registry.fuse = 10**9
    rollback.promote(4)
    assert [c.state for c in rollback.history() if c.lease or c.state == "prepared"] == []
    assert rollback.rollback(force=True).to_version in ("3", "2")


def test_a_recovered_change_is_verified_before_it_counts() -> None:
    registry, rollback = three_versions()
    registry.before_point = lambda: (_ for _ in ()).throw(Power)  # type: ignore[assignment]
    with pytest.raises(Power):
        rollback.rollback()
    registry.alias_version = "2"  # 付け替えた直後、確認の前に落ちた
    registry.before_point = lambda: None

    def smoke(uri: str) -> None:
        raise ValueError("no answer")

    later = Clock()
    later.now += timedelta(hours=1)
    recovered = engine(registry, later, smoke_check=smoke).recover()
    assert recovered is not None and recovered.state == "restored"
    assert registry.alias_version == "3"


def crashed_after_the_switch() -> Registry:
    """版 4 への昇格が、付け替えた直後に落ちた。"""
    registry, rollback = three_versions()

    def cut() -> None:
        registry.fuse = registry.calls + 1

    registry.before_point = cut
    with pytest.raises(Power):
        rollback.promote(4)
    registry.fuse, registry.before_point = 10**9, lambda: None
    return registry


def test_a_recovery_without_a_way_back_does_not_block_the_next_change() -> None:
    registry = crashed_after_the_switch()
    registry.versions.remove("3")

    def smoke(uri: str) -> None:
        if registry.alias_version == "4" and "@" in uri:
            raise ValueError("no answer")

    later = Clock()
    later.now += timedelta(hours=1)
    survivor = engine(registry, later, smoke_check=smoke)
    recovered = survivor.recover()
    assert recovered is not None and (recovered.state, registry.alias_version) == ("done", "4")
    change = survivor.rollback()
    assert (change.to_version, change.reason) == ("2", "skipped 3: m has no version 3")


def test_the_journal_fits_unity_catalog() -> None:
    registry, rollback = three_versions()
    for i in range(12):
        rollback.promote(4 if i % 2 else 3, reason="理由" * 2000) if i else None
        rollback.promote(1 + i % 2, reason="x" * 999, request_id="r" * 60 + str(i), force=True)
    assert len(rollback.history()) == 8
    for key, value in registry.stored.items():
        assert len(value) <= 1000
        assert not set(key) & set(".,-=/:")
    assert [c.seq for c in rollback.history()] == sorted(c.seq for c in rollback.history())


def test_a_change_survives_its_tag() -> None:
    change = Change(
        id="a", seq=1, action="promote", to_version="2", at=START, by="me", reason="日本語"
    )
    assert Change.from_json(change.to_json()) == change


def model(versions: int = 3) -> str:
    import mlflow

    client: Any = mlflow.MlflowClient()
    client.create_registered_model("agent")
    for _ in range(versions):
        client.create_model_version("agent", source="file:///models/agent")
    return "agent"


@pytest.mark.slow
def test_real_models_and_prompts_follow_the_same_story(tracking_uri: str) -> None:
    import mlflow.genai

    for i in range(3):
        mlflow.genai.register_prompt("qa", f"v{i} {{{{q}}}}")
    managers = (
        ModelRollbackManager(model(), settle_seconds=0.01),
        PromptRollbackManager("qa", settle_seconds=0.01),
    )
    for manager in managers:
        for version in (1, 2, 3):
            manager.promote(version)
        assert manager.rollback(reason="品質低下").to_version == "2"
        assert manager.current_version() == "2"
        assert manager.undo_rollback().to_version == "3"
        with pytest.raises(UnknownVersionError):
            manager.rollback(9)
        assert [c.action for c in manager.get_rollback_history()][-2:] == ["rollback", "undo"]
    assert managers[0].list_aliases() == {"champion": "3"}
    assert [v.version for v in managers[0].get_model_versions()] in ([3, 2, 1], ["3", "2", "1"])
    assert quick_rollback("agent", 1, reason="night", force=True).to_version == "1"
    assert get_champion_version("agent") == "1"


def on_alert(
    alert: Alert, rollback: AliasRollback, mode: Any = "apply", **options: Any
) -> RollbackDecision:
    manager: Any = type("Manager", (), {"for_alias": lambda self, alias=None: rollback})()
    return auto_rollback(alert, manager, mode=mode, **options)


def on_errors(rollback: AliasRollback, **options: Any) -> RollbackDecision:
    return on_alert(Alert(name="errors", action="rollback"), rollback, **options)


def test_an_alert_rolls_back_only_a_recent_promotion_and_only_once() -> None:
    registry, rollback = three_versions()
    alert = Alert(name="errors", severity=AlertSeverity.CRITICAL, action="rollback")
    assert on_alert(Alert(name="cost"), rollback).outcome == "none"
    resolved = Alert(name="errors", action="rollback", status=AlertStatus.RESOLVED)
    assert on_alert(resolved, rollback).outcome == "none"
    suggested = on_alert(alert, rollback, mode="suggest")
    assert (suggested.outcome, registry.alias_version) == ("suggested", "3")
    assert suggested.change is not None and suggested.change.to_version == "2"
    old = on_alert(alert, rollback, max_change_age=timedelta(seconds=1))
    assert (old.outcome, registry.alias_version) == ("none", "3")
    for _ in range(2):
        assert on_alert(alert, rollback).outcome == "applied"
    assert registry.alias_version == "2"
    again = Alert(name="errors", action="rollback", starts_at=START + timedelta(days=1))
    assert on_alert(again, rollback).reason == "the last recorded change is no promotion"


def test_a_first_promotion_has_nothing_to_go_back_to() -> None:
    registry = Registry()
    rollback = engine(registry)
    rollback.promote(1)
    for mode in ("suggest", "apply"):
        decision = on_errors(rollback, mode=mode)
        assert (decision.outcome, registry.alias_version) == ("none", "1")
        assert "no recorded predecessor" in decision.reason


def compete(uri: str, start: Any, rounds: int, results: Any, who: int) -> None:
    import logging

    import mlflow

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    mlflow.set_tracking_uri(uri)
    client: Any = mlflow.MlflowClient()
    for i in range(rounds):
        manager = ModelRollbackManager("agent", client, settle_seconds=0.25, cooldown_seconds=0)
        start.wait()
        try:
            change = manager.promote(1 + (i + 1) % 2, expected=1 + i % 2, force=True)
            results.put((i, who, change.id))
        except RollbackError as error:
            results.put((i, who, type(error).__name__))
        start.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="spawn on Windows needs an importable __main__")
def test_of_three_racing_processes_exactly_one_wins_each_round(tracking_uri: str) -> None:
    name, rounds = model(2), 50
    ModelRollbackManager(name, settle_seconds=0.0).promote(1)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=compete, args=(tracking_uri, start, rounds, results, who))
        for who in range(3)
    ]
    for worker in workers:
        worker.start()
    outcomes = [results.get(timeout=120) for _ in range(3 * rounds)]
    for worker in workers:
        worker.join(30)
    for i in range(rounds):
        won = [o for r, _, o in outcomes if r == i and not o.endswith("Error")]
        assert len(won) == 1, f"round {i}: {[o for r, _, o in outcomes if r == i]}"
    history = ModelRollbackManager(name).get_rollback_history()
    assert [c.state for c in history] == ["done"] * 8


def test_a_forced_promotion_clears_the_bad_mark() -> None:
    registry = Registry()
    rollback = engine(registry, cooldown_seconds=0)
    for version in (1, 2):
        rollback.promote(version)
    rollback.rollback()
    with pytest.raises(KnownBadVersionError):
        rollback.promote(2)
    rollback.promote(2, force=True)
    rollback.promote(3)
    assert known_bad(rollback.history()) == set()
    assert rollback.rollback().to_version == "2"


def test_an_alert_older_than_the_promotion_does_not_roll_back_the_fix() -> None:
    registry, rollback = three_versions()
    alert = Alert(name="errors", action="rollback", starts_at=START - timedelta(minutes=30))
    decision = on_alert(alert, rollback)
    assert (decision.outcome, registry.alias_version) == ("none", "3")
    assert decision.reason == "the alert fired before the last promotion"


def test_undo_takes_every_option_and_leaves_an_alias_that_was_moved_since() -> None:
    registry, rollback = three_versions()
    rollback.rollback()
    registry.alias_version = "1"
    with pytest.raises(ConcurrentChangeError, match="was moved after rollback"):
        rollback.undo()
    registry.alias_version = "2"
    assert rollback.undo(force=True, expected=2).to_version == "3"


@pytest.mark.slow
def test_only_the_exact_number_of_a_real_version_is_accepted(tracking_uri: str) -> None:
    import mlflow.genai

    for i in range(2):
        mlflow.genai.register_prompt("qa", f"v{i} {{{{q}}}}")
    managers: tuple[Any, ...] = (
        PromptRollbackManager("qa", settle_seconds=0),
        ModelRollbackManager(model(2), settle_seconds=0),
    )
    for manager in managers:
        manager.promote(1)
        for version in ("latest", "02", "two", None):
            with pytest.raises(UnknownVersionError):
                manager.promote(version)
        assert manager.current_version() == "1"
        assert [c.state for c in manager.get_rollback_history()] == ["done"]


@pytest.mark.parametrize("kind", [ModelRollbackManager, PromptRollbackManager])
def test_a_name_that_is_not_registered_is_said_so(kind: Any, tracking_uri: str) -> None:
    with pytest.raises(UnknownVersionError, match="nobody is not a registered"):
        kind("nobody", settle_seconds=0).promote(1)


def lost_connection(*_: Any) -> Any:
    raise ConnectionError("server is down")


@pytest.mark.parametrize(
    ("broken", "restored"),
    [(("current", "point", "tags", "put_tag"), False), (("current",), True)],
)
def test_a_server_that_dies_after_the_switch_is_said_so(
    broken: tuple[str, ...], restored: bool
) -> None:
    registry, _ = three_versions()

    def smoke(uri: str) -> None:
        if "@" in uri:
            for name in broken:
                setattr(registry, name, lost_connection)
            raise ValueError("no answer")

    with pytest.raises(VerificationError) as caught:
        engine(registry, smoke_check=smoke).promote(4)
    assert (caught.value.restored, "NOT restored" in str(caught.value)) == (restored, not restored)
    assert registry.alias_version == ("3" if restored else "4")


@pytest.mark.parametrize("mode", ["Apply", "", None])
def test_a_misspelt_mode_is_not_taken_for_a_suggestion(mode: Any) -> None:
    _, rollback = three_versions()
    with pytest.raises(ValueError, match="mode must be 'suggest' or 'apply'"):
        on_errors(rollback, mode=mode)


WITHOUT_A_ZONE = "2026-01-01T00:00:00"
LEASE = {"id": "x", "until": WITHOUT_A_ZONE, "machine": "m", "pid": 1}


@pytest.mark.parametrize(
    "changes",
    [
        {"seq": None},
        {"seq": "x"},
        {"at": 1e300},
        {"at": 1e18},
        {"at": None},
        {"at": WITHOUT_A_ZONE},
        {"state": "prepared", "lease": LEASE},
        None,
    ],
)
def test_a_tag_edited_by_hand_does_not_block_the_next_change(changes: Any) -> None:
    registry, rollback = three_versions()
    tag = "rollback_champion_2"
    edited = {**json.loads(registry.stored[tag]), **changes} if changes else "edited"
    registry.stored[tag] = json.dumps(edited)
    assert [change.to_version for change in rollback.history()] == ["1", "3"]
    assert rollback.rollback().to_version == "2"


def test_aliases_that_look_alike_keep_separate_journals() -> None:
    registry = Registry()
    for alias, version in (("blue-green", 1), ("blue_green", 2)):
        registry.alias, registry.alias_version = alias, None
        engine(registry).promote(version)
        assert [change.to_version for change in engine(registry).history()] == [str(version)]
    assert not set("".join(registry.stored)) & set(".,-=/:")


def test_a_tag_that_somebody_else_wrote_first_is_a_lost_race() -> None:
    from mlflow.exceptions import MlflowException

    class Client:
        def set_registered_model_tag(self, *_: Any) -> None:
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: tags.key")

    with pytest.raises(ConcurrentChangeError, match="lost the race"):
        ModelAlias(Client(), "m", "champion").put_tag("k", "v")


@pytest.mark.slow
def test_the_version_an_alias_points_at_can_be_looked_up(tracking_uri: str) -> None:
    manager = ModelRollbackManager(model(2), settle_seconds=0)
    assert manager.get_alias_info("champion") is None
    manager.promote(2)
    assert str(manager.get_alias_info().version) == "2"


def test_a_gate_is_asked_before_a_promotion_and_only_then() -> None:
    asked: list[str] = []
    registry = Registry()
    rollback = engine(registry, gate=asked.append)  # None を返すゲートは、何も言わない
    rollback.promote(1)
    assert asked == []  # 最初の版には、比べる相手がない
    rollback.promote(2)
    rollback.rollback()
    rollback.undo()
    with pytest.raises(SameVersionError):
        rollback.promote(2)
    assert asked == [registry.uri("2")]


def test_what_the_gate_does_not_accept_is_not_promoted_and_says_why() -> None:
    class Worse:
        def __bool__(self) -> bool:
            return False

        def __str__(self) -> str:
            return "worse (90% -> 70%)"

    def raises(uri: str) -> object:
        raise ValueError("the judge is down")

    for gate, reason in ((lambda uri: Worse(), "worse (90% -> 70%)"), (raises, "judge is down")):
        registry = Registry()
        rollback = engine(registry, gate=gate)
        rollback.promote(1)
        with pytest.raises(GateRefusedError, match=re.escape(reason)):
            rollback.promote(2, force=True)
        assert registry.current() == "1"
        assert len(rollback.history()) == 1


def test_a_promotion_during_the_gate_is_not_overwritten() -> None:
    registry = Registry()
    rollback = engine(registry, gate=lambda uri: registry.point("3"))
    rollback.promote(1)
    with pytest.raises(ConcurrentChangeError, match="at version 1, found 3"):
        rollback.promote(2)


def test_a_request_that_was_carried_out_does_not_ask_the_gate_again() -> None:
    asked: list[str] = []
    registry = Registry()
    rollback = engine(registry, gate=asked.append)
    rollback.promote(1)
    first = rollback.promote(2, request_id="r")
    assert rollback.promote(2, request_id="r") == first and len(asked) == 1


@pytest.mark.parametrize("moved_to", ["2", "4", None])
@pytest.mark.parametrize("mode", ["suggest", "apply"])
def test_an_alias_somebody_moved_after_the_promotion_is_left_alone(
    moved_to: str | None, mode: str
) -> None:
    registry, rollback = three_versions()
    registry.alias_version = moved_to  # 記録に残らない、手での変更
    decision = on_errors(rollback, mode=mode)
    assert (decision.outcome, registry.alias_version) == ("none", moved_to)
    assert f"points at version {moved_to}, no longer at the promoted 3" in decision.reason


def test_an_alias_moved_while_the_alert_is_judged_is_left_alone() -> None:
    registry, rollback = three_versions()
    put_tag = registry.put_tag

    def put_and_move(key: str, value: str) -> None:
        put_tag(key, value)
        registry.alias_version = "4"  # ロックを取る間に、誰かが動かした

    registry.put_tag = put_and_move  # type: ignore[method-assign]
    with pytest.raises(ConcurrentChangeError, match="at version 3, found 4"):
        on_errors(rollback)
    assert registry.alias_version == "4"


def test_a_promotion_that_crashed_after_the_switch_can_still_be_rolled_back() -> None:
    registry = crashed_after_the_switch()
    later = Clock()
    later.now += timedelta(hours=1)
    assert (registry.alias_version, on_errors(engine(registry, later)).outcome) == ("4", "applied")
    assert registry.alias_version == "3"


def test_a_deleted_predecessor_is_skipped_and_the_result_says_so() -> None:
    registry, rollback = three_versions()
    registry.versions.remove("2")
    decision = on_errors(rollback)
    assert (decision.outcome, registry.alias_version) == ("applied", "1")
    assert "skipped 2: m has no version 2" in decision.reason
    assert rollback.history()[-1].reason == "skipped 2: m has no version 2; alert errors"


def test_when_the_current_version_was_deleted_the_last_good_one_comes_back() -> None:
    for ask in (on_errors, lambda rollback: rollback.rollback()):
        registry, rollback = three_versions()
        registry.versions.remove("3")
        registry.alias_version = None  # MLflow は、版と一緒にエイリアスも消す
        ask(rollback)
        assert (registry.alias_version, rollback.history()[-1].to_version) == ("2", "2")


def test_when_every_older_version_is_gone_the_refusal_names_them() -> None:
    registry, rollback = three_versions()
    registry.versions -= {"1", "2"}
    with pytest.raises(
        NoHistoryError, match=r"no recorded predecessor.*no version 2.*no version 1"
    ):
        rollback.rollback()
    assert on_errors(rollback).outcome == "none"


def test_a_version_moved_to_by_hand_is_the_predecessor_of_the_next_promotion() -> None:
    registry, rollback = three_versions()
    registry.alias_version = "1"
    rollback.promote(4)
    registry.versions.remove("1")
    assert rollback.rollback().to_version == "3"


def exited_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot ask without a signal")
def test_the_lock_of_a_dead_process_is_taken_at_once_and_only_on_the_same_machine() -> None:
    _, rollback = three_versions()
    prepare(rollback, machine=machine(), pid=os.getpid())
    with pytest.raises(ConcurrentChangeError, match=r"expires at 2026-01-01 00:05:00 UTC"):
        rollback.rollback(force=True)  # 持ち主は生きている
    prepare(rollback, machine="elsewhere", pid=exited_process())
    with pytest.raises(ConcurrentChangeError, match="expires at"):
        rollback.recover()
    prepare(rollback, machine=machine(), pid=exited_process())
    recovered = rollback.recover()
    assert recovered is not None and recovered.state == "done"
    prepare(rollback, machine=machine(), pid=exited_process())
    assert rollback.rollback(force=True).to_version == "2"


@pytest.mark.skipif(sys.platform != "linux", reason="only /proc tells a zombie from a process")
def test_a_dead_process_that_its_parent_has_not_reaped_holds_no_lock() -> None:
    _, rollback = three_versions()
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
        prepare(rollback, machine=machine(), pid=dead.pid)
        recovered = rollback.recover()
    assert recovered is not None and recovered.state == "done"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_promotion_is_recovered_without_waiting(tracking_uri: str) -> None:
    name = model(2)
    manager = ModelRollbackManager(name, settle_seconds=0)
    manager.promote(1)
    code = (
        "import mlflow, os, signal\n"
        "from chapter8_samples.alerting import ModelRollbackManager\n"
        f"mlflow.set_tracking_uri({tracking_uri!r})\n"
        "def kill(uri):\n    if '@' in uri: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"ModelRollbackManager({name!r}, smoke_check=kill, settle_seconds=0).promote(2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9
    recovered = manager.recover()
    assert recovered is not None and (recovered.state, manager.current_version()) == ("done", "2")


@pytest.mark.slow
def test_a_real_deleted_version_takes_its_alias_along_and_is_skipped(tracking_uri: str) -> None:
    import mlflow

    name = model(4)
    manager = ModelRollbackManager(name, settle_seconds=0, cooldown_seconds=0)
    for version in (1, 2, 3, 4):
        manager.promote(version)
    client: Any = mlflow.MlflowClient()
    for version in ("4", "3"):
        client.delete_model_version(name, version)
    assert manager.current_version() is None
    change = manager.rollback(reason="retention")
    assert (change.to_version, manager.current_version()) == ("2", "2")
    assert change.reason == f"skipped 3: {name} has no version 3; retention"
