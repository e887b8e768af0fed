"""8.2 コスト分析の SQL を手元で実行する(表8.1)。

cost_analysis.sql は Databricks SQL にそのまま貼れる。手元では同じファイルを、埋め込み型の DuckDB か
PySpark で実行する。SQL の文字列に値を埋め込むことはせず、すべて名前付きパラメーターで渡す。

Databricks では、SQL エディターに貼り付けるか ``spark.sql(query.sql, args=parameters)`` で実行する。
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal, InvalidOperation
from importlib import import_module
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from ..sql_report import format_table, printable, write_csv, write_svg

SQL_FILE = Path(__file__).with_name("cost_analysis.sql")
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
    """cost_analysis.sql の中の 1 つ。``description`` は直前のコメント。"""

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


def load_queries(path: str | Path = SQL_FILE) -> dict[str, Query]:
    """SQL ファイルを ``-- name:`` の印で分ける。"""
    parts = _NAME.split(Path(path).read_text(encoding="utf-8"))
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
        "tz": _zone(tz).key,
        "monthly_budget_usd": _budget_text(monthly_budget_usd),
    }


def _zone(tz: str) -> ZoneInfo:
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
    """
    duckdb = _require("duckdb")
    offline = {"autoinstall_known_extensions": "false", "autoload_known_extensions": "false"}
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
    builder = _require("pyspark.sql").SparkSession.builder.master("local[2]")
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


def _require(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        extra = "spark" if module.startswith("pyspark") else "sql"
        raise ImportError(
            f'{module} is not installed; run: pip install "chapter8-samples[{extra}]"'
        ) from error


ENGINES: dict[str, Callable[..., list[ResultTable]]] = {
    "duckdb": run_on_duckdb,
    "spark": run_on_spark,
}


def command(arguments: Sequence[str]) -> int:
    """``python -m chapter8_samples.cost_tracking.token_tracking sql`` の中身。終了コードを返す。"""
    options = _parser().parse_args(arguments)
    queries = load_queries()
    unknown = [name for name in options.query or () if name not in queries]
    if unknown:
        print(f"unknown query {unknown[0]!r}; choose from {', '.join(queries)}", file=sys.stderr)
        return 2
    chosen = [queries[name] for name in options.query or queries]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            parameters = _parameters(options)
            source = _source(options, Path(scratch))
            tables = ENGINES[options.engine](source, chosen, parameters)
        except (ValueError, LookupError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    for table in tables:
        print(f"== {table.query.name}: {table.query.description}")
        print(printable(format_table(table, options.limit), sys.stdout.encoding) + "\n")
        if options.csv:
            write_csv(table, options.csv)
        if options.plot:
            print(f"-> {write_svg(table, _plot_path(options.plot, table, len(tables)))}\n")
    return 0


def _plot_path(path: Path, table: ResultTable, count: int) -> Path:
    """クエリが 2 つ以上なら、ファイル名にクエリ名を足す。"""
    return path if count == 1 else path.with_name(f"{path.stem}-{table.query.name}.svg")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="token_tracking sql", description="コスト分析の SQL")
    parser.add_argument("source", help="Parquet のファイルかフォルダー、またはエクスペリメント名")
    parser.add_argument("--query", action="append", help="クエリ名(複数可)。省略時は全部")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="duckdb")
    parser.add_argument("--start", type=_day, help="この日から(--tz の 0 時)。既定は 30 日前")
    parser.add_argument("--end", type=_day, help="この日の手前まで(--tz の 0 時)。既定はいま")
    parser.add_argument("--tz", default="Asia/Tokyo", help="日を区切る時間帯")
    parser.add_argument("--budget", default="100", help="月の予算(USD)")
    parser.add_argument("--limit", type=int, help="表示する行数")
    parser.add_argument("--csv", metavar="DIR", help="結果を CSV でも保存するフォルダー")
    parser.add_argument("--plot", metavar="FILE.svg", type=Path, help="結果をグラフにも描く")
    parser.add_argument("--archive", metavar="DIR", help="書き出しを残すフォルダー(次回は差分だけ)")
    return parser


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date like 2026-11-01") from None


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    end = _midnight(options.end, options.tz) or datetime.now(timezone.utc)
    start = _midnight(options.start, options.tz) or end - timedelta(days=30)
    last = end - timedelta(microseconds=1)  # --end が 1 日のとき、予算は前の月のものを見る
    budget = options.budget
    return cost_parameters(start, end, as_of=last, tz=options.tz, monthly_budget_usd=budget)


