"""レポートの時間軸に並べる出来事。

リリースとロールバックは、8.4 がレジストリのタグに残した記録から読む。アラートは、見張りの状態
ファイルがあればそこから読み、なければ、保存されたトレースに同じルールをかけ直して求める。
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

from chapter8_samples.alerting import AlertConfig, Change, MetricSourceError, replay
from chapter8_samples.alerting.delivery.posting import fingerprint
from chapter8_samples.alerting.metrics.measures import RowNumbers, TraceRow, measure

_JOURNAL = re.compile(r"rollback_(\w+)_\d+")  # releases.journal のタグ
_ACTIONS = {
    "promote": ("release", "をリリース"),
    "rollback": ("rollback", "へロールバック"),
    "undo": ("rollback", "へ戻し直し"),
}
MOMENTS = 720
"""ルールをかけ直す回数の目安。24 時間なら 2 分おき。"""


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
            label = f"v{change.to_version} {words}"
            detail = f"{name}@{alias[1]} {change.reason}".strip()
            yield Event(change.at, label, kind, detail)


def replayed_alerts(config: AlertConfig, rows: Sequence[TraceRow]) -> tuple[list[Event], list[str]]:
    """ルールをかけ直して求めた発報と解消。計算できないルールは、理由を 2 番目に返す。"""
    usable, problems = _usable(config, rows)
    if not rows or not usable.rules:
        return [], problems
    whole = timedelta(milliseconds=max(r.at_ms for r in rows) - min(r.at_ms for r in rows))
    shortest = min(window for rule in usable.rules for _, window in rule.queries())
    step = min(max(whole / MOMENTS, timedelta(seconds=30)), shortest)
    with _quiet():
        found = replay(usable, rows, step=step)
    events = [
        Event(at, f"{rule.name} {word}", kind)
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
    return replace(config, rules=tuple(rules)), problems


@contextmanager
def _quiet() -> Iterator[None]:
    """途中の窓で求められない指標を、評価のたびに警告させない。"""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def recorded_alerts(config: AlertConfig, state: Path) -> list[Event]:
    """見張りの状態ファイルにある、ルールごとの最後の発報(と解消)。

    Raises:
        OSError: ファイルを読めない。
        ValueError: 状態ファイルでない。
    """
    data: Any = json.loads(state.read_text(encoding="utf-8"))
    rules: Any = cast(dict[str, Any], data).get("rules") if isinstance(data, dict) else None
    if not isinstance(rules, dict) or not all(isinstance(r, dict) for r in rules.values()):
        raise ValueError(f"{state} is not an alert state file (no 'rules')")
    saved = cast(dict[str, dict[str, Any]], rules)
    events: list[Event] = []
    for rule in config.rules:
        found = saved.get(fingerprint(rule.name, {**config.labels, **rule.labels}), {})
        if fired := _moment(found.get("fired_at")):
            events.append(Event(fired, f"{rule.name} 発報", "alert"))
            ended = _moment(found.get("since"))
            if found.get("phase") == "inactive" and ended:
                events.append(Event(ended, f"{rule.name} 解消", "resolved"))
    return sorted(events)


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(str(text)).astimezone(timezone.utc) if text else None
