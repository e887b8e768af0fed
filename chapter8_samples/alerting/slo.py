"""8.4.1 SLO: エラー、遅さ、回答の品質の目標から、burn rate のルールとエラー予算の残りを求める。

「99% のリクエストが成功する」という目標があれば、しきい値を勘で選ばずに済む。残りの 1% がエラー予算
で、それを使い切る速さで知らせる(SRE ワークブック 5 章)。品質も、スコアラーの合格率で同じにできる。

Databricks でもそのまま使う。
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from .metrics import MetricSource
from .rules import BurnRateRule, Duration, Severity, parse_duration

BURN_RATES: Sequence[tuple[float, str, str, Severity]] = (
    (14.4, "1h", "5m", "critical"),
    (6.0, "6h", "30m", "critical"),
    (1.0, "3d", "6h", "warning"),
)
"""(予算を使う速さ, 長い期間, 短い期間, 重大度)。"""
FEWEST_FAILURES = 10
"""失敗がこれに満たなければ鳴らない。エラーは固まって起きるので、1、2 件では何も分からない。"""


@dataclass(frozen=True)
class Slo:
    """サービスレベル目標。

    Args:
        metric: ``error_rate``、``slow_rate:3s``(3 秒より遅い割合)、``pass_rate:評価の名前`` など。
        objective: よい結果の割合の目標(0.99 なら 99%)。
        window: エラー予算の期間。

    Raises:
        AlertConfigError: 割合でない指標、0 から 1 の間にない目標。
        ValueError: 読めない期間。
    """

    metric: str
    objective: float
    window: Duration = "30d"

    def __post_init__(self) -> None:
        parse_duration(self.window)
        # 予算をちょうど使い切る速さのルールを作れるなら、指標も目標も正しい
        name = f"slo_{self.metric}"
        BurnRateRule(name=name, metric=self.failures, objective=self.objective, factor=1)

    @property
    def failures(self) -> str:
        """悪い結果の割合の指標。"""
        kind, _, name = self.metric.partition(":")
        return f"fail_rate:{name}" if kind == "pass_rate" else self.metric

    def rules(self) -> list[BurnRateRule]:
        """予算を使う速さを見る 3 つのルール。目標が低く、その速さになりえないものは除く。"""
        allowed = 1 - self.objective
        return [
            BurnRateRule(
                name=f"slo_{self.metric}_{factor:g}x",
                metric=self.failures,
                objective=self.objective,
                factor=factor,
                long=long,
                short=short,
                min_samples=math.ceil(FEWEST_FAILURES / (factor * allowed)),
                severity=severity,
                summary=f"{self.metric} の予算を {factor:g} 倍の速さで消費",
            )
            for factor, long, short, severity in BURN_RATES
            if factor * allowed < 1
        ]

    def budget_left(self, source: MetricSource, at: datetime) -> float | None:
        """エラー予算の残り。1 は手付かず、0 は使い切り、負は目標割れ。標本がなければ ``None``。"""
        rate = source.sample(self.failures, parse_duration(self.window), at).value
        return None if rate is None else self.left(rate)

    def left(self, failure_rate: float) -> float:
        """悪い結果の割合に対する、予算の残り。

        >>> round(Slo("error_rate", 0.99).left(0.004), 3)
        0.6
        """
        return 1 - failure_rate / (1 - self.objective)
