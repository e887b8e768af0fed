"""8.4.1 アラートのルール: しきい値、待ち時間、統計的な判定。

LLM アプリのリクエストは、5 分に数十件ほどのことが多い。割合をそのまま比べると、偶然の揺れで担当者が
呼び出される。しきい値どおりの割合では説明できないときだけ「越えた」と判断する
(``confidence``、二項検定)。

Databricks でもそのまま使う。
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from datetime import timedelta
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from ..durations import parse_duration
from ..metrics import MetricSample
from . import limits
from .checking import model
from .values import Length, Name, Number, PositiveLength, Severity, Whole

Confidence = Annotated[Number, Field(gt=0.5, lt=1), AfterValidator(limits.check_is_rate)]
FEW_SAMPLES = 200
"""標本がこれより少ない集計期間では、``low_traffic_confidence`` を使う。"""


def chance_of_at_least(count: int, n: int, rate: float) -> float:
    """割合 ``rate`` のものを ``n`` 件見て、``count`` 件以上が当たる確率(二項分布の上側)。

    >>> round(chance_of_at_least(1, 1, 0.05), 3), round(chance_of_at_least(3, 10, 0.05), 4)
    (0.05, 0.0115)
    """
    if count <= 0 or rate >= 1:
        return 1.0
    if count > n or rate <= 0:
        return 0.0
    log_choose = math.lgamma(n + 1) - math.lgamma(count + 1) - math.lgamma(n - count + 1)
    term = math.exp(log_choose + count * math.log(rate) + (n - count) * math.log1p(-rate))
    total = term
    odds = rate / (1 - rate)
    for k in range(count, n):  # k 件の項から、k + 1 件の項を求めて足す
        term *= (n - k) / (k + 1) * odds
        total += term
        if k > n * rate and term < total * 1e-12:
            break
    return min(1.0, total)


@model
class BaseRule:
    """二種類のルールに共通の項目。"""

    name: Name
    metric: Annotated[Name, AfterValidator(limits.check_metric)] = "error_rate"
    for_: Annotated[Length, Field(validation_alias="for")] = "0s"
    """越えた状態がこれだけ続いたら発報する。"""
    keep_firing_for: Length = "0s"
    """戻ってからこれだけ続いたら解消する。"""
    min_samples: Whole = 0
    no_data: Literal["ok", "keep", "alert"] = "keep"
    """標本がないとき: 正常とみなす、状態を変えない、異常とみなす(``for_`` は待つ)。"""
    severity: Severity = "warning"
    labels: Annotated[Mapping[Name, Name], AfterValidator(limits.check_labels)] = field(
        default_factory=dict[str, str]
    )
    summary: str = ""
    runbook_url: Name | None = None
    action: Literal["rollback"] | None = None

    def no_data_verdict(self) -> bool | None:
        """標本がないときの判定。``None`` は状態を変えない。"""
        return {"ok": False, "keep": None, "alert": True}[self.no_data]


@model
class AlertRule(BaseRule):
    """一つの指標を一つの集計期間でしきい値と比べるルール。

    Args:
        compare: これだけ前の同じ長さの集計期間と比べる。しきい値は、前の値に対する比になる
            (``trace_count``、``compare="1w"``、``op="<"``、``threshold=0.05`` は、先週の 5% 未満)。
        by: ラベルの値ごとに判定する。``model``、``prompt_version``、``tag:名前`` のどれか。
            ラベルの値ごとに 1 件のアラートになり、そのラベルが付く。
        clear_threshold: 解消に使うしきい値。発報中は、値そのものをこれと比べる。
        confidence: 0.5 から 1。割合の指標で、しきい値どおりの割合なら ``1 - confidence`` 以下の
            確率でしか起きない偏りのときに「越えた」とする。``compare`` では、二つの期間の割合の比
            がしきい値どおりなら、と読み替える。
        low_traffic_confidence: 標本が 200 件に満たないときに使う。エラーは固まって起き、
            少ない標本は、独立とみなした確率よりずっと偏りやすい。
    """

    window: PositiveLength = "5m"
    op: Literal[">", "<"] = ">"
    compare: Annotated[PositiveLength, AfterValidator(limits.check_compare)] | None = None
    by: Annotated[str, Field(pattern="^(model|prompt_version|tag:.+)$")] | None = None
    threshold: Annotated[Number, AfterValidator(limits.check_threshold)] = 0.0
    clear_threshold: Annotated[Number, AfterValidator(limits.check_clear)] | None = None
    confidence: Confidence | None = None
    low_traffic_confidence: Confidence | None = None

    @property
    def ago(self) -> timedelta | None:
        """どれだけ前の期間と比べるか。比べないルールでは ``None``。"""
        return None if self.compare is None else parse_duration(self.compare)

    def queries(self) -> list[tuple[str, timedelta]]:
        """判定に要る(指標, 集計期間)。"""
        return [(self.metric, parse_duration(self.window))]

    def value(self, samples: Sequence[MetricSample]) -> float | None:
        """しきい値と比べる値。``compare`` では、前の期間(``samples[1]``)に対する比。"""
        now = samples[0].value
        if self.compare is None or now is None:
            return now
        earlier = samples[1].value
        return now / earlier if earlier else None

    def judge(self, samples: Sequence[MetricSample], firing: bool) -> bool | None:
        """越えているか。標本が足りなければ ``None``。``compare`` では、今と前の二つを渡す。"""
        value = self.value(samples)
        if value is None:
            return self.no_data_verdict()
        # 前の期間と比べるときは、前の期間の標本数で決める(今の件数が減ったことを見つけたい)
        if samples[-1].n < self.min_samples:
            return None
        if not firing:
            return self._beyond(value, self.threshold) and self.is_no_chance(samples)
        clear = self.threshold if self.clear_threshold is None else self.clear_threshold
        return self._beyond(value, clear)

    def _beyond(self, value: float, limit: float) -> bool:
        return value > limit if self.op == ">" else value < limit

    @property
    def is_gated(self) -> bool:
        """偶然の揺れかどうかを検定するか。"""
        return self.confidence is not None or self.low_traffic_confidence is not None

    def is_no_chance(self, samples: Sequence[MetricSample]) -> bool:
        """偶然の揺れでは説明できないか。検定しないルールでは、いつも真。"""
        now, confidence = samples[0], self.confidence
        if now.n < FEW_SAMPLES and self.low_traffic_confidence is not None:
            confidence = self.low_traffic_confidence
        if confidence is None or now.successes is None:
            return True
        count, n, rate = self._share(*samples) if self.compare else self._tail(now)
        return chance_of_at_least(count, n, rate) <= 1 - confidence

    def _tail(self, sample: MetricSample) -> tuple[int, int, float]:
        """偏った側の件数、全体、しきい値どおりのときの割合。"""
        hits = sample.successes or 0.0
        if self.op == ">":
            return math.floor(hits + 1e-9), sample.n, self.threshold
        return math.floor(sample.n - hits + 1e-9), sample.n, 1 - self.threshold

    def _share(self, now: MetricSample, earlier: MetricSample) -> tuple[int, int, float]:
        """しきい値どおりの比なら、両方の期間の当たりのうち ``share`` が今の期間に入る。"""
        hits = now.successes or 0.0
        both = round(hits + (earlier.successes or 0.0))
        share = self.threshold * now.n / (self.threshold * now.n + earlier.n)
        if self.op == ">":
            return math.floor(hits + 1e-9), both, share
        return both - math.ceil(hits - 1e-9), both, 1 - share


@model
class BurnRateRule(BaseRule):
    """SLO のエラー予算を、長短二つの期間で速く使いすぎていないかを見るルール。

    ``objective=0.99``、``factor=14.4`` なら、エラー率が 14.4% を両方の期間で超えたら発報する
    (SRE ワークブック 5 章: 30 日の予算の 2% を 1 時間で使う速さ)。
    """

    by: ClassVar[None] = None
    ago: ClassVar[None] = None
    metric: Annotated[Name, AfterValidator(limits.check_failure_rate)] = "error_rate"
    objective: Annotated[Number, Field(gt=0, lt=1)] = 0.99
    factor: Annotated[Number, Field(gt=0), AfterValidator(limits.check_factor)] = 14.4
    long: PositiveLength = "1h"
    short: Annotated[PositiveLength, AfterValidator(limits.check_short)] = "5m"

    @property
    def threshold(self) -> float:
        """両方の期間の割合と比べる値。"""
        return round(self.factor * (1 - self.objective), 12)

    def queries(self) -> list[tuple[str, timedelta]]:
        """判定に要る(指標, 集計期間)。長い期間が先。"""
        return [(self.metric, parse_duration(w)) for w in (self.long, self.short)]

    def value(self, samples: Sequence[MetricSample]) -> float | None:
        """アラートに載せる値(長いほうの期間)。"""
        return samples[0].value

    def judge(self, samples: Sequence[MetricSample], firing: bool) -> bool | None:
        """両方の期間で越えているか。"""
        values = [s.value for s in samples if s.value is not None]
        if len(values) < 2:
            return self.no_data_verdict()
        if samples[0].n < self.min_samples:
            return None
        return all(value > self.threshold for value in values)


Rule = AlertRule | BurnRateRule
