"""シナリオのレポート: 保存されたトレースと、シナリオの出来事、受信側に届いた通知。"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from chapter8_samples.cost_tracking.usage.reader import iter_traces

from ..report import health
from ..report.incidents import Event
from ..report.page import Table, write_report
from ..report.sections import Limit, Subject, cards, sections


def write_story_report(
    path: Path,
    experiment_id: str,
    started: datetime,
    *,
    limits: Mapping[str, Limit],
    events: Sequence[Event],
    notifications: Sequence[Sequence[str]],
) -> None:
    """HTML のレポートを書く。カードの判定は、ロールバックのあとの状態で行う。"""
    infos = (trace.info for trace in iter_traces(experiment_id, started))
    history = health.points(infos, round(started.timestamp() * 1000))
    rolled_back = next((event.at for event in events if event.kind == "rollback"), started)
    subject = Subject(
        started=started,
        history=history,
        limits=limits,
        events=events,
        judged_from=(rolled_back - started).total_seconds(),
        judged_label="ロールバック後",
        extra_tables=[Table("受信側に届いた通知", ("時刻", "宛先", "内容"), notifications)],
    )
    write_report(
        path,
        subtitle=f"みどり商店 {started.astimezone():%Y-%m-%d %H:%M:%S} "
        f"から {history[-1].at:.0f} 秒間",
        cards=cards(subject),
        sections=sections(subject),
    )
