"""8.2.3 コストを集計し、予算を監視する(本書にリストなし)。

請求は月末に届くが、暴走は数分で起きる。プロセスの中で合計を持ち、予算の何割かで知らせる。
料金の決まらない呼び出しは 0 円に混ぜず、別に数えて、同じ通知先へ知らせる。

ここでの合計はプロセス 1 つの分である。サービス全体の合計は、Databricks でも OSS の MLflow でも、
トレースから cost_analysis.sql の ``budget`` で求める。呼び出しを止めたいなら、``mlflow server`` の
AI Gateway に予算のポリシーがある(MLflow 3.17)。全体、ワークスペース、エンドポイント、ユーザーの
どれかに期間ごとの USD の上限を決め、超えたら webhook で知らせる(ALERT)か 429 で拒否する(REJECT)。
数えるのは Gateway を通った呼び出しだけで、MLflow が料金を知らないモデルは 0 円になる。
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from decimal import Decimal
from math import inf
from time import monotonic
from typing import Any, Protocol

from .prices.call import PriceBreakdown

logger = logging.getLogger(__name__)

OTHER = "(other)"  # 種類が上限を超えたら、新しいモデルはここへまとめて数える
_MAX_MODELS = 10_000
_RETRY_SECONDS = 60  # 通知先が止まっていても、呼び出しのたびに待たせない
_NOTICES = tuple(10**power for power in range(19))  # 未計算が 1、10、100 ... 件になったら知らせる


class Calculator(Protocol):
    """``CostCalculator``、または同じ ``price`` を持つもの。"""

    @property
    def price(self) -> Callable[..., PriceBreakdown]: ...


@dataclass(slots=True)
class CostTotals:
    """件数、トークン数、USD の合計。``unpriced_requests`` は、料金の決まりきらない呼び出し。"""

    requests: int = 0
    unpriced_requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: Decimal = Decimal(0)

    def add(self, item: PriceBreakdown) -> None:
        """1 回分を足す。"""
        self.requests += 1
        self.input_tokens += item.input_tokens
        self.output_tokens += item.output_tokens
        if not item.priced:
            self.unpriced_requests += 1
        if not item.total_usd.is_nan():  # 一部だけ料金の決まった呼び出しは、決まった分を足す
            self.cost_usd += item.total_usd


@dataclass(frozen=True, slots=True)
class BudgetAlert:
    """予算の何割に達したか(0.8 なら 80%)。0.0 は、料金の決まらない呼び出しがあるという知らせ。

    ``unpriced_requests`` が 0 でなければ、``spent_usd`` (USD) は下限になる。
    """

    threshold: float
    spent_usd: Decimal
    budget_usd: Decimal
    unpriced_requests: int = 0


@dataclass(slots=True)
class CostSnapshot:
    """ある瞬間の合計のコピー。``by_model`` の合計は、必ず ``total`` と一致する。"""

    budget_usd: Decimal | None
    total: CostTotals = field(default_factory=CostTotals)
    by_model: dict[str, CostTotals] = field(default_factory=dict[str, CostTotals])

    @property
    def budget_used(self) -> float | None:
        """予算に対する割合(0.8 = 80%)。未計算があれば下限。予算がなければ ``None``。"""
        return float(self.total.cost_usd / self.budget_usd) if self.budget_usd else None


class BaseCostTracker:
    """コストを集計し、予算の割合に達したら一度だけ知らせる。スレッド間で共有してよい。

    覚えるのは合計だけで、履歴は持たない。モデルの種類が多すぎれば ``"(other)"`` にまとめるので、
    動かし続けてもメモリーは増えない。

    Args:
        budget_usd: 前の ``reset`` からの合計への予算。月の予算なら、毎月の初めに ``reset`` を呼ぶ。
        on_budget: しきい値を初めて超えたときと、未計算の呼び出しが 1、10、100 ... 件になったときに
            ``BudgetAlert`` を渡して呼ぶ。同じことをログにも残す。例外は記録して続け、しきい値なら
            60 秒より後の記録で知らせ直す。
        calculator: ``record`` が使う計算器。渡すなら、未知のモデルで例外を出さないもの。
    """

    def __init__(
        self,
        budget_usd: float | Decimal | None = None,
        on_budget: Callable[[BudgetAlert], object] | None = None,
        thresholds: Sequence[float] = (0.5, 0.8, 1.0),
        *,
        calculator: Calculator | None = None,
    ) -> None:
        if budget_usd is not None and not budget_usd > 0:
            raise ValueError(f"budget_usd must be > 0, got {budget_usd!r}")
        for share in thresholds:
            if not 0 < share < 10:  # 80 は 80% ではない
                raise ValueError(f"thresholds must be like 0.8 for 80%, got {share!r}")
        self.budget_usd = None if budget_usd is None else Decimal(str(budget_usd))
        self.on_budget = on_budget
        self.thresholds = tuple(sorted(thresholds))
        self.calculator: Calculator = calculator or self.default_calculator()
        self._lock = threading.Lock()
        self._now = CostSnapshot(self.budget_usd)
        self._next_at: dict[float, float] = {}  # しきい値を、次に知らせてよい時刻

    def default_calculator(self) -> Calculator:
        """``calculator`` を渡さないときの計算器。"""
        raise TypeError("pass calculator=, or use CostTracker")

    def record(
        self,
        model: str,
        input_tokens: int,
        output_tokens: int,
        cached_input_tokens: int = 0,
        **options: Any,
    ) -> PriceBreakdown:
        """1 回の呼び出しを計算して足す。引数は ``CostCalculator.price`` と同じ。"""
        item = self.calculator.price(
            model, input_tokens, output_tokens, cached_input_tokens, **options
        )
        self.add(item)
        return item

    def add(self, item: PriceBreakdown) -> None:
        """計算済みの内訳を足す。"""
        model = item.matched_model or item.model
        with self._lock:
            by_model = self._now.by_model
            if model not in by_model and len(by_model) >= _MAX_MODELS:
                model = OTHER
            by_model.setdefault(model, CostTotals()).add(item)
            self._now.total.add(item)
            alerts = self._new_alerts(item)
        for alert in alerts:  # 通知先が遅くても、ほかのスレッドの記録を待たせない
            self._notify(alert, item.model)

    def snapshot(self) -> CostSnapshot:
        """合計のコピー。ほかのスレッドが記録している最中でも、途中の値は見えない。"""
        with self._lock:
            return deepcopy(self._now)

    def reset(self) -> CostSnapshot:
        """0 に戻し、直前までの合計を返す。間に入った記録が失われることはない。"""
        with self._lock:
            last, self._now = self._now, CostSnapshot(self.budget_usd)
            self._next_at.clear()
        return last

    def _new_alerts(self, item: PriceBreakdown) -> list[BudgetAlert]:
        budget, total = self.budget_usd, self._now.total
        if budget is None:
            return []
        reached = [t for t in self.thresholds if total.cost_usd >= budget * Decimal(str(t))]
        new = [t for t in reached if self._next_at.get(t, 0) <= monotonic()]
        self._next_at.update(dict.fromkeys(new, inf))
        if not item.priced and total.unpriced_requests in _NOTICES:
            new.append(0.0)
        return [BudgetAlert(t, total.cost_usd, budget, total.unpriced_requests) for t in new]

    def _notify(self, alert: BudgetAlert, model: str) -> None:
        what = f"threshold {alert.threshold} reached" if alert.threshold else f"blind to {model!r}"
        logger.warning("budget %s: %s", what, alert)
        if self.on_budget is None:
            return
        try:
            self.on_budget(alert)
        except Exception:  # 通知先の不具合で、ユーザーへの応答を止めない
            logger.exception("budget callback failed at threshold %s", alert.threshold)
            with self._lock:
                self._next_at[alert.threshold] = monotonic() + _RETRY_SECONDS
