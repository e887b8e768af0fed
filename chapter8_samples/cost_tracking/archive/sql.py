"""8.2 コスト分析の SQL を、手元の DuckDB か PySpark で実行する(表8.1)。

値は SQL の文字列に埋め込まず、すべて名前付きパラメーターで渡す。Databricks では、SQL エディターに
貼り付けるか ``spark.sql(query.sql, args=parameters)`` で実行する。
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

from . import extra

TABLE = "archived_traces"
_PARAMETER = re.compile(r"(?<![:\w]):([a-z_]+)\b")
# 通信はしない。DuckDB にない関数を、Databricks SQL と同じ意味で用意する
_DUCKDB_SETUP = """
SET autoinstall_known_extensions = false; SET autoload_known_extensions = false;
SET TimeZone = 'UTC';
CREATE MACRO get_json_object(j, p) AS TRY(json_extract_string(j, p));
CREATE MACRO convert_timezone(tz, ts) AS CAST(ts AS TIMESTAMPTZ) AT TIME ZONE tz;
CREATE MACRO unix_micros(ts) AS epoch_us(ts);
CREATE MACRO explode(x) AS unnest(x);
"""
_SPARK_SETTINGS = (
    ("spark.sql.session.timeZone", "UTC"), ("spark.sql.shuffle.partitions", "8"),
    ("spark.driver.memory", "2g"), ("spark.driver.host", "127.0.0.1"),
    ("spark.driver.bindAddress", "127.0.0.1"), ("spark.ui.enabled", "false"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Query:
    """SQL ファイルの中の 1 つ。``description`` は、その中のコメント。"""

    name: str
    sql: str
    description: str = ""

    def used(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """このクエリに出てくるパラメーターだけを選ぶ。"""
        names = _PARAMETER.findall(self.sql)
        return {name: value for name, value in parameters.items() if name in names}


@dataclass(frozen=True, slots=True)
class ResultTable:
    """1 つのクエリの結果。"""

    query: Query
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def read_queries(text: str) -> dict[str, Query]:
    """SQL ファイルの中身を ``-- name:`` の印で分ける。"""
    found: dict[str, Query] = {}
    for part in re.split(r"^-- name: ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        notes = "\n".join(re.findall(r"^-- *(.*)\n", body, re.MULTILINE))
        found[name] = Query(name, re.sub(r"--.*", "", body).strip().rstrip(";"), notes)
    return found


def cost_parameters(
    start: datetime,
    end: datetime,
    *,
    as_of: datetime | None = None,
    tz: str = "Asia/Tokyo",
    monthly_budget_usd: float | Decimal | str = 100,
    trace_table: str = TABLE,
) -> dict[str, Any]:
    """クエリに渡すパラメーター。時刻は UTC の文字列に直す。誤りは ``ValueError``。"""
    if not re.fullmatch(r"\w+(\.\w+){0,2}", trace_table, re.ASCII):
        raise ValueError(f"trace_table must be catalog.schema.table, got {trace_table!r}")
    return {
        "trace_table": trace_table,
        "start_time": _utc_text("start", start),
        "end_time": _utc_text("end", end),
        "as_of": _utc_text("as_of", as_of or end),
        "tz": tz,
        "monthly_budget_usd": _budget_text(monthly_budget_usd),
    }


def _budget_text(usd: float | Decimal | str) -> str:
    try:
        if round(Decimal(str(usd)), 4) > 0:  # SQL では小数点以下 4 桁
            return f"{Decimal(str(usd)):f}"
    except ArithmeticError:  # 数でない、NaN、無限大
        pass
    raise ValueError(f"monthly_budget_usd must be a number > 0, got {usd!r}")


def _utc_text(name: str, at: datetime) -> str:
    if at.tzinfo is None:
        raise ValueError(f"{name}={at!r} has no time zone; use datetime(..., tzinfo=...)")
    return f"{at.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S.%f}"


def run_on_duckdb(
    parquet: str | Path, queries: Sequence[Query], parameters: Mapping[str, Any]
) -> list[ResultTable]:
    """Parquet(ファイルか、書き出し先のフォルダー)に DuckDB で問い合わせる。通信はしない。"""
    with extra("sql"):
        import duckdb
    found: list[ResultTable] = []
    with duckdb.connect() as connection:
        try:
            connection.execute(_DUCKDB_SETUP)
            source = connection.read_parquet(_parquet_files(parquet), hive_partitioning=False)
            source.create_view(TABLE)
            for query in queries:
                sql = query.sql.replace("IDENTIFIER(:trace_table)", TABLE)
                values = {k: v for k, v in query.used(parameters).items() if k != "trace_table"}
                cursor = connection.execute(_PARAMETER.sub(r"$\1", sql), values)
                columns = tuple(column[0] for column in cursor.description)
                found.append(ResultTable(query, columns, cursor.fetchall()))
        except duckdb.Error as error:
            raise ValueError(f"cannot query {parquet}: {error}") from error
    return found


def run_on_spark(
    parquet: str | Path, queries: Sequence[Query], parameters: Mapping[str, Any]
) -> list[ResultTable]:
    """同じことを PySpark で行う。SQL は 1 文字も変えない。Java 17 が要る。"""
    with extra("spark"):
        from pyspark.sql import SparkSession
    builder: Any = SparkSession.builder.master("local[2]")
    for key, value in _SPARK_SETTINGS:
        builder = builder.config(key, value)
    spark, found = builder.getOrCreate(), []
    try:
        spark.read.parquet(*_parquet_files(parquet)).createOrReplaceTempView(TABLE)
        for query in queries:
            frame = spark.sql(query.sql, query.used({**parameters, "trace_table": TABLE}))
            rows = [tuple(row) for row in frame.collect()]
            found.append(ResultTable(query, tuple(frame.columns), rows))
    finally:
        spark.stop()
    return found


def _parquet_files(path: str | Path) -> list[str]:
    path = Path(path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise ValueError(f"no Parquet file at {path}; run export_traces_to_parquet() first")
    return [str(file) for file in files]
