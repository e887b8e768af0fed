"""障害を一つ含む、合成した通信(再生のテストと、評価のベンチマークが使う)。"""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

from chapter8_samples.alerting.metrics.measures import TraceRow


@dataclass(frozen=True, kw_only=True)
class SyntheticTraffic:
    """障害を一つ含む(含まないこともできる)、決まった乱数の通信。"""

    seed: int = 7
    traces: int = 5000
    hours: float = 6.0
    calm: bool = False
    """障害を起こさない。"""
    start: datetime = datetime(2026, 1, 1, tzinfo=timezone.utc)

    @property
    def began(self) -> datetime:
        """障害の始まり。"""
        return self.start + 0.90 * timedelta(hours=self.hours)

    @property
    def ended(self) -> datetime:
        """障害の終わり。"""
        return self.start + 0.95 * timedelta(hours=self.hours)

    def rows(self) -> list[TraceRow]:
        """トレースの行。障害の間は、エラーが増え、3 倍遅く、評価が下がる。"""
        rng = random.Random(self.seed)
        span_ms = self.hours * 3_600_000
        first = round(self.start.timestamp() * 1000)
        found: list[TraceRow] = []
        for i in range(self.traces):
            bad = not self.calm and 0.90 <= i / self.traces < 0.95
            found.append(self._row(rng, first + int(span_ms * i / self.traces), bad))
        return found

    def _row(self, rng: random.Random, at_ms: int, bad: bool) -> TraceRow:
        failed = rng.random() < (0.25 if bad else 0.02)
        latency = int(rng.lognormvariate(6.6, 0.5)) * (3 if bad else 1)
        tokens = {"input_tokens": rng.randint(200, 2000), "output_tokens": rng.randint(50, 600)}
        trace_id, judged = f"tr-{rng.getrandbits(128):032x}", rng.random()
        verdicts: dict[str, str] = {}
        if judged < 0.4:
            verdicts["relevance"] = "yes" if rng.random() < (0.6 if bad else 0.93) else "no"
        if judged < 0.1:
            verdicts["user_feedback"] = "yes" if rng.random() < 0.8 else "no"
        if judged < 0.2:
            verdicts["rating"] = f"{rng.uniform(1, 5):.1f}"
        _ = rng.getrandbits(64), rng.getrandbits(64)  # 乱数の並びを固定する(公開した数値を再現する)
        return TraceRow(
            trace_id=trace_id,
            at_ms=at_ms,
            state="ERROR" if failed else "OK",
            latency_ms=latency,
            tokens=tokens,
            cost_usd=tokens["input_tokens"] * 2.5e-6 + tokens["output_tokens"] * 1e-5,
            assessments=tuple(verdicts.items()),
        )
