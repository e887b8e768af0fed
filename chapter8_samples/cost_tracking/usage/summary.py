"""8.2.3 トレースの情報だけ(スパンを読まずに)から、期間の合計を作る(本書にリストなし)。"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from decimal import Decimal

from mlflow.entities import TraceInfo

from .calls import STATUS_KEY, TokenUsage
from .span_costs import BY_MODEL_TAG


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
    残したトレースの分だけ。
    """

    experiment_id: str
    trace_count: int = 0
    traces_without_usage: int = 0
    traces_partly_priced: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    cost_usd: Decimal = Decimal(0)
    weighted_trace_count: float = 0.0
    weighted_total_tokens: float = 0.0
    weighted_cost_usd: float = 0.0
    truncated: bool = False
    by_model: dict[str, ModelTotals] = field(default_factory=dict[str, ModelTotals])

    def add(self, info: TraceInfo) -> None:
        """トレース 1 件を足す。"""
        weight = sampling_weight(info)
        usage = _reported_usage(info)
        status = info.tags.get(STATUS_KEY) or ("unpriced" if info.token_usage else "priced")
        self.trace_count += 1
        self.weighted_trace_count += weight
        self.traces_partly_priced += status != "priced"
        if usage is None:
            self.traces_without_usage += 1
        else:
            self.input_tokens += usage.input_tokens
            self.output_tokens += usage.output_tokens
            self.total_tokens += usage.total_tokens
            self.weighted_total_tokens += weight * usage.total_tokens
        usd = (info.cost or {}).get("total_cost")
        if usd is not None:
            self.cost_usd += Decimal(str(usd))
            self.weighted_cost_usd += weight * usd
        self._add_models(info.tags.get(BY_MODEL_TAG, "{}"))

    def _add_models(self, tag: str) -> None:
        for model, (calls, prompt, output, usd) in _breakdown(tag).items():
            item = self.by_model.setdefault(model, ModelTotals())
            item.calls += calls
            item.input_tokens += prompt
            item.output_tokens += output
            if usd is None:
                item.unpriced_calls += calls
            else:
                item.cost_usd += usd


def sampling_weight(info: TraceInfo) -> float:
    """このトレースが代表する件数。ないものと壊れたものは 1 件分(cost_analysis.sql と同じ扱い)。"""
    try:
        weight = float(info.trace_metadata.get("sampling.weight") or 1)
    except ValueError:
        return 1.0
    return weight if 0 < weight < float("inf") else 1.0


def _reported_usage(info: TraceInfo) -> TokenUsage | None:
    try:
        return TokenUsage.from_mlflow(info.token_usage) if info.token_usage else None
    except ValueError:  # 数でない使用量を書く道具がある。1 件のために合計を止めない
        return None


def _breakdown(tag: str) -> dict[str, tuple[int, int, int, Decimal | None]]:
    try:
        return {
            model: (int(calls), int(prompt), int(output), None if usd is None else Decimal(usd))
            for model, (calls, prompt, output, usd) in json.loads(tag).items()
        }
    except (ValueError, TypeError, AttributeError, ArithmeticError):  # 途中で切られたタグなど
        return {}
