"""8.2.3 呼び出しにコストを付け、トレース 1 件分にまとめる(本書にリストなし)。

料金表になかったモデルは、後から行を足せば計算できる。合計に未計算が混ざっているかどうかを
必ず一緒に返すので、下限の金額を、正しい合計と取り違えない。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from mlflow.entities import Span

from ..prices.call import PriceBreakdown
from ..tracker import Calculator
from .calls import LlmCall, TokenUsage
from .leaves import UNATTRIBUTED, llm_calls

_ZERO = Decimal(0)
_CACHE = "framework cache"


@dataclass(frozen=True, slots=True)
class TraceCost:
    """トレース 1 件のコスト。``complete`` が偽なら、``total_usd`` は下限になる。"""

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
    spans: Sequence[Span],
    calculator: Calculator,
    at: datetime | None = None,
    known: Mapping[str, LlmCall] | None = None,
) -> list[LlmCall]:
    """スパンの並びから呼び出しを取り出し、コストのないものに付ける。``known`` は計算済みのもの。"""
    calls = llm_calls(spans, known)
    for call in calls:
        call.cost = call.cost or price_call(call, calculator, at)
    return calls


def price_call(call: LlmCall, calculator: Calculator, at: datetime | None = None) -> PriceBreakdown:
    """呼び出し 1 回のコスト。料金が決まらなければ ``unpriced`` とし、理由を書く。"""
    usage = call.usage or TokenUsage()
    counts = usage.input_tokens, usage.output_tokens
    if call.cache_hit:
        free = _ZERO, _ZERO, _ZERO, _ZERO
        return PriceBreakdown(call.model, "cache_hit", *counts, "", *free, price_source=_CACHE)
    if call.usage is None:
        reason = call.reason or "no token usage was reported"
        return PriceBreakdown(call.model, "missing_usage", *counts, reason=reason)
    if call.model == UNATTRIBUTED:
        return PriceBreakdown(call.model, "unpriced", *counts, reason=call.reason)
    try:
        item = calculator.price(
            call.model,
            *counts,
            usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
            service_tier=call.service_tier,
            at=at or call.started_at,
        )
    except (LookupError, ValueError) as error:  # 未知のモデル、ありえない使用量
        return PriceBreakdown(call.model, "unpriced", *counts, reason=str(error))
    if item.priced and call.reason:
        return item._replace(status="partial", reason=call.reason)
    return item


def trace_cost(calls: Sequence[LlmCall]) -> TraceCost:
    """計算した呼び出しのコストを、トレース 1 件分にまとめる。"""
    items = [call.cost for call in calls if call.cost]
    known = [item for item in items if not item.total_usd.is_nan()]
    by_model: dict[str, Decimal] = {}
    for item in known:
        by_model[item.model] = by_model.get(item.model, _ZERO) + item.total_usd
    kinds = {"priced" if item.priced else item.status for item in items} or {"priced"}
    mixed = len(kinds) > 1 and not kinds.isdisjoint(("priced", "partial"))
    return TraceCost(
        total_usd=sum(by_model.values(), _ZERO),
        by_model=by_model,
        unpriced_models=tuple(dict.fromkeys(i.model for i in items if i.status == "unpriced")),
        calls_without_usage=sum(item.status == "missing_usage" for item in items),
        status="partial" if mixed else max(kinds),  # missing_usage より unpriced を先に伝える
        reasons=tuple(dict.fromkeys(f"{i.model}: {i.reason}" for i in items if not i.priced)),
        prompt_usd=sum((item.prompt_usd for item in known), _ZERO),
        output_usd=sum((item.output_usd for item in known), _ZERO),
    )
