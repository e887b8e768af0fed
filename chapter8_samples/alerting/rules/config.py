"""8.4.1 アラートの設定: ルールの集まり、抑制、知らせない時間帯。

設定は組み立てたときに検査し、誤りをすべてまとめて ``AlertConfigError`` にする。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field
from datetime import datetime, timedelta
from functools import cached_property, partial
from typing import Annotated, Any, Literal, Protocol

from pydantic import PlainValidator

from .checking import Problem, model, read
from .defaults import DEFAULT_RULES
from .model import AlertRule, BurnRateRule, Rule
from .receivers import read_receiver, read_route
from .references import WATCHDOG, reference_problems
from .values import (
    Clock,
    Length,
    Name,
    PositiveLength,
    Severity,
    Some,
    Text,
    Zone,
    parse_clock,
    parse_duration,
    parse_zone,
)

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: tuple[Day, ...] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Selector = Mapping[Name, Name]


class Selectable(Protocol):
    """ラベルで選べるもの(``Alert``)。"""

    @property
    def labels(self) -> Mapping[str, str]: ...
    def matches(self, selector: Mapping[str, str]) -> bool:
        """``selector`` のすべてに合うか。"""
        ...


@model
class Inhibit:
    """``when`` に合うアラートの発報中は、``mute`` に合うアラートを知らせない。

    ``equal`` のラベルが両方にあって同じときだけ働く。互いに抑え合う組では、どちらも抑えない
    (Alertmanager と同じ。でなければ、両方とも誰にも知らされない)。
    """

    when: Selector
    mute: Selector
    equal: tuple[Name, ...] = ()

    def applies(self, alert: Selectable, other: Selectable) -> bool:
        """``other`` の発報中に ``alert`` を抑えるか。"""
        pairs = [(alert.labels.get(key), other.labels.get(key)) for key in self.equal]
        same = all(one is not None and one == two for one, two in pairs)
        mutual = alert.matches(self.when) and other.matches(self.mute)
        applies = alert.matches(self.mute) and other.matches(self.when)
        return same and applies and not mutual


@model
class MuteWindow:
    """毎日(または決まった曜日)の、知らせない時間帯。夜をまたいでよい。

    ``start`` と ``end`` が同じなら 24 時間。曜日は、始まる日の曜日。
    """

    match: Selector = field(default_factory=dict[str, str])
    start: Clock = "00:00"
    end: Clock = "00:00"
    days: Annotated[tuple[Day, ...], Some] = DAYS
    timezone: Zone = "UTC"

    @staticmethod
    def heading(fields: Mapping[str, Any]) -> str:
        """誤りの文の前に付ける言葉。"""
        return "mute: "

    def covers(self, at: datetime) -> bool:
        """``at`` がこの時間帯か。"""
        local = at.astimezone(parse_zone(self.timezone))
        start, end = parse_clock(self.start), parse_clock(self.end)
        now = timedelta(hours=local.hour, minutes=local.minute, seconds=local.second)
        if start < end:
            return self._on(local) and start <= now < end
        return (self._on(local) and now >= start) or (
            self._on(local - timedelta(days=1)) and now < end
        )

    def _on(self, day: datetime) -> bool:
        return DAYS[day.weekday()] in self.days  # strftime("%a") は、ロケールによって「金」になる


def _part(cls: type[Any]) -> PlainValidator:
    return PlainValidator(partial(read, cls))


def _rule(value: Any) -> Rule:
    return value if isinstance(value, BurnRateRule) else read(AlertRule, value)


@model
class AlertConfig:
    """ルールの集まりと、評価のしかた。

    Args:
        offset: 集計期間の終わりを、いまからどれだけ遡らせるか。トレースは終わってから届くので、
            遅いリクエストが届くだけの長さにする。
        repeat: 発報中の通知を繰り返す間隔。省略すると繰り返さない。経路(``routes``)ごとの
            ``repeat`` が先に使われる。
        evaluation_failure_for: ルールの評価の失敗がこれだけ続いたら知らせる。
        watchdog_severity: その知らせの重大度。
        interval: 評価の間隔。Alertmanager は、これを過ぎても送られてこないアラートを解消とみなす。
        burn_rates: ``rules`` に加える ``BurnRateRule``(YAML での書き方)。
    """

    experiment: Text = ""
    rules: Sequence[Annotated[Rule, PlainValidator(_rule)]] = ()
    burn_rates: tuple[Annotated[BurnRateRule, _part(BurnRateRule)], ...] = ()
    offset: Length = "30s"
    repeat: Length | None = None
    evaluation_failure_for: Length = "1m"
    watchdog_severity: Severity = "critical"
    interval: PositiveLength | None = None
    labels: Mapping[Name, Name] = field(default_factory=dict[str, str])
    inhibit: tuple[Annotated[Inhibit, _part(Inhibit)], ...] = ()
    mute: tuple[Annotated[MuteWindow, _part(MuteWindow)], ...] = ()
    receivers: Mapping[Name, Annotated[Mapping[str, Any], PlainValidator(read_receiver)]] = field(
        default_factory=dict[str, Mapping[str, Any]]
    )
    routes: tuple[Annotated[Mapping[str, Any], PlainValidator(read_route)], ...] = ()

    @staticmethod
    def across(fields: Mapping[str, Any]) -> list[Problem]:
        """項目をまたぐ誤り。"""
        return reference_problems(fields)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", (*self.rules, *self.burn_rates))
        object.__setattr__(self, "burn_rates", ())

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
