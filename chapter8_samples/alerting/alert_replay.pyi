"""8.4.4 アラートのルールを、過去のトレースで試す。"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from .trace_metrics import MetricSample, RowNumbers, TraceRow
from .alert_config import AlertConfig
logger = logging.getLogger(__name__)
Span = tuple[datetime, datetime]
LEFT, RIGHT = (52, 16)

class RecordedTraces:
    """手元のトレースの行を、時刻を自由に選べる指標の出どころにする。"""

    def __init__(self, rows: Sequence[TraceRow]) -> None:
        self._rows = sorted(rows, key=lambda row: row.at_ms)
        self._times = [row.at_ms for row in self._rows]
        self._cache: tuple[tuple[int, int], RowNumbers] = ((0, 0), RowNumbers([]))

    @property
    def span(self) -> Span:
        """最初と最後のトレースの時刻。空なら ``ValueError``。"""

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。"""

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int=3) -> list[str]:
        """その指標を悪くしているトレースの ID。"""

    def _numbers(self, window: timedelta, at: datetime) -> RowNumbers:
        ...

@dataclass(frozen=True, kw_only=True)
class RuleReplay:
    """一つのルールの結果。"""
    name: str
    firings: tuple[datetime, ...] = ()
    resolutions: tuple[datetime, ...] = ()
    false_at: tuple[datetime, ...] = ()
    '``firings`` のうち、どの障害とも重ならないもの。'
    detection: tuple[timedelta | None, ...] = ()
    '障害ごとの、始まりから気づくまで。気づかなければ ``None``、始まる前から発報中なら 0。'
    naive_notifications: int = 0
    '同じしきい値で、評価のたびに値だけを比べて知らせた場合の通知の数。'
    naive_false: int = 0
    values: tuple[tuple[datetime, float | None], ...] = field(default=(), repr=False)
    threshold: float = 0.0
    failures: int = 0
    '値を求められなかった評価の数。理由は ``error``。'
    error: str = ''

    @property
    def notifications(self) -> int:
        """発報と解消の通知の数。"""

    @property
    def false_firings(self) -> int:
        """どの障害とも重ならない発報の数。"""

@dataclass(frozen=True, kw_only=True)
class Replay:
    """再生の結果。"""
    rules: tuple[RuleReplay, ...]
    span: Span
    incidents: tuple[Span, ...] = ()

    def table(self) -> str:
        """ルールごとに 1 行の表。"""

    def svg(self, *, width: int=860, row_height: int=110) -> str:
        """値、しきい値、発報中の帯、障害の帯を描いた SVG。時刻は UTC。"""

def replay(config: AlertConfig, rows: Sequence[TraceRow], *, step: timedelta=timedelta(seconds=30), incidents: Sequence[Span]=()) -> Replay:
    """``rows`` の期間を ``step`` ごとに評価し、通知の数と、障害の外での発報を数える。

    発報中の繰り返し(``repeat``)は数えない。

    Args:
        incidents: 障害だった期間。終わってから最も長い窓の分は、障害のうちとみなす。

    Raises:
        ValueError: トレースかルールがない、または ``step`` が正でない。
    """

@dataclass(frozen=True, kw_only=True)
class SyntheticTraffic:
    """障害を一つ含む(含まないこともできる)、決まった乱数の通信。"""
    seed: int = 7
    traces: int = 5000
    hours: float = 6.0
    incident: tuple[float, float] | None = (0.9, 0.95)
    '障害の期間(全体に対する割合)。``None`` なら平穏。'
    error_rate: float = 0.02
    incident_error_rate: float = 0.25
    start: datetime = datetime(2026, 1, 1, tzinfo=timezone.utc)

    def incidents(self) -> list[Span]:
        """障害の期間。"""

    def rows(self) -> list[TraceRow]:
        """トレースの行。障害の間は、エラーが増え、3 倍遅く、評価が下がる。"""

    def _row(self, rng: random.Random, at_ms: int, bad: bool, i: int) -> TraceRow:
        ...

def main() -> None:
    """18 分の障害を含む 6 時間・5,000 件で、4 つのルールを比べ、図を書き出す。"""
