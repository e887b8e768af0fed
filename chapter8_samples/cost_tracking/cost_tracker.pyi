"""8.2.3 コストを集計し、予算を見張る(本書にリストなし)。"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Protocol
logger = logging.getLogger(__name__)
_ZERO = Decimal(0)
OTHER = '(other)'

class PricedCall(Protocol):
    """1 回の呼び出しのコスト(``cost_calculator.PriceBreakdown`` など)。"""

    @property
    def model(self) -> str:
        ...

    @property
    def matched_model(self) -> str:
        ...

    @property
    def input_tokens(self) -> int:
        ...

    @property
    def output_tokens(self) -> int:
        ...

    @property
    def total_usd(self) -> Decimal:
        ...

    @property
    def priced(self) -> bool:
        ...

class Calculator(Protocol):
    """``record`` が使う計算器(``cost_calculator.CostCalculator`` など)。"""

    def price(self, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int=0, *, cache_write_tokens: int=0, at: date | datetime | None=None, batch: bool=False) -> PricedCall:
        ...

def _default_calculator() -> Calculator:
    ...

@dataclass(slots=True)
class CostTotals:
    """件数、トークン数、USD の合計。料金の決まらない呼び出しは ``unpriced_requests`` に分ける。"""
    requests: int = 0
    unpriced_requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: Decimal = _ZERO

    def add(self, item: PricedCall) -> None:
        """1 回分を足す。"""

    def copy(self) -> CostTotals:
        """写し。"""

@dataclass(frozen=True, slots=True)
class BudgetAlert:
    """予算の何割に達したか。``threshold`` は 0.8 なら 80%。金額は USD。"""
    threshold: float
    spent_usd: Decimal
    budget_usd: Decimal

@dataclass(frozen=True, slots=True)
class CostSnapshot:
    """ある瞬間の合計の写し。``by_model`` と ``by_user`` の合計は、必ず ``total`` と一致する。"""
    total: CostTotals
    by_model: dict[str, CostTotals]
    by_user: dict[str, CostTotals]
    budget_usd: Decimal | None
    thresholds_crossed: tuple[float, ...]
    callback_failures: int

    @property
    def budget_used(self) -> float | None:
        """予算に対する割合(0.8 = 80%)。予算がなければ ``None``。"""

@dataclass(slots=True)
class _State:
    total: CostTotals = field(default_factory=CostTotals)
    by_model: dict[str, CostTotals] = field(default_factory=dict[str, CostTotals])
    by_user: dict[str, CostTotals] = field(default_factory=dict[str, CostTotals])
    crossed: list[float] = field(default_factory=list[float])
    callback_failures: int = 0

class CostTracker:
    """コストを集計し、予算の割合に達したら一度だけ知らせる。スレッド間で共有してよい。

    覚えるのは合計だけで、履歴は持たない。モデルとユーザーの種類が ``max_keys`` を超えた分は
    ``"(other)"`` にまとめるので、動かし続けてもメモリーは増えない。

    Args:
        budget_usd: 予算(USD)。``None`` なら知らせない。
        on_budget: しきい値を初めて超えたときに ``BudgetAlert`` を渡して呼ぶ。例外は記録して続ける。
        thresholds: 知らせる割合。0.5 は 50%。
        calculator: ``record`` が使う計算器。既定は、未知のモデルを「未計算」に数えるもの。
    """

    def __init__(self, budget_usd: float | Decimal | None=None, on_budget: Callable[[BudgetAlert], object] | None=None, thresholds: Sequence[float]=(0.5, 0.8, 1.0), *, calculator: Calculator | None=None, max_keys: int=10000) -> None:
        self.budget_usd = None if budget_usd is None else Decimal(str(budget_usd))
        self.on_budget = on_budget
        self.thresholds = tuple(sorted(thresholds))
        self.calculator = calculator or _default_calculator()
        self.max_keys = max_keys
        self._lock = threading.Lock()
        self._state = _State()

    def record(self, model: str, input_tokens: int, output_tokens: int, cached_input_tokens: int=0, *, cache_write_tokens: int=0, user: str | None=None, at: date | datetime | None=None, batch: bool=False) -> PricedCall:
        """1 回の呼び出しを計算して足す。引数は ``CostCalculator.calculate`` と同じ。"""

    def add(self, item: PricedCall, *, user: str | None=None) -> None:
        """計算済みの内訳を足す。"""

    def snapshot(self) -> CostSnapshot:
        """合計の写し。ほかのスレッドが記録している最中でも、途中の値は見えない。"""

    def reset(self) -> CostSnapshot:
        """0 に戻し、直前までの合計を返す。間に入った記録が失われることはない。"""

    def _bucket(self, buckets: dict[str, CostTotals], key: str) -> CostTotals:
        ...

    def _newly_crossed(self, state: _State) -> list[BudgetAlert]:
        ...

    def _notify(self, state: _State, alert: BudgetAlert) -> None:
        ...

    def _freeze(self, state: _State) -> CostSnapshot:
        ...

def main() -> None:
    ...
