"""8.2.3 モデルの料金: 行、料金表、料金表のファイル。標準ライブラリーだけで動く。"""

from .model import (
    CostError,
    ModelPrice,
    NoPriceError,
    PriceNotEffectiveError,
    PriceTableError,
    PriceTier,
    UnknownModelError,
)
from .table import Match, PriceTable

__all__ = [
    "CostError",
    "Match",
    "ModelPrice",
    "NoPriceError",
    "PriceNotEffectiveError",
    "PriceTable",
    "PriceTableError",
    "PriceTier",
    "UnknownModelError",
]
