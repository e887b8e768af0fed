"""8.2.3 トレースの情報だけ(スパンを読まずに)から、期間の合計を作る(本書にリストなし)。"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from mlflow.entities import TraceInfo

from .calls import STATUS_KEY, TokenUsage
from .reader import sampling_weight
from .span_costs import BY_MODEL_TAG

_NAN, _FLOAT_NAN = Decimal("NaN"), float("nan")


@dataclass(slots=True, kw_only=True)
class ModelTotals:
    """モデル 1 つ分の件数、トークン数、USD。使用量の報告のない呼び出しは入らない。"""

    calls: int = 0
    unpriced_calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: Decimal = Decimal(0)


@dataclass(slots=True, kw_only=True)
class TokenUsageSummary:
    """期間の合計。金額は USD。

    ``weighted_*`` は、サンプリングで捨てた分を ``sampling.weight`` で補った推定値。
    ``traces_partly_priced`` は、自分の料金表で計算しきれなかったトレースの数。MLflow が自前の
    カタログで補った金額が混ざっていることがある。``by_model`` は、``setup_cost_tracking`` が内訳を
    残したトレースの分だけの、補わない実数。``include_cost=False`` なら、金額は NaN、金額の件数は
    ``None``、内訳は空。
    """

    experiment_id: str
    trace_count: int = 0
    traces_without_usage: int = 0
    traces_without_cost: int | None = 0
    traces_partly_priced: int | None = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cost_usd: Decimal = Decimal(0)
    weighted_trace_count: float = 0.0
    weighted_total_tokens: float = 0.0
    weighted_cost_usd: float = 0.0
    by_model: dict[str, ModelTotals] = field(default_factory=dict[str, ModelTotals])
    truncated: bool = False
    source: Literal["server_metrics", "paged"] = "paged"

    @classmethod
    def of_store(cls, experiment_id: str, found: Mapping[str, int]) -> TokenUsageSummary:
        """保存先の集計 API が足した合計。"""
        return cls(
            experiment_id=experiment_id,
            trace_count=found["trace_count"],
            traces_without_usage=found["traces_without_usage"],
            input_tokens=found["input_tokens"],
            output_tokens=found["output_tokens"],
            total_tokens=found["total_tokens"],
            weighted_trace_count=float(found["trace_count"]),
            weighted_total_tokens=float(found["total_tokens"]),
            source="server_metrics",
        ).without_cost()

    def without_cost(self) -> TokenUsageSummary:
        """聞いていない金額を、0 と見せない。"""
        self.traces_without_cost = self.traces_partly_priced = None
        self.cost_usd, self.weighted_cost_usd = _NAN, _FLOAT_NAN
        self.by_model = {}
        return self

    def add(self, info: TraceInfo) -> None:
        """トレース 1 件を足す。"""
        reported = _reported_usage(info)
        usage = reported or TokenUsage()
        usd = (info.cost or {}).get("total_cost")
        weight = sampling_weight(info)
        unpriced = info.tags.get(STATUS_KEY) or ("unpriced" if info.token_usage else "priced")
        self.trace_count += 1
        self.traces_without_usage += reported is None
        self.traces_without_cost = (self.traces_without_cost or 0) + (usd is None)
        self.traces_partly_priced = (self.traces_partly_priced or 0) + (unpriced != "priced")
        self.input_tokens += usage.input_tokens
        self.output_tokens += usage.output_tokens
        self.total_tokens += usage.total_tokens
        self.cost_usd += Decimal(str(usd or 0))
        self.weighted_trace_count += weight
        self.weighted_total_tokens += weight * usage.total_tokens
        self.weighted_cost_usd += weight * (usd or 0)
        self._add_models(info.tags.get(BY_MODEL_TAG))

    def _add_models(self, tag: str | None) -> None:
        for model, (calls, prompt, output, usd) in _breakdown(tag).items():
            item = self.by_model.setdefault(model, ModelTotals())
            item.calls += calls
            item.unpriced_calls += calls if usd is None else 0
            item.input_tokens += prompt
            item.output_tokens += output
            item.cost_usd += usd or 0


def _reported_usage(info: TraceInfo) -> TokenUsage | None:
    try:
        return TokenUsage.from_mlflow(info.token_usage) if info.token_usage else None
    except ValueError:  # 数でない使用量を書く道具がある。1 件のために合計を止めない
        return None


def _breakdown(tag: str | None) -> dict[str, tuple[int, int, int, Decimal | None]]:
    try:
        return {
            model: (int(calls), int(prompt), int(output), None if usd is None else Decimal(usd))
            for model, (calls, prompt, output, usd) in json.loads(tag or "{}").items()
        }
    except (ValueError, TypeError, AttributeError, ArithmeticError):  # 途中で切られたタグなど
        return {}
