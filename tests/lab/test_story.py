"""シナリオの部品: 混んだ機械でも鳴るアラート、消してよいものだけを消す ``--fresh``。"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from chapter8_samples._lab import commands
from chapter8_samples._lab.shop.traffic import WORKERS
from chapter8_samples._lab.story.play import (
    COST_CEILING_USD,
    MIN_SAMPLES,
    QUALITY,
    SLOW_MS,
    WINDOW_SECONDS,
    Story,
    alert_config,
)
from chapter8_samples.alerting import AlertEngine
from chapter8_samples.alerting.metrics.measures import MetricSample, RowNumbers, TraceRow, measure

NOW = datetime(2026, 2, 1, tzinfo=timezone.utc)
SLOW_SECONDS_PER_VISIT = 2.5
VISITS_IN_THE_WINDOW = int(WORKERS * WINDOW_SECONDS / SLOW_SECONDS_PER_VISIT)


class _OnlyAnswers:
    """窓の中に、同じ答えが決まった数だけある出どころ。"""

    def __init__(self, verdict: str, *, latency_ms: float = 1.0, cost_usd: float = 0.0) -> None:
        self.verdict, self.latency_ms, self.cost_usd = verdict, latency_ms, cost_usd

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        row = TraceRow(
            trace_id="t",
            at_ms=0,
            latency_ms=self.latency_ms,
            cost_usd=self.cost_usd,
            assessments=((QUALITY, self.verdict),),
        )
        numbers = RowNumbers([row] * VISITS_IN_THE_WINDOW)
        return measure(metric, window.total_seconds(), numbers)

    def examples(self, *_: object) -> list[str]:
        return []


def test_a_slow_machine_has_enough_answers_to_fire_and_to_resolve() -> None:
    assert VISITS_IN_THE_WINDOW >= MIN_SAMPLES
    source = _OnlyAnswers("no")
    engine = AlertEngine(alert_config(), source)
    told = [(alert.name, alert.status.value) for alert in engine.evaluate(NOW)]
    source.verdict = "yes"
    later = NOW + timedelta(seconds=30)
    told += [(alert.name, alert.status.value) for alert in engine.evaluate(later)]
    assert told == [("answers_not_grounded", "firing"), ("answers_not_grounded", "resolved")]


SLOW = _OnlyAnswers("yes", latency_ms=10 * SLOW_MS)


def test_the_end_blames_the_release_but_not_the_machine(tmp_path: Path) -> None:
    for before, after, firing in (
        (SLOW, SLOW, []),  # 混んだ機械
        (_OnlyAnswers("yes"), SLOW, ["slow_p95"]),  # 戻しても遅いまま
        (SLOW, _OnlyAnswers("yes", cost_usd=2 * COST_CEILING_USD), ["expensive"]),
        (SLOW, _OnlyAnswers("no"), ["answers_not_grounded"]),
    ):
        nobody: Any = None
        receiver: Any = SimpleNamespace(received=[])
        story = Story(nobody, receiver, nobody, tmp_path)
        story.engine = AlertEngine(alert_config(), before)
        story.traffic = cast("Any", SimpleNamespace(last_at=NOW))
        story.stay_quiet()
        story.engine.source = after
        story.engine.evaluate(NOW + timedelta(seconds=30))
        assert story.still_firing() == firing


def test_fresh_start_erases_what_the_samples_left_and_nothing_else(tmp_path: Path) -> None:
    lab = tmp_path / ".chapter8"
    for left in ("mlflow.db", "mlflow.db-wal", "outbox/chat.jsonl", "samples/x.db", "spool/1.json"):
        (lab / left).parent.mkdir(parents=True, exist_ok=True)
        (lab / left).touch()
    (lab / "notes.txt").touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept.txt").touch()
    (lab / "archive").symlink_to(elsewhere, target_is_directory=True)
    commands.erase_state()
    assert [path.name for path in lab.iterdir()] == ["notes.txt"]
    assert (elsewhere / "kept.txt").exists()
