"""8.2.3 コストを集計し、予算を見張る(本書にリストなし)。

請求は月末に届くが、暴走は数分で起きる。プロセスの中で合計を持ち、予算の何割かで知らせる。
履歴は持たないのでメモリーは増えず、料金の決まらない呼び出しは 0 円に混ぜず別に数える。

ここでの合計はプロセス 1 つの分である。サービス全体の合計は、Databricks でも OSS の MLflow でも、
トレースから cost_analysis.sql の ``budget`` で求める。
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Protocol

logger = logging.getLogger(__name__)

_ZERO = Decimal(0)
OTHER = "(other)"  # 上限を超えたモデルやユーザーは、ここへまとめて数える


class PricedCall(Protocol):
    """1 回の呼び出しのコスト(``PriceBreakdown`` など)。"""

    @property
    def model(self) -> str: ...
    @property
    def matched_model(self) -> str: ...
    @property
    def input_tokens(self) -> int: ...
    @property
    def output_tokens(self) -> int: ...
    @property
    def total_usd(self) -> Decimal: ...
    @property
    def priced(self) -> bool: ...


class Calculator(Protocol):
    """``record`` が使う計算器(``CostCalculator`` など)。"""

    def price(
        self,
        model: str,
        input_tokens: int,
        output_tokens: int,
        cached_input_tokens: int = 0,
        *,
        cache_write_tokens: int = 0,
        at: date | datetime | None = None,
        batch: bool = False,
    ) -> PricedCall: ...


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
        self.requests += 1
        self.input_tokens += item.input_tokens
        self.output_tokens += item.output_tokens
        if item.priced:
            self.cost_usd += item.total_usd
        else:
            self.unpriced_requests += 1

    def copy(self) -> CostTotals:
        """写し。"""
        return CostTotals(*(getattr(self, name) for name in self.__slots__))


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
        return float(self.total.cost_usd / self.budget_usd) if self.budget_usd else None


@dataclass(slots=True)
class _State:
    total: CostTotals = field(default_factory=CostTotals)
    by_model: dict[str, CostTotals] = field(default_factory=dict[str, CostTotals])
    by_user: dict[str, CostTotals] = field(default_factory=dict[str, CostTotals])
    crossed: list[float] = field(default_factory=list[float])
    callback_failures: int = 0


class BaseCostTracker:
    """コストを集計し、予算の割合に達したら一度だけ知らせる。スレッド間で共有してよい。

    覚えるのは合計だけで、履歴は持たない。モデルとユーザーの種類が ``max_keys`` を超えた分は
    ``"(other)"`` にまとめるので、動かし続けてもメモリーは増えない。

    Args:
        budget_usd: 予算(USD)。``None`` なら知らせない。
        on_budget: しきい値を初めて超えたときに ``BudgetAlert`` を渡して呼ぶ。例外は記録して続ける。
        thresholds: 知らせる割合。0.5 は 50%。
        calculator: ``record`` が使う計算器。未知のモデルで例外を出さないものを渡す。
    """

    def __init__(
        self,
        budget_usd: float | Decimal | None = None,
        on_budget: Callable[[BudgetAlert], object] | None = None,
        thresholds: Sequence[float] = (0.5, 0.8, 1.0),
        *,
        calculator: Calculator,
        max_keys: int = 10_000,
    ) -> None:
        self.budget_usd = None if budget_usd is None else Decimal(str(budget_usd))
        if budget_usd is not None and not budget_usd > 0:
            raise ValueError(f"budget_usd must be > 0, got {budget_usd!r}")
        self.on_budget = on_budget
        if wrong := [share for share in thresholds if not 0 < share < 10]:  # 80 は 80% ではない
            raise ValueError(f"thresholds must be like 0.8 for 80%, got {wrong[0]!r}")
        self.thresholds = tuple(sorted(thresholds))
        self.calculator = calculator
        self.max_keys = max_keys
        self._lock = threading.Lock()
        self._state = _State()

    def record(
        self,
        model: str,
        input_tokens: int,
        output_tokens: int,
        cached_input_tokens: int = 0,
        *,
        cache_write_tokens: int = 0,
        user: str | None = None,
        at: date | datetime | None = None,
        batch: bool = False,
    ) -> PricedCall:
        """1 回の呼び出しを計算して足す。引数は ``CostCalculator.calculate`` と同じ。"""
        item = self.calculator.price(
            model,
            input_tokens,
            output_tokens,
            cached_input_tokens,
            cache_write_tokens=cache_write_tokens,
            at=at,
            batch=batch,
        )
        self.add(item, user=user)
        return item

    def add(self, item: PricedCall, *, user: str | None = None) -> None:
        """計算済みの内訳を足す。"""
        with self._lock:
            state = self._state
            state.total.add(item)
            self._bucket(state.by_model, item.matched_model or item.model).add(item)
            self._bucket(state.by_user, user or "(unknown)").add(item)
            alerts = self._newly_crossed(state)
        for alert in alerts:  # 通知先が遅くても、ほかのスレッドの記録を待たせない
            self._notify(state, alert)

    def snapshot(self) -> CostSnapshot:
        """合計の写し。ほかのスレッドが記録している最中でも、途中の値は見えない。"""
        with self._lock:
            return self._freeze(self._state)

    def reset(self) -> CostSnapshot:
        """0 に戻し、直前までの合計を返す。間に入った記録が失われることはない。"""
        with self._lock:
            last, self._state = self._freeze(self._state), _State()
            return last

    def _bucket(self, buckets: dict[str, CostTotals], key: str) -> CostTotals:
        if key not in buckets and len(buckets) >= self.max_keys:
            key = OTHER
        return buckets.setdefault(key, CostTotals())

    def _newly_crossed(self, state: _State) -> list[BudgetAlert]:
        if self.budget_usd is None:
            return []
        spent = state.total.cost_usd
        new = [
            t
            for t in self.thresholds
            if t not in state.crossed and spent >= self.budget_usd * Decimal(str(t))
        ]
        state.crossed += new
        return [BudgetAlert(t, spent, self.budget_usd) for t in new]

    def _notify(self, state: _State, alert: BudgetAlert) -> None:
        if self.on_budget is None:
            return
        try:
            self.on_budget(alert)
        except Exception:  # 通知先の不具合で、ユーザーへの応答を止めない
            logger.exception("budget callback failed at threshold %s", alert.threshold)
            with self._lock:
                state.callback_failures += 1

    def _freeze(self, state: _State) -> CostSnapshot:
        return CostSnapshot(
            total=state.total.copy(),
            by_model={key: value.copy() for key, value in state.by_model.items()},
            by_user={key: value.copy() for key, value in state.by_user.items()},
            budget_usd=self.budget_usd,
            thresholds_crossed=tuple(state.crossed),
            callback_failures=state.callback_failures,
        )
