"""8.2 SQL の結果を、表、CSV、グラフ(SVG)にする(本書にリストなし)。

コストの報告を読むのは、SQL を書く人だけではない。画像にすれば、そのままチャットや資料に貼れる。
描画ライブラリーは要らない。SVG はブラウザーで開ける。

実行::

    $ python chapter8_samples/02_cost_tracking/sql_report.py
          model  calls  cost_usd
         gpt-4o     40      1.52
    gpt-4o-mini    310     0.087
     社内モデル     12         -
    cost-by_model.svg: 棒 3 本
    cost-daily_summary.svg: 点 7 個

Databricks の SQL エディターには表とグラフの機能がある。この結果と同じものがそこでも描ける。
"""

from __future__ import annotations

import csv
import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol
from xml.sax.saxutils import escape

VALUE_COLUMNS = ("cost_usd", "spent_usd", "wasted_usd", "usd_per_mtok")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # Excel が式とみなす始まり
_INK, _BAR, _PAPER = "#333333", "#2f6fb0", "#ffffff"
_ROW, _HEAD, _EDGE, _WIDE = 24, 44, 16, 420  # 行の高さ、見出し、余白、値を描く幅(px)


class NamedQuery(Protocol):
    """``sql_runner.Query``、または名前を持つもの。"""

    @property
    def name(self) -> str: ...


class Table(Protocol):
    """``sql_runner.ResultTable``、または列と行を持つもの。"""

    @property
    def query(self) -> NamedQuery: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def rows(self) -> list[tuple[Any, ...]]: ...


def format_table(table: Table, limit: int | None = None) -> str:
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
    return "".join(c for c in str(value) if c.isprintable())  # 制御文字は端末と XML を壊す


def printable(text: str, encoding: str | None) -> str:
    """その文字コードで表せない文字(Windows の cp932 での絵文字など)を ``?`` にする。"""
    return text.encode(encoding or "utf-8", "replace").decode(encoding or "utf-8")


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "FWA" else 1 for c in text)


def write_csv(table: Table, directory: str | Path) -> Path:
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


def write_svg(table: Table, path: str | Path) -> Path:
    """結果の金額をグラフにする。日付が並ぶ結果は折れ線、ほかは棒。"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(chart_svg(table), encoding="utf-8")
    return path


def chart_svg(table: Table) -> str:
    """結果の 1 行を、1 本の棒(``class="bar"``)か 1 つの点(``class="point"``)にした SVG。

    横軸の名前は最初の列、値は ``VALUE_COLUMNS`` のうち最初に見つかった列。どれもなければ最後の列。
    値のない行は「-」と書き、0 の行と見分けられるようにする。
    """
    named = [table.columns.index(name) for name in VALUE_COLUMNS if name in table.columns]
    column = named[0] if named else len(table.columns) - 1
    marks = [(row[0], _number(row[column])) for row in table.rows]
    title = f"{table.query.name}: {table.columns[column]}"
    if marks and isinstance(marks[0][0], date):
        return _lines(title, sorted(marks, key=lambda mark: mark[0]))
    return _bars(title, [(_cell(label), value) for label, value in marks])


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _scale(marks: Sequence[tuple[Any, float | None]]) -> float:
    return max((abs(value) for _, value in marks if value), default=1.0)


def _bars(title: str, marks: Sequence[tuple[str, float | None]]) -> str:
    left = _EDGE + 8 * max((_width(label) for label, _ in marks), default=0) + 8
    scale = _WIDE / _scale(marks)
    parts: list[str] = []
    for i, (label, value) in enumerate(marks):
        top, length = _HEAD + i * _ROW, abs(value or 0) * scale
        parts += [
            _text(left - 8, top + 15, label, "end"),
            f'<rect class="bar" x="{left}" y="{top}" width="{length:.1f}" height="18"'
            f' fill="{_BAR}"/>',
            _text(left + length + 6, top + 15, _cell(value)),
        ]
    return _document(title, left + _WIDE + 110, _HEAD + len(marks) * _ROW + _EDGE, parts)


def _lines(title: str, marks: Sequence[tuple[date, float | None]]) -> str:
    left, bottom, step = _EDGE + 80, _HEAD + 200, max(_WIDE / max(len(marks) - 1, 1), 4)
    scale = 180 / _scale(marks)
    xs = [left + i * step for i in range(len(marks))]
    ys = [bottom - (value or 0) * scale for _, value in marks]
    parts = [f'<path d="{_path(xs, ys, marks)}" fill="none" stroke="{_BAR}" stroke-width="2"/>']
    for x, y, (day, value) in zip(xs, ys, marks, strict=True):
        fill = _BAR if value is not None else _PAPER  # 値のない日は、中の白い点
        parts.append(
            f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}"'
            f' stroke="{_BAR}"><title>{_cell(day)} {_cell(value)}</title></circle>'
        )
    parts += [_text(left - 8, bottom, "0", "end")]
    parts += [_text(left - 8, bottom - 175, f"{_scale(marks):.6g}", "end")]
    ends = ((xs[0], marks[0][0], "start"), (xs[-1], marks[-1][0], "end"))
    parts += [_text(x, bottom + 24, _cell(day), anchor) for x, day, anchor in ends[: len(marks)]]
    return _document(title, xs[-1] + 60, bottom + 40, parts)


def _path(
    xs: Sequence[float], ys: Sequence[float], marks: Sequence[tuple[Any, float | None]]
) -> str:
    """値のない日で線を切る。つないでしまうと、その日にも値があったように見える。"""
    words: list[str] = []
    pen = "M"
    for x, y, (_, value) in zip(xs, ys, marks, strict=True):
        if value is None:
            pen = "M"
            continue
        words.append(f"{pen}{x:.1f},{y:.1f}")
        pen = "L"
    return " ".join(words)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{_INK}">{escape(text)}</text>'
    )


def _document(title: str, width: float, height: float, parts: Sequence[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}"'
        ' font-family="sans-serif" font-size="13">'
    )
    paper = f'<rect width="100%" height="100%" fill="{_PAPER}"/>'
    return "\n".join([head, paper, _text(_EDGE, 26, title), *parts, "</svg>", ""])


@dataclass(frozen=True)
class _Named:
    name: str


@dataclass(frozen=True)
class _Example:
    query: _Named
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def main() -> None:
    from chapter8_samples import _lab

    models = [("gpt-4o", 40, 1.52), ("gpt-4o-mini", 310, 0.087), ("社内モデル", 12, None)]
    by_model = _Example(_Named("by_model"), ("model", "calls", "cost_usd"), [*models])
    days = [(date(2024, 12, 7) - timedelta(days=i), 0.2 + 0.03 * i) for i in range(7)]
    daily = _Example(_Named("daily_summary"), ("day", "cost_usd"), [*days])
    print(format_table(by_model))
    with _lab.sample(None) as lab:
        for table, mark in ((by_model, "棒 {} 本"), (daily, "点 {} 個")):
            path = write_svg(table, lab.home / f"cost-{table.query.name}.svg")
            text = path.read_text(encoding="utf-8")
            count = text.count('class="bar"') + text.count('class="point"')
            print(f"{path.name}: {mark.format(count)}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # インストールなしでも動くように
    main()
