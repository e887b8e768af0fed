"""レポートの時間軸に並べる出来事。

リリースとロールバックは、8.4 がレジストリのタグに残した記録から読む。アラートは、監視の状態
ファイルがあればそこから読み、なければ、保存されたトレースに同じルールを適用して求める。
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from chapter8_samples.alerting import AlertConfig, AlertRule, Change, MetricSourceError, replay
from chapter8_samples.alerting.engine import read_state
from chapter8_samples.alerting.metrics.measures import RowNumbers, TraceRow, measure

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
    detail: str = ""


def journal_events(
    prompts: Iterable[str], models: Iterable[str], client: Any | None = None
) -> list[Event]:
    """プロンプトと登録済みモデルの、リリースとロールバックの記録(それぞれ直近 8 件)。"""
    import mlflow

    reader: Any = client or mlflow.MlflowClient()
    readers: list[tuple[str, Callable[[str], Any]]] = [
        *((name, reader.get_prompt) for name in sorted(prompts)),
        *((name, reader.get_registered_model) for name in sorted(models)),
    ]
    events: list[Event] = []
    for name, read in readers:
        found = read(name)
        events += _changes(name, (found and found.tags) or {})
    return sorted(events)


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
    usable, problems = _usable(config, rows)
    if not rows or not usable.rules:
        return [], problems
    whole = timedelta(milliseconds=max(r.at_ms for r in rows) - min(r.at_ms for r in rows))
    shortest = min(window for rule in usable.rules for _, window in rule.queries())
    step = min(max(whole / MOMENTS, timedelta(seconds=30)), shortest)
    rules = {rule.name: rule for rule in usable.rules}
    with _quiet():
        found = replay(usable, rows, step=step)
    events = [
        Event(at, f"{rule.name} {word}", kind, _value_at(rules[rule.name], rows, at))
        for rule in found.rules
        for kind, word, moments in (
            ("alert", "発報", rule.firings),
            ("resolved", "解消", rule.resolutions),
        )
        for at in moments
    ]
    return sorted(events), problems


def _usable(config: AlertConfig, rows: Sequence[TraceRow]) -> tuple[AlertConfig, list[str]]:
    rules, problems = list[Any](), list[str]()
    for rule in config.rules:
        try:
            for metric, window in rule.queries():
                measure(metric, window.total_seconds(), RowNumbers(rows))
            rules.append(rule)
        except MetricSourceError as error:
            problems.append(f"{rule.name}: {error}")
    if not problems:
        return config, []
    # 除いたルールを指す抑制や経路は、残せない
    return replace(config, rules=tuple(rules), inhibit=(), mute=(), routes=()), problems


@contextmanager
def _quiet() -> Iterator[None]:
    """途中の集計期間で求められない指標を、評価のたびに警告させない。"""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _value_at(rule: Any, rows: Sequence[TraceRow], at: datetime) -> str:
    """``at`` のときの指標の値と、しきい値。"""
    metric, window = next(iter(rule.queries()))
    end = at.timestamp() * 1000
    start = end - window.total_seconds() * 1000
    inside = RowNumbers([row for row in rows if start < row.at_ms <= end])
    value, n, _ = measure(metric, window.total_seconds(), inside)
    told = "記録なし" if value is None else metric_value(metric, value)
    limit = ""
    if isinstance(rule, AlertRule):
        limit = f"しきい値 {metric_value(metric, rule.threshold)}、"
    return f"{metric_name(metric)} {told}({limit}{n:,} 件)"


def recorded_alerts(config: AlertConfig, state: Path, rows: Sequence[TraceRow]) -> list[Event]:
    """監視の状態ファイルにある、ルールごとの最後の発報(と解消)。

    Raises:
        OSError: ファイルを読めない、または状態ファイルでない。
    """
    events: list[Event] = []
    rules = {rule.name: rule for rule in config.rules}
    for found in read_state(state).values():
        rule = rules.get(found.rule)
        if rule is None or found.fired_at is None:
            continue
        moments = [("alert", "発報", found.fired_at)]
        if found.phase == "inactive" and found.since:
            moments.append(("resolved", "解消", found.since))
        events += [
            Event(at, f"{rule.name} {word}", kind, _value_at(rule, rows, at))
            for kind, word, at in moments
        ]
    return sorted(events)
