"""8.2 コスト分析の SQL を手元で実行する(表8.1)。"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
SQL_FILE = Path(__file__).with_name('cost_analysis.sql')
TABLE = 'archived_traces'

class SqlRunnerError(ValueError):
    """クエリの名前、パラメーター、入力の場所や中身のいずれかが正しくない。"""

@dataclass(frozen=True, slots=True)
class Query:
    """cost_analysis.sql の中の 1 つ。``description`` は直前のコメント。"""
    name: str
    sql: str
    description: str

    def used(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """このクエリに出てくるパラメーターだけを選ぶ。"""

@dataclass(frozen=True, slots=True)
class ResultTable:
    """1 つのクエリの結果。"""
    query: Query
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]

def load_queries(path: str | Path=SQL_FILE) -> dict[str, Query]:
    """SQL ファイルを ``-- name:`` の印で分ける。"""

def cost_parameters(start: datetime, end: datetime, *, as_of: datetime | None=None, tz: str='Asia/Tokyo', monthly_budget_usd: float | Decimal | str=100, trace_table: str=TABLE) -> dict[str, Any]:
    """クエリに渡すパラメーター。時刻はタイムゾーン付きで渡し、UTC の文字列に直す。

    Raises:
        SqlRunnerError: 表の名前が ``catalog.schema.table`` の形でない、時刻に時間帯がない、
            時間帯の名前がない、または予算が正の数でない。
    """

def run_on_duckdb(parquet: str | Path, queries: Sequence[Query], parameters: Mapping[str, Any]) -> list[ResultTable]:
    """Parquet(ファイルか、書き出し先のフォルダー)に DuckDB で問い合わせる。通信はしない。

    Raises:
        SqlRunnerError: Parquet がないか、アーカイブの形でない。
    """

def run_on_spark(parquet: str | Path, queries: Sequence[Query], parameters: Mapping[str, Any]) -> list[ResultTable]:
    """同じことを PySpark で行う。SQL は 1 文字も変えない。Java 17 が要る。"""
ENGINES: dict[str, Callable[..., list[ResultTable]]] = {'duckdb': run_on_duckdb, 'spark': run_on_spark}

def command(arguments: Sequence[str]) -> int:
    """``python -m chapter8_samples.cost_tracking.token_tracking sql`` の中身。終了コードを返す。"""

def main() -> None:
    ...
