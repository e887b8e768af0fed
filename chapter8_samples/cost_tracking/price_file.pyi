"""8.2.3 自分の料金表を読み、誤りをまとめて報告する(本書にリストなし)。"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from .price_table import ModelPrice

def load_file(path: str | Path) -> Mapping[str, Any]:
    """JSON か YAML(拡張子 .yaml、.yml)のファイルを読む。数は 10 進数のまま読む。

    Raises:
        PriceTableError: JSON や YAML として読めないか、中身が辞書でない。
    """

def read_prices(data: Mapping[str, Any]) -> tuple[dict[str, tuple[ModelPrice, ...]], dict[str, str]]:
    """辞書を、料金の行と別名に直す。形は ``PriceTable.from_mapping`` の説明のとおり。

    Raises:
        PriceTableError: 誤りがある。``problems`` にすべて並ぶ。
    """

def main() -> None:
    ...
