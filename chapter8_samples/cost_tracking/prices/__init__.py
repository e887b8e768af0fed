"""8.2.3 モデルの料金: 行、名前、料金表、料金表のファイル、よその料金の取り込み。"""

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
    "Match",
    "ModelPrice",
    "NoPriceError",
    "PriceNotEffectiveError",
    "PriceTable",
    "PriceTableError",
    "PriceTier",
    "Rates",
    "UnknownModelError",
]
