"""8.4.1 アラートの設定: ルールの集まり、抑制、知らせない時間帯。

設定は組み立てたときに検査し、誤りをすべてまとめて ``AlertConfigError`` にする。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any, Protocol

from .defaults import DEFAULT_RULES
from .model import (
    DAYS,
    AlertConfigError,
    AlertRule,
    Duration,
    Rule,
    parse_clock,
    parse_duration,
    parse_zone,
    refusals,
)

WATCHDOG = "alert_evaluation_failed"
"""指標を求められないルールがあることを知らせる、組み込みのアラートの名前。"""


class Selectable(Protocol):
    """ラベルで選べるもの(``Alert``)。"""

    @property
    def labels(self) -> Mapping[str, str]: ...
    def matches(self, selector: Mapping[str, str]) -> bool:
        """``selector`` のすべてに合うか。"""
        ...


@dataclass(frozen=True, kw_only=True)
class Inhibit:
    """``when`` に合うアラートの発報中は、``mute`` に合うアラートを知らせない。

    ``equal`` のラベルが両方で同じときだけ働く。互いに抑え合う組では、どちらも抑えない
    (Alertmanager と同じ。でなければ、両方とも誰にも知らされない)。
    """

    when: Mapping[str, str]
    mute: Mapping[str, str]
    equal: tuple[str, ...] = ()

    def applies(self, alert: Selectable, other: Selectable) -> bool:
        """``other`` の発報中に ``alert`` を抑えるか。"""
        same = all(alert.labels.get(k) == other.labels.get(k) for k in self.equal)
        mutual = alert.matches(self.when) and other.matches(self.mute)
        applies = alert.matches(self.mute) and other.matches(self.when)
        return same and applies and not mutual


@dataclass(frozen=True, kw_only=True)
class MuteWindow:
    """毎日(または決まった曜日)の、知らせない時間帯。夜をまたいでよい。

    ``start`` と ``end`` が同じなら 24 時間。曜日は、始まる日の曜日。
    """

    match: Mapping[str, str] = field(default_factory=dict[str, str])
    start: str = "00:00"
    end: str = "00:00"
    days: tuple[str, ...] = DAYS
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        clocks = [("start", parse_clock, self.start), ("end", parse_clock, self.end)]
        found = refusals([*clocks, ("timezone", parse_zone, self.timezone)])
        found += [
            f"days: {day!r} is not one of {', '.join(DAYS)}" for day in self.days if day not in DAYS
        ]
        found += [] if self.days else ["days: the list is empty; name at least one"]
        if found:
            raise AlertConfigError([f"mute: {problem}" for problem in found])

    def covers(self, at: datetime) -> bool:
        """``at`` がこの時間帯か。"""
        local = at.astimezone(parse_zone(self.timezone))
        start, end, now = parse_clock(self.start), parse_clock(self.end), local.time()
        if start < end:
            return self._on(local) and start <= now < end
        return (self._on(local) and now >= start) or (
            self._on(local - timedelta(days=1)) and now < end
        )

    def _on(self, day: datetime) -> bool:
        return DAYS[day.weekday()] in self.days  # strftime("%a") は、ロケールによって「金」になる


@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """ルールの集まりと、評価のしかた。

    Args:
        offset: 窓の終わりを、いまからどれだけ遡らせるか。トレースは終わってから届くので、
            遅いリクエストが届くだけの長さにする。
        repeat: 発報中の通知を繰り返す間隔。省略すると繰り返さない。経路(``routes``)ごとの
            ``repeat`` が先に使われる。
        evaluation_failure_for: ルールの評価の失敗がこれだけ続いたら知らせる。
        watchdog_severity: その知らせの重大度。
        interval: 評価の間隔。Alertmanager は、これを過ぎても送られてこないアラートを解消とみなす。
    """

    experiment: str = ""
    rules: Sequence[Rule] = ()
    offset: Duration = "30s"
    repeat: Duration | None = None
    evaluation_failure_for: Duration = "1m"
    watchdog_severity: str = "critical"
    interval: Duration | None = None
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    inhibit: tuple[Inhibit, ...] = ()
    mute: tuple[MuteWindow, ...] = ()
    receivers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    routes: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        found = [
            f"rules: duplicate name {n!r}" for n in sorted({n for n in names if names.count(n) > 1})
        ]
        found += [f"rules: {WATCHDOG!r} is a built-in alert; rename the rule"] * (WATCHDOG in names)
        durations = ("offset", "evaluation_failure_for", "repeat", "interval")
        found += refusals((key, parse_duration, getattr(self, key) or "0s") for key in durations)
        repeats = ((f"routes[{i}].repeat", r.get("repeat")) for i, r in enumerate(self.routes))
        found += refusals((key, parse_duration, value or "0s") for key, value in repeats)
        if found:
            raise AlertConfigError(found)

    @property
    def offset_delta(self) -> timedelta:
        """``offset`` の長さ。"""
        return parse_duration(self.offset)

    @property
    def hold(self) -> timedelta:
        """発報中のアラートを、次の評価まで保つ長さ(Alertmanager の ``endsAt``)。"""
        return max(timedelta(minutes=5), 3 * parse_duration(self.interval or "0s"))

    def repeat_for(self, alert: Selectable) -> timedelta:
        """このアラートの通知を繰り返す間隔。0 は繰り返さない。"""
        matching = (route for route in self.routes if alert.matches(route.get("match", {})))
        route = next(matching, dict[str, Any]())
        return parse_duration(route.get("repeat") or self.repeat or "0s")

    @cached_property
    def watchdog(self) -> AlertRule:
        """評価の失敗を知らせる、組み込みのルール。"""
        return AlertRule(
            name=WATCHDOG,
            for_=self.evaluation_failure_for,
            severity=self.watchdog_severity,
            summary="alert rules could not be read",
        )

    def hold_and_keep(self, rule: Rule) -> tuple[timedelta, timedelta]:
        """``for_`` と ``keep_firing_for`` の長さ。"""
        return parse_duration(rule.for_), parse_duration(rule.keep_firing_for)

    def silences(self, alert: Selectable, firing: Sequence[Selectable], at: datetime) -> bool:
        """いまは知らせないか(抑制または時間帯)。"""
        if any(w.covers(at) and alert.matches(w.match) for w in self.mute):
            return True
        return any(i.applies(alert, other) for i in self.inhibit for other in firing)

    @classmethod
    def default(cls, experiment: str = "") -> AlertConfig:
        """LLM アプリの標準のルール。数値は自分のアプリの SLO に合わせて変える。"""
        return cls(experiment=experiment, rules=DEFAULT_RULES)
