"""8.2 SQL の結果を、表、CSV、グラフ(SVG)にする(本書にリストなし)。"""

from pathlib import Path
from typing import Any, Protocol
VALUE_COLUMNS = ('cost_usd', 'spent_usd', 'wasted_usd', 'usd_per_mtok')

class NamedQuery(Protocol):
    """``sql_runner.Query``、または名前を持つもの。"""

    @property
    def name(self) -> str:
        ...

class Table(Protocol):
    """``sql_runner.ResultTable``、または列と行を持つもの。"""

    @property
    def query(self) -> NamedQuery:
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        ...

    @property
    def rows(self) -> list[tuple[Any, ...]]:
        ...

def format_table(table: Table, limit: int | None=None) -> str:
    """結果を、全角文字の幅もそろえた表にする。``limit`` は表示する行数。"""

def printable(text: str, encoding: str | None) -> str:
    """その文字コードで表せない文字(Windows の cp932 での絵文字など)を ``?`` にする。"""

def write_csv(table: Table, directory: str | Path) -> Path:
    """結果を ``<directory>/<クエリ名>.csv`` に書く(Excel で開ける BOM 付き UTF-8)。"""

def write_svg(table: Table, path: str | Path) -> Path:
    """結果の金額をグラフにする。日付が並ぶ結果は折れ線、ほかは棒。"""

def chart_svg(table: Table) -> str:
    """結果の 1 行を、1 本の棒(``class="bar"``)か 1 つの点(``class="point"``)にした SVG。

    横軸の名前は最初の列、値は ``VALUE_COLUMNS`` のうち最初に見つかった列。どれもなければ最後の列。
    値のない行は「-」と書き、0 の行と見分けられるようにする。
    """

def main() -> None:
    ...
