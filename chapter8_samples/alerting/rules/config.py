"""8.4.1 アラートの設定: ルールの集まり、抑制、知らせない時間帯。

設定は組み立てたときに検査し、誤りをすべてまとめて ``AlertConfigError`` にする。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from datetime import datetime, timedelta
from functools import cached_property
from typing import Annotated, Any, Protocol

from pydantic import AfterValidator, Discriminator, Tag

from ..durations import parse_duration
from .checking import model
from .defaults import DEFAULT_RULES
from .limits import check_labels
from .model import AlertRule, BurnRateRule
from .receivers import Receiver, Route
from .references import WATCHDOG, reference_problems
from .values import (
    Clock,
    Length,
    Name,
    PositiveLength,
    Severity,
    Zone,
    parse_clock,
    parse_zone,
)

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
    """毎日の、知らせない時間帯。夜をまたいでよい。``start`` と ``end`` が同じなら 24 時間。"""

    match: Selector = field(default_factory=dict[str, str])
    start: Clock = "00:00"
    end: Clock = "00:00"
    timezone: Zone = "UTC"

    def covers(self, at: datetime) -> bool:
        """``at`` がこの時間帯か。"""
        local = at.astimezone(parse_zone(self.timezone))
        now = timedelta(hours=local.hour, minutes=local.minute, seconds=local.second)
        start, end = parse_clock(self.start), parse_clock(self.end)
        if start < end:
            return start <= now < end
        return now >= start or now < end


AnyRule = Annotated[
    Annotated[AlertRule, Tag("rule")] | Annotated[BurnRateRule, Tag("burn_rate")],
    Discriminator(lambda value: "burn_rate" if isinstance(value, BurnRateRule) else "rule"),
]


@model
class AlertConfig:
    """ルールの集まりと、評価のしかた。

    Args:
        offset: 集計期間の終わりを、いまからどれだけ遡らせるか。トレースは終わってから届くので、
            遅いリクエストが届くだけの長さにする。
        repeat: 発報中の通知を繰り返す間隔。省略すると繰り返さない。経路にあれば、そちらを使う。
        evaluation_failure_for: ルールの評価の失敗がこれだけ続いたら知らせる。
        watchdog_severity: その知らせの重大度。
        interval: 評価の間隔。Alertmanager は、これを過ぎても送られてこないアラートを解消とみなす。
        burn_rates: ``rules`` に加える ``BurnRateRule``(YAML での書き方)。
    """

    experiment: str = ""
    rules: Sequence[AnyRule] = ()
    burn_rates: Sequence[BurnRateRule] = ()
    offset: Length = "30s"
    repeat: Length | None = None
    evaluation_failure_for: Length = "1m"
    watchdog_severity: Severity = "critical"
    interval: PositiveLength | None = None
    labels: Annotated[Mapping[Name, Name], AfterValidator(check_labels)] = field(
        default_factory=dict[str, str]
    )
    inhibit: Sequence[Inhibit] = ()
    mute: Sequence[MuteWindow] = ()
    receivers: Mapping[Name, Receiver] = field(default_factory=dict[str, Receiver])
    routes: Sequence[Route] = ()

    @staticmethod
    def across(fields: Mapping[str, Any]) -> Iterator[str]:
        """項目をまたぐ誤り。"""
        return reference_problems(fields)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", (*self.rules, *self.burn_rates))
        object.__setattr__(self, "burn_rates", ())

    @property
    def hold(self) -> timedelta:
        """発報中のアラートを、次の評価まで保つ長さ(Alertmanager の ``endsAt``)。"""
        return max(timedelta(minutes=5), 3 * parse_duration(self.interval or "0s"))

    @cached_property
    def watchdog(self) -> AlertRule:
        """評価の失敗を知らせる、組み込みのルール。"""
        return AlertRule(
            name=WATCHDOG,
            for_=self.evaluation_failure_for,
            severity=self.watchdog_severity,
            summary="alert rules could not be read",
        )

    def repeat_for(self, alert: Selectable) -> timedelta:
        """このアラートの通知を繰り返す間隔。0 は繰り返さない。"""
        for route in self.routes:
            if alert.matches(route.get("match", {})):
                return parse_duration(route.get("repeat") or self.repeat or "0s")
        return parse_duration(self.repeat or "0s")

    def silences(self, alert: Selectable, firing: Sequence[Selectable], at: datetime) -> bool:
        """いまは知らせないか(抑制または時間帯)。"""
        if any(w.covers(at) and alert.matches(w.match) for w in self.mute):
            return True
        return any(i.applies(alert, other) for i in self.inhibit for other in firing)

    @classmethod
    def default(cls) -> AlertConfig:
        """LLM アプリの標準のルール。数値は自分のアプリの SLO に合わせて変える。"""
        return cls(rules=DEFAULT_RULES)
