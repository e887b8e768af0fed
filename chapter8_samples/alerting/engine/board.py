"""8.4.1 ルールの評価: 状態を進め、知らせるべき変化を決める。"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from ..delivery import Alert, AlertSeverity, AlertStatus, fingerprint
from ..metrics import MetricSample, MetricSource, samples_of
from ..rules import AlertConfig, Rule, parse_duration
from .state import RuleState

logger = logging.getLogger(__name__)


class RuleBoard:
    """ルールと、その状態の一覧。``by`` のルールは、ラベルの値ごとに一つの状態を持つ。"""

    def __init__(
        self, config: AlertConfig, source: MetricSource, trace_url: Callable[[str], str]
    ) -> None:
        self.config, self.source, self._trace_url = config, source, trace_url
        self._rules = {rule.name: rule for rule in (*config.rules, config.watchdog)}
        self._lock = threading.RLock()
        self._states: dict[str, RuleState] = {}
        self._samples: dict[str, MetricSample] = {}
        self.failures: dict[str, str] = {}
        """直近の評価で失敗したルールと理由。"""

    def active(self) -> list[Alert]:
        """発報中のアラート(抑制中のものも含む)。"""
        with self._lock:
            return [self._alert(r, s) for r, s in self._pairs() if s.phase == "firing"]

    def last_samples(self) -> dict[str, MetricSample]:
        """ルールの名前(``by`` のルールは ``名前[値]``)-> 直近に求めた値。"""
        with self._lock:
            return dict(self._samples)

    def _judge(self, at: datetime) -> list[Alert]:
        """すべてのルールを評価し、知らせるべき変化を返す。"""
        closed = self._close_removed_rules(at)
        # 長い期間から読むと、短い期間は読んだものの一部で済む
        for rule in sorted(self.config.rules, key=lambda r: -r.queries()[0][1]):
            self._evaluate(rule, at)
        self._watch_failures(at)
        return self._due(at) + closed

    def _watch_failures(self, at: datetime) -> None:
        """評価の失敗を進める。知らせた後で失敗し始めたルールが続けば、もう一度知らせる。"""
        watchdog = self.config.watchdog
        state = self._state(watchdog, "")
        state.failing = {name: min(state.failing.get(name, at), at) for name in self.failures}
        self._advance(watchdog, state, bool(self.failures), at)
        hold, told_at = parse_duration(watchdog.for_), state.notified_at
        if told_at and any(told_at < t <= at - hold for t in state.failing.values()):
            state.notified_at = None

    def _evaluate(self, rule: Rule, at: datetime) -> None:
        try:
            found = self._read(rule, at - parse_duration(self.config.offset))
            for label, samples in found.items():
                state = self._state(rule, label)
                breached = rule.judge(samples, state.phase == "firing")
                self._advance(rule, state, breached, at)
                state.value, state.n = rule.value(samples), samples[0].n
                self._samples[_title(rule, label)] = samples[0]
        except Exception as error:  # 一つのルールの失敗で他を止めない
            logger.warning("rule %s could not be evaluated: %s", rule.name, error)
            self.failures[rule.name] = f"{type(error).__name__}: {error}"
            return
        if rule.by:
            self._let_go(rule, found, at)

    def _read(self, rule: Rule, end: datetime) -> dict[str, list[MetricSample]]:
        """ラベルの値(``by`` のないルールでは空)-> 判定に使う値。"""
        found: dict[str, list[MetricSample]] = {}
        for metric, window in rule.queries():
            samples = samples_of(self.source, metric, window, end, by=rule.by, ago=rule.ago)
            for label, own in samples.items():
                found.setdefault(label, []).extend(own)
        return found

    def _let_go(self, rule: Rule, labels: Collection[str], at: datetime) -> None:
        """集計期間から消えたラベル(古い版など)の異常は、``no_data: alert`` でなければ終わる。"""
        for state in [s for _, s in self._pairs() if s.rule == rule.name and s.label not in labels]:
            self._advance(rule, state, bool(rule.no_data_verdict()), at)
            self._samples.pop(_title(rule, state.label), None)
            if state.phase == "inactive" and not state.told:
                del self._states[self._key(rule, state.label)]

    def _advance(self, rule: Rule, state: RuleState, breached: bool | None, at: datetime) -> None:
        hold, keep = parse_duration(rule.for_), parse_duration(rule.keep_firing_for)
        state.advance(breached, at, hold, keep)

    def _due(self, at: datetime) -> list[Alert]:
        firing = self.active()
        found: list[Alert] = []
        for rule, state in self._pairs():
            if state.phase == "firing":
                alert = self._alert(rule, state)
                silenced = self.config.silences(alert, firing, at)
                if self._should_notify(alert, state, at) and not silenced:
                    state.told = self._with_examples(rule, replace(alert, notified_at=at), at)
                    state.notified_at = at
                    found.append(state.told)
            elif state.told:
                found.append(_resolved(state.told, state, at))
                state.told = state.notified_at = None
        return found

    def _close_removed_rules(self, at: datetime) -> list[Alert]:
        """発報中に消したルール(名前やラベルの変更も)の解消。でないと、相手では開いたままになる。"""
        known = {self._key(rule, state.label) for rule, state in self._pairs()}
        gone = [self._states.pop(key) for key in self._states.keys() - known]
        return [_resolved(state.told, state, at) for state in gone if state.told]

    def _should_notify(self, alert: Alert, state: RuleState, at: datetime) -> bool:
        raised = state.told and alert.severity.rank > state.told.severity.rank
        if state.notified_at is None or raised:
            return True
        repeat = self.config.repeat_for(alert)
        return bool(repeat) and at - state.notified_at >= repeat

    def _with_examples(self, rule: Rule, alert: Alert, at: datetime) -> Alert:
        if rule.name == self.config.watchdog.name or rule.by:  # ラベルの値ごとの例は選べない
            return alert
        metric, window = rule.queries()[-1]
        try:
            found = self.source.examples(metric, window, at - parse_duration(self.config.offset))
        except Exception as error:  # 例がなくてもアラートは出す
            logger.warning("no example traces for %s: %s", rule.name, error)
            return alert
        urls = {trace: self._trace_url(trace) for trace in found}
        links = {trace: url for trace, url in urls.items() if url}
        return replace(alert, examples=tuple(found), links=links)

    def _alert(self, rule: Rule, state: RuleState) -> Alert:
        details: dict[str, Any] = {"summary": rule.summary}
        if rule.name != self.config.watchdog.name:
            details |= _measured(rule, state)
        elif self.failures:
            reasons = (f"{name}: {reason}" for name, reason in sorted(self.failures.items()))
            details["summary"] = "; ".join(reasons)[:500]
        severity = AlertSeverity(rule.severity)
        if state.told:
            details |= {"examples": state.told.examples, "links": state.told.links}
            # 設定で下げても、解消までは知らせた重大度のまま(経路が変わると、解消が届かない)
            severity = max(severity, state.told.severity, key=lambda one: one.rank)
        if state.since:
            details["starts_at"] = state.told.starts_at if state.told else state.since
        return Alert(
            name=rule.name,
            severity=severity,
            labels=self._labels(rule, state.label),
            runbook_url=rule.runbook_url,
            action=rule.action,
            **details,
        )

    def _pairs(self) -> list[tuple[Rule, RuleState]]:
        """設定にあるルールの状態。"""
        rules = self._rules
        return [(rules[s.rule], s) for s in self._states.values() if s.rule in rules]

    def _state(self, rule: Rule, label: str) -> RuleState:
        return self._states.setdefault(self._key(rule, label), RuleState(rule.name, label))

    def _key(self, rule: Rule, label: str) -> str:
        return fingerprint(rule.name, self._labels(rule, label))

    def _labels(self, rule: Rule, label: str) -> Mapping[str, str]:
        labels = {**self.config.labels, **rule.labels}
        if rule.by and label:
            labels[rule.by.removeprefix("tag:")] = label
        return labels


def _resolved(told: Alert, state: RuleState, at: datetime) -> Alert:
    ends_at = max(at, told.starts_at)  # 時計が戻っても、始まりより前にしない
    times = {"ends_at": ends_at, "notified_at": at}
    return replace(told, status=AlertStatus.RESOLVED, value=state.value, n=state.n, **times)


def _measured(rule: Rule, state: RuleState) -> dict[str, Any]:
    return {
        "metric": rule.metric,
        "value": state.value,
        "threshold": rule.threshold,
        "n": state.n,
        "window_seconds": rule.queries()[0][1].total_seconds(),
    }


def _title(rule: Rule, label: str) -> str:
    return f"{rule.name}[{label}]" if label else rule.name
