"""8.2 コスト分析の SQL を手元で実行する(表8.1)。

cost_analysis.sql は Databricks SQL にそのまま貼れる。手元では同じ SQL を、埋め込み型の DuckDB か
PySpark で実行する。SQL の文字列に値を埋め込むことはせず、すべて名前付きパラメーターで渡す。

Databricks では、SQL エディターに貼り付けるか ``spark.sql(query.sql, args=parameters)`` で実行する。

>>> text = "-- name: count\\n-- 件数。\\nSELECT COUNT(*) FROM IDENTIFIER(:trace_table);"
>>> queries = read_queries(text)
>>> queries["count"].description, queries["count"].used({"trace_table": "t", "tz": "UTC"})
('件数。', {'trace_table': 't'})
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from .extras import extra

TABLE = "archived_traces"
_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_PARAMETER = re.compile(r"(?<![:\w]):([a-z_]+)\b")
_TABLE_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+){0,2}")
# DuckDB にない関数を、Databricks SQL と同じ意味で用意する
_DUCKDB_PRELUDE = (
    "SET TimeZone='UTC'",
    "CREATE MACRO get_json_object(j, p) AS"
    " CASE WHEN json_valid(j) THEN json_extract_string(j, p) END",
    "CREATE MACRO convert_timezone(tz, ts) AS CAST(ts AS TIMESTAMPTZ) AT TIME ZONE tz",
    "CREATE MACRO unix_timestamp(ts) AS CAST(floor(epoch(ts)) AS BIGINT)",
    "CREATE MACRO explode(x) AS unnest(x)",
)


class SqlRunnerError(ValueError):
    """クエリの名前、パラメーター、入力の場所や中身のいずれかが正しくない。"""


@dataclass(frozen=True, slots=True)
class Query:
    """SQL ファイルの中の 1 つ。``description`` は直前のコメント。"""

    name: str
    sql: str
    description: str

    def used(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """このクエリに出てくるパラメーターだけを選ぶ。"""
        names = set(_PARAMETER.findall(_without_comments(self.sql)))
        return {key: value for key, value in parameters.items() if key in names}


@dataclass(frozen=True, slots=True)
class ResultTable:
    """1 つのクエリの結果。"""

    query: Query
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def read_queries(text: str) -> dict[str, Query]:
    """SQL ファイルの中身を ``-- name:`` の印で分ける。"""
    parts = _NAME.split(text)
    names, bodies = parts[1::2], parts[2::2]
    return {name: _query(name, body) for name, body in zip(names, bodies, strict=True)}


def _query(name: str, body: str) -> Query:
    lines = body.strip().splitlines()
    notes = [line.removeprefix("--").strip() for line in lines if line.startswith("--")]
    return Query(name, body.strip().rstrip(";"), "".join(notes))


def _without_comments(sql: str) -> str:
    return re.sub(r"--[^\n]*", "", sql)


def cost_parameters(
    start: datetime,
    end: datetime,
    *,
    as_of: datetime | None = None,
    tz: str = "Asia/Tokyo",
    monthly_budget_usd: float | Decimal | str = 100,
    trace_table: str = TABLE,
) -> dict[str, Any]:
    """クエリに渡すパラメーター。時刻はタイムゾーン付きで渡し、UTC の文字列に直す。

    Raises:
        SqlRunnerError: 表の名前が ``catalog.schema.table`` の形でない、時刻に時間帯がない、
            時間帯の名前がない、または予算が正の数でない。
    """
    if not _TABLE_NAME.fullmatch(trace_table):
        raise SqlRunnerError(f"trace_table must be catalog.schema.table, got {trace_table!r}")
    return {
        "trace_table": trace_table,
        "start_time": _utc_text("start", start),
        "end_time": _utc_text("end", end),
        "as_of": _utc_text("as_of", as_of or end),
        "tz": time_zone(tz).key,
        "monthly_budget_usd": _budget_text(monthly_budget_usd),
    }


def time_zone(tz: str) -> ZoneInfo:
    """名前の時間帯。なければ ``SqlRunnerError``。"""
    try:
        return ZoneInfo(tz)
    except (LookupError, ValueError, OSError) as error:
        raise SqlRunnerError(f"tz={tz!r} is not a time zone like Asia/Tokyo ({error})") from error


def _budget_text(usd: float | Decimal | str) -> str:
    try:
        budget = Decimal(str(usd))
    except InvalidOperation:
        budget = Decimal("NaN")
    if not budget.is_finite() or round(budget, 4) <= 0:  # SQL では小数点以下 4 桁
        raise SqlRunnerError(f"monthly_budget_usd must be a number > 0, got {usd!r}")
    return f"{budget:f}"


def _utc_text(name: str, at: datetime) -> str:
    if at.tzinfo is None:
        raise SqlRunnerError(f"{name}={at!r} has no time zone; use datetime(..., tzinfo=...)")
    return f"{at.astimezone(timezone.utc).replace(tzinfo=None):%Y-%m-%d %H:%M:%S.%f}"


def run_on_duckdb(
    parquet: str | Path, queries: Sequence[Query], parameters: Mapping[str, Any]
) -> list[ResultTable]:
    """Parquet(ファイルか、書き出し先のフォルダー)に DuckDB で問い合わせる。通信はしない。

    Raises:
        SqlRunnerError: Parquet がないか、アーカイブの形でない。
        MissingDependencyError: duckdb がない。
    """
    with extra("sql"):
        import duckdb
    offline: dict[str, Any] = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
    }
    with duckdb.connect(config=offline) as connection:
        for statement in _DUCKDB_PRELUDE:
            connection.execute(statement)
        try:
            source = connection.read_parquet(_parquet_files(parquet), hive_partitioning=False)
            source.create_view(TABLE)
            return [_duckdb_table(connection, query, parameters) for query in queries]
        except duckdb.Error as error:
            raise SqlRunnerError(f"cannot query {parquet}: {error}") from error


def _duckdb_table(connection: Any, query: Query, parameters: Mapping[str, Any]) -> ResultTable:
    sql = _without_comments(query.sql).replace("IDENTIFIER(:trace_table)", TABLE)
    used = {k: v for k, v in query.used(parameters).items() if k != "trace_table"}
    cursor = connection.execute(_PARAMETER.sub(r"$\1", sql), used)
    return ResultTable(query, tuple(c[0] for c in cursor.description), cursor.fetchall())


def run_on_spark(
    parquet: str | Path, queries: Sequence[Query], parameters: Mapping[str, Any]
) -> list[ResultTable]:
    """同じことを PySpark で行う。SQL は 1 文字も変えない。Java 17 が要る。"""
    with extra("spark"):
        from pyspark.sql import SparkSession
    builder: Any = SparkSession.builder.master("local[2]")
    for key, value in _SPARK_SETTINGS.items():
        builder = builder.config(key, value)
    spark = builder.getOrCreate()
    try:
        spark.read.parquet(*_parquet_files(parquet)).createOrReplaceTempView(TABLE)
        return [_spark_table(spark, query, parameters) for query in queries]
    finally:
        spark.stop()


_SPARK_SETTINGS = {
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.shuffle.partitions": "8",
    "spark.driver.memory": "2g",
    "spark.driver.host": "127.0.0.1",
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}


def _spark_table(spark: Any, query: Query, parameters: Mapping[str, Any]) -> ResultTable:
    frame = spark.sql(query.sql, args=query.used({**parameters, "trace_table": TABLE}))
    return ResultTable(query, tuple(frame.columns), [tuple(row) for row in frame.collect()])


def _parquet_files(path: str | Path) -> list[str]:
    path = Path(path)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise SqlRunnerError(f"no Parquet file at {path}; run export_traces_to_parquet() first")
    return [str(file) for file in files]
