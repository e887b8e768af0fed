"""8.4.4 アラートのルールを、過去のトレースで試す。

しきい値は、使う前に試せる。過去のトレースに、エンジンと同じ状態機械をかけ、いつ発報し、いつ解消したかを
調べる。

Databricks でも、``search_traces`` で読めるトレースならそのまま試せる。
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone

from ..delivery import AlertStatus
from ..engine import AlertEngine
from ..metrics import RowNumbers, RowSource, TraceRow
from ..rules import AlertConfig


class RecordedTraces(RowSource):
    """手元のトレースの行を、時刻を自由に選べる指標の出どころにする。"""

    def __init__(self, rows: Sequence[TraceRow]) -> None:
        self._rows = sorted(rows, key=lambda row: row.at_ms)
        self._times = [row.at_ms for row in self._rows]
        self._cache: tuple[tuple[int, int], RowNumbers] = ((0, 0), RowNumbers([]))

    @property
    def span(self) -> tuple[datetime, datetime]:
        """最初と最後のトレースの時刻。空なら ``ValueError``。"""
        if not self._times:
            raise ValueError("there are no traces to replay")
        return _at(self._times[0]), _at(self._times[-1])

    def numbers(self, window: timedelta, at: datetime) -> RowNumbers:
        """集計期間の中の行。"""
        end = round(at.timestamp() * 1000)
        low = bisect.bisect_right(self._times, end - round(window.total_seconds() * 1000))
        key = (low, bisect.bisect_right(self._times, end))
        if self._cache[0] != key:
            self._cache = (key, RowNumbers(self._rows[slice(*key)]))
        return self._cache[1]


def _at(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc)


@dataclass
class RuleReplay:
    """一つのルールの結果。"""

    name: str
    firings: list[datetime] = field(default_factory=list[datetime])
    resolutions: list[datetime] = field(default_factory=list[datetime])
    failures: int = 0
    """値を求められなかった評価の数。"""
    error: str = ""
    """その最初の理由。"""


@dataclass(frozen=True)
class Replay:
    """再生の結果。"""

    rules: list[RuleReplay]

    def table(self) -> str:
        """ルールごとの、発報と解消の数と、発報の時刻。"""
        lines = ["発報 解消  ルール"]
        for rule in self.rules:
            counts = f"{len(rule.firings):4} {len(rule.resolutions):4}  {rule.name}"
            failed = f" (評価できず {rule.failures} 回: {rule.error})" if rule.failures else ""
            lines.append(counts + failed)
            lines += [f"           {at:%Y-%m-%d %H:%M:%S} UTC" for at in rule.firings]
        return "\n".join(lines)


def replay(
    config: AlertConfig, rows: Sequence[TraceRow], *, step: timedelta = timedelta(seconds=30)
) -> Replay:
    """``rows`` の期間を ``step`` ごとに評価し、発報と解消の時刻を調べる。

    発報中の繰り返し(``repeat``)は数えない。

    Raises:
        ValueError: トレースかルールがない、または ``step`` が正でない。
    """
    if not config.rules or step <= timedelta(0):
        raise ValueError(f"replay needs rules and a step, got {len(config.rules)} and {step}")
    source = RecordedTraces(rows)
    start, end = source.span
    engine = AlertEngine(replace(config, offset="0s", repeat=None, routes=()), source)
    found = {rule.name: RuleReplay(rule.name) for rule in config.rules}
    warm_up = max(rule.queries()[-1][1] for rule in config.rules)
    at = start + min(warm_up, end - start)
    while at <= end:
        for alert in engine.evaluate(at):
            if alert.name not in found:
                continue  # 評価の失敗を知らせる、組み込みのアラート
            if alert.status is AlertStatus.FIRING:
                found[alert.name].firings.append(at)
            else:
                found[alert.name].resolutions.append(at)
        for name, reason in engine.failures.items():
            found[name].failures += 1
            found[name].error = found[name].error or reason
        at += step
    return Replay(list(found.values()))