def _midnight(day: date | None, tz: str) -> datetime | None:
    """日の始まり。結果の日と同じ時間帯で区切り、最初と最後の日が欠けないようにする。"""
    return datetime.combine(day, time(), _zone(tz)) if day else None


def _source(options: argparse.Namespace, scratch: Path) -> Path:
    """Parquet ならそのまま、エクスペリメント名なら書き出してから使う。"""
    if Path(options.source).exists():
        return Path(options.source)
    sibling = ".trace_archive" if __package__ else "trace_archive"
    archive = import_module(sibling, __package__)
    target = Path(options.archive) if options.archive else scratch
    period = (_midnight(options.start, options.tz), _midnight(options.end, options.tz))
    archive.export_traces_to_parquet(options.source, target, *period)
    return target


def main() -> None:
    if sys.argv[1:]:
        raise SystemExit(command(sys.argv[1:]))
    from chapter8_samples import _lab

    with _lab.sample("ch8-cost-sql") as lab:
        _record_two_weeks()
        sibling = ".trace_archive" if __package__ else "trace_archive"
        archive = import_module(sibling, __package__)
        target = lab.home / "archive" / str(lab.experiment_id)
        exported = archive.export_traces_to_parquet("ch8-cost-sql", target)
        print(f"{exported.traces} 件のトレースを Parquet に書き出した")
        end = datetime(2024, 12, 15, tzinfo=timezone.utc)
        parameters = cost_parameters(end - timedelta(days=14), end, monthly_budget_usd=1)
        for table in run_on_duckdb(target, list(load_queries().values()), parameters):
            print(f"== {table.query.name}")
            print(format_table(table, limit=3))


def _record_two_weeks() -> None:
    """2024-12-01 から 14 日分。モデルの混在、失敗、未知のモデル、間引き、桁違いの 1 件を含む。"""
    import mlflow

    costs = import_module(".trace_costs" if __package__ else "trace_costs", __package__)
    tracking = costs.setup_cost_tracking()
    models = ("gpt-4o-mini-2024-07-18", "gpt-4o-2024-08-06", "gpt-4o-mini-2024-07-18", "my-model")
    for i in range(84):
        at = datetime(2024, 12, 1, tzinfo=timezone.utc) + timedelta(hours=4 * i)
        start = int(at.timestamp() * 1e9)
        long_input = 200 if i == 50 else 1
        usage = {"input_tokens": 1000 * long_input, "output_tokens": 100 + i}
        usage["total_tokens"] = sum(usage.values())
        root = mlflow.start_span_no_context(
            "answer",
            start_time_ns=start,
            metadata={
                "mlflow.trace.user": f"利用者{i % 5}",
                "mlflow.trace.session": f"session-{i // 3}",
                "sampling.weight": "10" if i % 7 == 0 else "1",
            },
        )
        call = mlflow.start_span_no_context(
            "Completions", "CHAT_MODEL", parent_span=root, start_time_ns=start
        )
        model = models[1] if long_input > 1 else models[i % 4]
        call.set_attributes({"mlflow.llm.model": model, "mlflow.chat.tokenUsage": usage})
        call.end(end_time_ns=start + 900_000_000)
        root.end(end_time_ns=start + 10**9, status="ERROR" if i % 20 == 5 else "OK")
    tracking.uninstall()
    mlflow.flush_trace_async_logging()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # インストールなしでも動くように
    main()
