"""8.2.3 呼び出しにコストを付け、トレース 1 件分にまとめる(本書にリストなし)。

料金表になかったモデルは、後から行を足せば計算できる。合計に未計算が混ざっているかどうかを
必ず一緒に返すので、下限でしかない金額を、正しい合計と取り違えない。
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import partial

from mlflow.entities import Span

from ..tracker import Calculator
from .calls import UNATTRIBUTED, LlmCall, TokenUsage, llm_calls

_ZERO, _NAN = Decimal(0), Decimal("NaN")


@dataclass(slots=True)
class CallCost:
    """呼び出し 1 回のコスト。``partial`` の金額は下限、決まらないときは NaN。"""

    span_id: str
    model: str
    input_tokens: int
    output_tokens: int
    status: str
    prompt_usd: Decimal = _NAN
    output_usd: Decimal = _NAN
    matched_model: str = ""
    price_source: str = ""
    reason: str = ""

    @property
    def total_usd(self) -> Decimal:
        """入力側と出力の合計。"""
        return self.prompt_usd + self.output_usd

    @property
    def priced(self) -> bool:
        """すべてのトークンの金額が決まったか。"""
        return self.status in ("priced", "cache_hit")


@dataclass(frozen=True, slots=True)
class TraceCost:
    """トレース 1 件のコスト。``complete`` が偽なら、``total_usd`` は下限でしかない。"""

    total_usd: Decimal
    by_model: dict[str, Decimal]
    unpriced_models: tuple[str, ...]
    calls_without_usage: int
    status: str
    reasons: tuple[str, ...]
    prompt_usd: Decimal
    output_usd: Decimal

    @property
    def complete(self) -> bool:
        """すべての呼び出しの、すべてのトークンに料金が付いたか。"""
        return not self.reasons


def price_spans(
    spans: Sequence[Span], calculator: Calculator, at: datetime | None = None
) -> list[CallCost]:
    """スパンの並びから呼び出しを取り出し、1 つずつコストを付ける。"""
    return [price_call(calculator, call, at) for call in llm_calls(spans)]


def price_call(calculator: Calculator, call: LlmCall, at: datetime | None = None) -> CallCost:
    """呼び出しにコストを付ける。料金が決まらなければ、理由を付けて ``unpriced`` にする。"""
    usage = call.usage or TokenUsage()
    cost = partial(CallCost, call.span_id, call.model, usage.input_tokens, usage.output_tokens)
    if call.usage is None:
        return cost("missing_usage", reason="no token usage was reported")
    if call.cache_hit:
        return cost("cache_hit", _ZERO, _ZERO, price_source="framework cache")
    if call.model == UNATTRIBUTED:
        return cost("unpriced", reason=call.problem)
    try:
        item = calculator.price(
            call.model,
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
            service_tier=call.service_tier,
            at=at or call.started_at,
        )
    except (LookupError, ValueError) as error:  # 未知のモデル、ありえない使用量
        return cost("unpriced", reason=str(error))
    if not item.priced:
        return cost("unpriced", reason=item.reason)
    amounts = item.prompt_usd, item.output_usd, item.matched_model, item.price_source
    return cost("partial" if call.problem else "priced", *amounts, call.problem)


def trace_cost(costs: Sequence[CallCost]) -> TraceCost:
    """呼び出しのコストを、トレース 1 件分にまとめる。"""
    known = [cost for cost in costs if not cost.total_usd.is_nan()]
    by_model: dict[str, Decimal] = {}
    for cost in known:
        by_model[cost.model] = by_model.get(cost.model, _ZERO) + cost.total_usd
    kinds = {"priced" if cost.priced else cost.status for cost in costs} or {"priced"}
    mixed = len(kinds) > 1 and not kinds.isdisjoint(("priced", "partial"))
    return TraceCost(
        total_usd=sum(by_model.values(), _ZERO),
        by_model=by_model,
        unpriced_models=tuple(dict.fromkeys(c.model for c in costs if c.status == "unpriced")),
        calls_without_usage=sum(cost.status == "missing_usage" for cost in costs),
        status="partial" if mixed else max(kinds),  # missing_usage より unpriced を先に伝える
        reasons=tuple(dict.fromkeys(f"{c.model}: {c.reason}" for c in costs if not c.priced)),
        prompt_usd=sum((cost.prompt_usd for cost in known), _ZERO),
        output_usd=sum((cost.output_usd for cost in known), _ZERO),
    )
