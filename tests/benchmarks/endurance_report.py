"""``endurance.py`` の結果: 入った数と、保存された数、失ったと報告された数を突き合わせる。"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from endurance import Traffic


@dataclass
class Outcome:
    """終わってからの数。"""

    minutes: float
    traffic: Traffic
    reports: list[dict[str, Any]]
    stored: dict[str, Any]
    sink_spans: set[str]
    memory: list[tuple[float, float]]
    mid_request: int
    left: int
    """ディスクに残り、最後まで送れなかったトレース。"""
    feedback_left: set[str]
    """送信箱に残った評価。"""
    leftover: list[int]

    def total(self, *names: str) -> int:
        """アプリの報告の合計。"""
        found: list[Any] = list(self.reports)
        for name in names:
            found = [one[name] for one in found]
        return sum(found)

    def assessments(self) -> Counter[str]:
        """保存された評価の ID と件数。"""
        return Counter(
            str((one.metadata or {}).get("feedback_id"))
            for trace in self.stored.values()
            for one in trace.info.assessments
        )

    def growth(self) -> tuple[float, float, float]:
        """最後のアプリの (中ほどの RSS、終わりの RSS、毎分の傾き)。MiB。はじめの 1/3 は除く。"""
        kept = self.memory[len(self.memory) // 3 :]
        times, values = [at / 60 for at, _ in kept], [mib for _, mib in kept]
        middle, end = values[: len(values) // 2], values[len(values) // 2 :]
        slope = statistics.linear_regression(times, values).slope
        return statistics.median(middle), statistics.median(end), slope

    def problems(self) -> Iterator[str]:
        """守られなかったこと。なければ空。"""
        made, stored = set(self.traffic.traces), set(self.stored)
        reported = self.total("spool", "dropped") + self.total("spool", "dead") + self.left
        if len(made - stored) != reported:
            yield f"traces: {len(made)} in, {len(made - stored)} missing, {reported} reported"
        if stored - made:
            yield f"traces: {len(stored - made)} are stored but their request was not answered"
        if len(made) != len(self.traffic.traces):
            yield f"traces: {len(self.traffic.traces) - len(made)} ids were given twice"
        spans = {s.span_id for trace in self.stored.values() for s in trace.data.spans}
        unsent = self.total("accepted") - self.total("delivered")
        if len(spans - self.sink_spans) > unsent:
            yield f"spans: {len(spans - self.sink_spans)} missing at the sink, {unsent} reported"
        if self.total("delivered") > len(self.sink_spans):
            yield f"spans: {self.total('delivered')} reported, {len(self.sink_spans)} arrived"
        yield from self._feedback_problems()
        if self.leftover:
            yield f"processes: {self.leftover} are still there"
        middle, end, slope = self.growth()
        if end > middle * 1.05:
            yield f"memory: {middle:.1f} -> {end:.1f} MiB ({slope:+.2f} MiB a minute)"

    def _feedback_problems(self) -> Iterator[str]:
        found, accepted = self.assessments(), self.traffic.feedback
        if lost := accepted - set(found) - self.feedback_left:
            yield f"feedback: {len(lost)} of {len(accepted)} accepted are missing"
        if twice := [name for name, times in found.items() if times > 1]:
            yield f"feedback: {len(twice)} are stored twice"
        if unknown := set(found) - accepted - self.traffic.refused_feedback:
            yield f"feedback: {sorted(unknown)[:3]} were never sent"

    def rows(self) -> Iterator[tuple[str, object]]:
        """表の行。"""
        made, counts = set(self.traffic.traces), self.traffic.counts
        middle, end, slope = self.growth()
        yield "時間", f"{self.minutes:.1f} 分"
        yield "要求", ", ".join(f"{name}: {number}" for name, number in sorted(counts.items()))
        yield "SIGTERM のとき処理中だった要求", f"{self.mid_request}(全部に応答)"
        yield "トレース", f"{len(made)} 件、うち保存 {len(made & set(self.stored))} 件"
        yield "失ったと報告されたトレース", self.total("spool", "dropped") + self.left
        yield "ディスクに書けなかった回数", self.total("spool", "write_errors")
        yield "評価", f"{len(self.traffic.feedback)} 件、うち保存 {len(self.assessments())} 件"
        yield "送信箱に残った評価", len(self.feedback_left)
        sent, lost = self.total("delivered"), self.total("accepted") - self.total("delivered")
        yield "OTLP のスパン", f"届いた {sent}、失ったと報告 {lost}、受信側 {len(self.sink_spans)}"
        yield "アプリの RSS", f"{middle:.1f} → {end:.1f} MiB(毎分 {slope:+.3f} MiB)"
        yield "残ったプロセス", len(self.leftover)
        yield "合わない数", "; ".join(self.problems()) or "なし"
