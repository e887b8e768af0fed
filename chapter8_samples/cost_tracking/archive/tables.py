"""8.2 SQL の結果を、端末の表と CSV にする(本書にリストなし)。

Databricks では SQL エディターが表を描く。ここは手元で実行したときのためにある。
"""

from __future__ import annotations

import csv
import unicodedata
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

from .sql import ResultTable

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # Excel が式とみなす始まり


def format_table(table: ResultTable, limit: int | None = None) -> str:
    """結果を、全角文字の幅もそろえた表にする。``limit`` は表示する行数。"""
    shown = table.rows if limit is None else table.rows[:limit]
    cells = [list(table.columns), *([_cell(value) for value in row] for row in shown)]
    widths = [max(_width(row[i]) for row in cells) for i in range(len(table.columns))]
    lines = [
        "  ".join(" " * (w - _width(text)) + text for text, w in zip(row, widths, strict=True))
        for row in cells
    ]
    hidden = len(table.rows) - len(shown)
    return "\n".join([*lines, *([f"(ほか {hidden} 行)"] if hidden else [])])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, (Decimal, float)):
        text = f"{value:.8f}".rstrip("0").rstrip(".")
        return text or "0"
    return "".join(c for c in str(value) if c.isprintable())  # 制御文字は端末を壊す


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "FWA" else 1 for c in text)


def printable(text: str, encoding: str | None) -> str:
    """その文字コードで表せない文字(Windows の cp932 での絵文字など)を ``?`` にする。"""
    return text.encode(encoding or "utf-8", "replace").decode(encoding or "utf-8")


def write_csv(table: ResultTable, directory: str | Path) -> Path:
    """結果を ``<directory>/<クエリ名>.csv`` に書く(Excel で開ける BOM 付き UTF-8)。"""
    path = Path(directory) / f"{table.query.name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table.columns)
        writer.writerows([_not_a_formula(value) for value in row] for row in table.rows)
    return path


def _not_a_formula(value: Any) -> Any:
    """Excel は = などで始まる文字を式として実行する。外から来る名前を、ただの文字に留める。"""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
