"""8.3.4 採点を始める前の、費用の見積もり。"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal

from .registry import ScorerSetupError, check_sample_rate


def estimate_monthly_judge_cost(
    traffic: float,
    rates: Mapping[str, float],
    judge_price: tuple[float, float] | tuple[Decimal, Decimal] | float | Decimal = (0.40, 1.60),
    *,
    tokens_per_call: tuple[int, int] = (600, 60),
) -> float:
    """1 か月のトレースの数 ``traffic`` と割合から、ジャッジのコスト(USD / 月)を見積もる。

    ``judge_price`` は、入力と出力の単価(USD / 100 万トークン、``JudgePrice`` でもよい)か、ジャッジ
    1 回の額(USD)。既定は gpt-4.1-mini。
    """
    prices = judge_price if isinstance(judge_price, tuple) else (judge_price,)
    if not all(math.isfinite(n) and n >= 0 for n in (traffic, *prices, *tokens_per_call)):
        raise ScorerSetupError(
            "traffic, prices and tokens must be finite and not negative, "
            f"got {traffic}, {judge_price}, {tokens_per_call}"
        )
    calls = traffic * sum(check_sample_rate(name, rate) for name, rate in rates.items())
    if not isinstance(judge_price, tuple):
        return calls * float(judge_price)
    pairs = zip(judge_price, tokens_per_call, strict=True)
    return calls * sum(float(price) * tokens for price, tokens in pairs) / 1_000_000
