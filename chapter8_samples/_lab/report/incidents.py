"""レポートの時間軸に並べる出来事。

リリースとロールバックは、8.4 がレジストリのタグに残した記録から読む。
アラートは、保存されたトレースにルールを適用して求める。
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import mlflow

from chapter8_samples.alerting import AlertConfig, AlertRule, Change, replay
from chapter8_samples.alerting.metrics.measures import TraceRow
from chapter8_samples.alerting.tools import RecordedTraces

from .names import metric_name, metric_value

_JOURNAL = re.compile(r"rollback_(\w+)_\d+")  # releases.journal のタグ
_ACTIONS = {
    "promote": ("release", "をリリース"),
    "rollback": ("rollback", "へロールバック"),
    "undo": ("rollback", "へ復帰"),
}
MOMENTS = 720
"""ルールを評価する回数の目安。24 時間なら 2 分おき。"""


@dataclass(frozen=True, order=True)
class Event:
    """いつ、何が起きたか。``kind`` は release、alert、rollback、resolved。"""

    at: datetime
    label: str
    kind: str
    detail: str


def journal_events(prompts: Iterable[str]) -> list[Event]:
    """プロンプトの、リリースとロールバックの記録(それぞれ直近 8 件)。"""
    client = mlflow.MlflowClient()
    events: list[Event] = []
    for name in prompts:
        prompt = client.get_prompt(name)
        if prompt is not None:
            events += _changes(name, prompt.tags)
    return events


def _changes(name: str, tags: Mapping[str, str]) -> Iterator[Event]:
    for key, text in tags.items():
        alias = _JOURNAL.fullmatch(key)
        if alias is None:
            continue
        change = Change.from_json(text)
        if change.state == "done":
            kind, words = _ACTIONS[change.action]
            place = f"{name}@{alias[1]}"
            if change.from_version:
                place += f": v{change.from_version} から v{change.to_version}"
            detail = "、".join(filter(None, [place, change.reason]))
            yield Event(change.at, f"v{change.to_version} {words}", kind, detail)


def replayed_alerts(config: AlertConfig, rows: Sequence[TraceRow]) -> tuple[list[Event], list[str]]:
    """トレースにルールを適用して求めた発報と解消。2 番目は、計算できないルールの理由。"""
    source = RecordedTraces(rows)
    start, end = source.span
    shortest = min(window for rule in config.rules for _, window in rule.queries())
    step = min(max((end - start) / MOMENTS, timedelta(seconds=30)), shortest)
    rules = {rule.name: rule for rule in config.rules}
    with _quiet():
        found = replay(config, rows, step=step)
    events: list[Event] = []
    for result in found.rules:
        rule = rules[result.name]
        for at in result.firings:
            events.append(Event(at, f"{rule.name} 発報", "alert", _value_at(rule, source, at)))
        for at in result.resolutions:
            events.append(Event(at, f"{rule.name} 解消", "resolved", _value_at(rule, source, at)))
    return events, [f"{result.name}: {result.error}" for result in found.rules if result.error]


@contextmanager
def _quiet() -> Iterator[None]:
    """途中の集計期間で求められない指標を、評価のたびに警告させない。"""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _value_at(rule: Any, source: RecordedTraces, at: datetime) -> str:
    """``at`` のときの指標の値と、しきい値。"""
    metric, window = next(iter(rule.queries()))
    sample = source.sample(metric, window, at)
    told = "記録なし" if sample.value is None else metric_value(metric, sample.value)
    limit = ""
    if isinstance(rule, AlertRule):
        limit = f"しきい値 {metric_value(metric, rule.threshold)}、"
    return f"{metric_name(metric)} {told}({limit}{sample.n:,} 件)"
