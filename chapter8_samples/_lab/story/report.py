"""シナリオの記録と、そのレポート。記録はエクスペリメントのタグに残り、後から作り直せる。"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import mlflow

from ..report import health
from ..report.incidents import Event
from ..report.page import Table, write_report
from ..report.sections import Limit, Subject, cards, sections

RECORD_TAG = "chapter8.story"
_COMMENTS = {
    "8.1": "悪いリリースのあいだだけ答えが長くなり、遅くなっています。",
    "8.2": "1 件あたりのコストが、プロンプトの版で変わります。",
    "8.4": "アラートが気づき、プロンプトを元の版に戻すまでと、実際に届いた通知です。",
}


class NoStoryError(LookupError):
    """エクスペリメントにシナリオの記録がない。"""


@dataclass
class StoryRecord:
    """レポートに要る、トレースからは分からない事実。時刻は UNIX 時間(ミリ秒)。"""

    started_ms: int
    quality: str
    limits: dict[str, float]
    events: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    notifications: list[list[str]] = field(default_factory=list[list[str]])

    def event(self, label: str, kind: str, detail: str) -> None:
        """時間軸に立てる印を、いまの時刻で加える。"""
        at_ms = time.time() * 1000
        self.events.append({"label": label, "kind": kind, "detail": detail, "at_ms": at_ms})

    def save(self, experiment_id: str) -> None:
        """エクスペリメントのタグに残す。"""
        text = json.dumps(asdict(self), ensure_ascii=False)
        mlflow.MlflowClient().set_experiment_tag(experiment_id, RECORD_TAG, text)

    @classmethod
    def load(cls, experiment_id: str) -> StoryRecord:
        """保存した記録を読む。

        Raises:
            NoStoryError: シナリオを実行していない。
        """
        tags = mlflow.get_experiment(experiment_id).tags
        if RECORD_TAG not in tags:
            raise NoStoryError(
                f"experiment {experiment_id} has no story; run: python -m chapter8_samples"
            )
        return cls(**json.loads(tags[RECORD_TAG]))


def write_story_report(path: Path, experiment_id: str) -> Path:
    """保存されたトレースと記録だけから、HTML のレポートを書く。"""
    record = StoryRecord.load(experiment_id)
    traces = health.stored_traces(experiment_id, record.started_ms)
    history = health.points((trace.info for trace in traces), record.started_ms)
    subject = _subject(record, history)
    return write_report(
        path,
        title="LLM アプリケーション健全性レポート",
        subtitle=(
            f"みどり商店 {subject.started.astimezone():%Y-%m-%d %H:%M:%S} "
            f"から {history[-1].at:.0f} 秒間"
        ),
        cards=cards(subject),
        sections=sections(subject),
    )


def _moment(at_ms: float) -> datetime:
    return datetime.fromtimestamp(at_ms / 1000, timezone.utc)


def _subject(record: StoryRecord, history: Sequence[health.Point]) -> Subject:
    """判定は、最後のリリースが落ち着いたあと(解消の直前)の状態で行う。"""
    started = _moment(record.started_ms)
    events = [
        Event(_moment(item["at_ms"]), item["label"], item["kind"], item["detail"])
        for item in record.events
    ]
    rolled_back = next((e.at for e in events if e.kind == "rollback"), started)
    limits = record.limits
    return Subject(
        started=started,
        history=history,
        limits={
            "latency_p95_ms": Limit(">", limits["latency_ms"]),
            "cost_usd_per_request": Limit(">", limits["cost_usd"]),
            f"pass_rate:{record.quality}": Limit("<", limits["quality"] / 100),
        },
        events=events,
        judged_from=(rolled_back - started).total_seconds(),
        judged_label="ロールバック後",
        comments=_COMMENTS,
        extra_tables=[Table("受信側に届いた通知", ("時刻", "宛先", "内容"), record.notifications)],
    )
