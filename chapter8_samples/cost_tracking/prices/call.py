"""8.2.3 1 回の呼び出し: トークン数の検査と、コストの内訳(本書にリストなし)。"""

from __future__ import annotations

from decimal import Decimal
from operator import index
from typing import Literal, NamedTuple

from .model import CostError

_NAN = Decimal("NaN")
_NAMES = ("input", "output", "cached_input", "cache_write", "cache_write_1h")
_STANDARD_TIERS = ("", "default", "standard", "auto", "on_demand")
Usage = tuple[int, int, int, int, int]  # _NAMES の順のトークン数


class InvalidUsageError(CostError):
    """トークン数がありえない値(負、真偽値、小数、入力より多いキャッシュ)。"""


class PriceBreakdown(NamedTuple):
    """1 回の呼び出しのコストの内訳。金額はすべて USD の ``Decimal``。

    料金が決まらなかったとき(``status="unpriced"``)の金額は NaN で、訳は ``reason`` にある。
    0 ではないので、合計に混ぜれば合計も NaN になり、見落とせない。トレースから読んだ呼び出しには、
    決まった分だけの ``"partial"``、報告のない ``"missing_usage"``、無料の ``"cache_hit"`` もある。
    """

    model: str
    status: Literal["priced", "unpriced", "partial", "missing_usage", "cache_hit"]
    input_tokens: int
    output_tokens: int
    service_tier: str = ""
    input_usd: Decimal = _NAN
    cached_input_usd: Decimal = _NAN
    cache_write_usd: Decimal = _NAN
    output_usd: Decimal = _NAN
    matched_model: str = ""
    match_kind: str = ""
    price_source: str = ""
    reason: str = ""

    @property
    def prompt_usd(self) -> Decimal:
        """入力側の合計(通常 + キャッシュ読み込み + キャッシュ書き込み)。"""
        return self.input_usd + self.cached_input_usd + self.cache_write_usd

    @property
    def total_usd(self) -> Decimal:
        """入力側と出力の合計。"""
        return self.prompt_usd + self.output_usd

    @property
    def priced(self) -> bool:
        """すべてのトークンの料金が決まったか。"""
        return self.status in ("priced", "cache_hit")


def checked_usage(*counts: int) -> Usage:
    """トークン数を調べる。numpy の整数は、Python の整数に直す。

    Raises:
        InvalidUsageError: 整数でないか負の数、または入力より多いキャッシュ。
    """
    for count in counts:
        if type(count) is not int or count < 0:
            counts = tuple(map(_count, counts, _NAMES))
            break
    total, output, read, write, write_1h = counts
    if read + write > total:
        raise InvalidUsageError(
            f"cached_input_tokens + cache_write_tokens ({read} + {write}) exceeds input_tokens "
            f"({total}); input_tokens must include cached tokens"
        )
    if write_1h > write:
        raise InvalidUsageError(
            f"cache_write_1h_tokens ({write_1h}) exceeds cache_write_tokens ({write})"
        )
    return total, output, read, write, write_1h


def checked_tier(service_tier: str | None, batch: bool) -> str:
    """料金表でのサービスティアの名前。``""`` は標準。``batch`` と食い違えば例外。"""
    name = (service_tier or "").strip().lower()
    if name in _STANDARD_TIERS:
        name = ""
    if batch and name not in ("", "batch"):
        raise InvalidUsageError(f"batch=True and service_tier={service_tier!r} contradict")
    return "batch" if batch else name


def _count(value: int, name: str) -> int:
    try:
        count = -1 if isinstance(value, bool) else index(value)
    except TypeError:
        count = -1
    if count < 0:
        raise InvalidUsageError(f"{name}_tokens must be an integer >= 0, got {value!r}")
    return count
