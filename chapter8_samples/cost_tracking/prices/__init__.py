"""8.2.3 モデルの料金: 行、名前、料金表、料金表のファイル、今の料金の取り込み、1 回の呼び出し。"""

from .call import InvalidUsageError, PriceBreakdown, PriceOptions, Usage, checked_usage
from .model import (
    IMPORT_COMMAND,
    CostError,
    ModelPrice,
    NoPriceError,
    PriceNotEffectiveError,
    PriceTableError,
    PriceTier,
    Rates,
    UnknownModelError,
)
from .table import Match, PriceTable

__all__ = [
    "IMPORT_COMMAND",
    "CostError",
    "InvalidUsageError",
    "Match",
    "ModelPrice",
    "NoPriceError",
    "PriceBreakdown",
    "PriceNotEffectiveError",
    "PriceOptions",
    "PriceTable",
    "PriceTableError",
    "PriceTier",
    "Rates",
    "UnknownModelError",
    "Usage",
    "checked_usage",
]
