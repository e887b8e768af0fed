"""8.2.3 保存済みのトレースのコストを計算し直す(本書にリストなし)。"""

from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from mlflow.entities import Trace
from .trace_reader import Calculator

@dataclass(frozen=True, slots=True)
class TraceCost:
    """トレース 1 件のコスト。``complete`` が偽なら、``total_usd`` は下限でしかない。"""
    total_usd: Decimal
    by_model: dict[str, Decimal]
    unpriced_models: tuple[str, ...]
    calls_without_usage: int

    @property
    def complete(self) -> bool:
        """すべての呼び出しに料金が付いたか。"""

def price_trace(trace: Trace | str, calculator: Calculator | None=None, *, at: datetime | None=None) -> TraceCost:
    """保存済みのトレースを計算し直す。モデルの混在、入れ子、料金不明を正しく扱う。

    Args:
        calculator: 既定は 2024 年 12 月の公開料金。
        at: いつの料金か。``None`` は、それぞれの呼び出しが始まった日。

    Raises:
        TraceNotFoundError: ID のトレースがない。
        InvalidUsageError: 負の数など、ありえない使用量を持つスパンがある。
    """

def main() -> None:
    ...

def three_models() -> Trace:
    """3 つのモデルを 1 回ずつ呼んだトレース。1 つは料金表にない。"""
