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

from ..tracker import Calculator
from .calls import UNATTRIBUTED, LlmCall, TokenUsage, llm_calls

_ZERO = Decimal(0)


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
    return [call if call.status else price_call(call, calculator, at) for call in calls]


def price_call(call: LlmCall, calculator: Calculator, at: datetime | None = None) -> LlmCall:
    """呼び出しにコストを書く。料金が決まらなければ ``unpriced`` とし、理由を書く。"""
    call.status = "unpriced"
    if call.cache_hit:
        call.status, call.price_source = "cache_hit", "framework cache"
        call.prompt_usd = call.output_usd = _ZERO
    elif call.usage is None:
        call.status = "missing_usage"
        call.reason = call.reason or "no token usage was reported"
    elif call.model != UNATTRIBUTED:
        _ask_price(call, call.usage, calculator, at or call.started_at)
    return call


def _ask_price(call: LlmCall, usage: TokenUsage, calculator: Calculator, at: datetime) -> None:
    try:
        item = calculator.price(
            call.model,
            usage.input_tokens,
            usage.output_tokens,
            usage.cache_read_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            cache_write_1h_tokens=usage.cache_write_1h_tokens,
            service_tier=call.service_tier,
            at=at,
        )
    except (LookupError, ValueError) as error:  # 未知のモデル、ありえない使用量
        call.reason = str(error)
        return
    if not item.priced:
        call.reason = item.reason
        return
    call.status = "partial" if call.reason else "priced"
    call.prompt_usd, call.output_usd = item.prompt_usd, item.output_usd
    call.matched_model, call.price_source = item.matched_model, item.price_source


def trace_cost(calls: Sequence[LlmCall]) -> TraceCost:
    """呼び出しのコストを、トレース 1 件分にまとめる。"""
    known = [call for call in calls if not call.total_usd.is_nan()]
    by_model: dict[str, Decimal] = {}
    for call in known:
        by_model[call.model] = by_model.get(call.model, _ZERO) + call.total_usd
    kinds = {"priced" if call.priced else call.status for call in calls} or {"priced"}
    mixed = len(kinds) > 1 and not kinds.isdisjoint(("priced", "partial"))
    return TraceCost(
        total_usd=sum(by_model.values(), _ZERO),
        by_model=by_model,
        unpriced_models=tuple(dict.fromkeys(c.model for c in calls if c.status == "unpriced")),
        calls_without_usage=sum(call.status == "missing_usage" for call in calls),
        status="partial" if mixed else max(kinds),  # missing_usage より unpriced を先に伝える
        reasons=tuple(dict.fromkeys(f"{c.model}: {c.reason}" for c in calls if not c.priced)),
        prompt_usd=sum((call.prompt_usd for call in known), _ZERO),
        output_usd=sum((call.output_usd for call in known), _ZERO),
    )
