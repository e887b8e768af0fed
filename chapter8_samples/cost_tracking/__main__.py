"""8.2 のコマンド: 今の料金の取り込み、コスト分析の SQL の実行、トレースの Parquet への書き出し。

``python -m chapter8_samples.cost_tracking sql エクスペリメント名`` のように使う。
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import unicodedata
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from . import __path__ as _FOLDERS  # 番号付きフォルダーも入っている
from .archive.sql import (
    Query,
    ResultTable,
    cost_parameters,
    read_queries,
    run_on_duckdb,
    run_on_spark,
)

ENGINES = {"duckdb": run_on_duckdb, "spark": run_on_spark}
# anomalies の 95 パーセンタイルは、15 件に満たないと、異常な 1 件そのものに引き上げられる
_TOO_FEW = Query(
    "too_few",
    """SELECT * FROM (
  SELECT COALESCE(tags['mlflow.traceName'], '(unnamed)') AS trace_name,
         COUNT(COALESCE(get_json_object(trace_metadata['mlflow.trace.cost'], '$.total_cost'),
                        tags['cost.total_usd'])) AS priced
  FROM IDENTIFIER(:trace_table)
  WHERE request_time >= CAST(:start_time AS TIMESTAMP)
    AND request_time < CAST(:end_time AS TIMESTAMP)
  GROUP BY tags['mlflow.traceName']
) x WHERE priced < 15 ORDER BY priced DESC, trace_name""",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """コマンドを実行し、終了コードを返す。0 は成功、1 は失敗、2 は使い方の誤り。"""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, LookupError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}", description="8.2 コストとトークンの追跡"
    )
    commands = parser.add_subparsers(required=True, metavar="{prices,sql,export}")
    _add_prices(commands)
    period = argparse.ArgumentParser(add_help=False)
    period.add_argument("--start", type=_day, help="この日から(--tz の 0 時)")
    period.add_argument("--end", type=_day, help="この日の手前まで(--tz の 0 時)。既定はいま")
    period.add_argument("--tz", default="Asia/Tokyo", help="日を区切る時間帯")

    sql = commands.add_parser(
        "sql",
        parents=[period],
        help="cost_analysis.sql を手元で実行する",
        description="cost_analysis.sql を手元で実行する。--start の既定は 30 日前。",
    )
    sql.add_argument("source", help="Parquet のファイルかフォルダー、またはエクスペリメントの名前")
    sql.add_argument("--query", action="append", help="クエリ名(複数可)。省略時は全部")
    sql.add_argument("--engine", choices=sorted(ENGINES), default="duckdb")
    sql.add_argument("--budget", default="100", help="月の予算(USD)")
    sql.set_defaults(run=_sql)

    export = commands.add_parser(
        "export",
        parents=[period],
        help="トレースを Parquet に書き出す",
        description="トレースを DIR/day=YYYY-MM-DD/traces.parquet に書き出す。日は UTC で区切る。",
    )
    export.add_argument("experiment", help="エクスペリメントの名前")
    export.add_argument("directory", metavar="DIR", help="書き出し先(次回は差分だけ)")
    export.set_defaults(run=_export)
    return parser


def _add_prices(commands: Any) -> None:
    prices = commands.add_parser("prices", help="今の料金を取り込む")
    actions = prices.add_subparsers(required=True, metavar="import")
    action = actions.add_parser(
        "import",
        help="今の料金を取り込む",
        description="入っているパッケージに同梱の料金を、pricing_file に渡せる形に直す。",
    )
    action.add_argument("source", help="genai-prices、litellm、またはどちらかの JSON のパス")
    action.add_argument("-o", "--output", default="prices.json", help="書き出し先(prices.json)")
    action.set_defaults(run=_import_prices)


def _import_prices(options: argparse.Namespace) -> int:
    from .prices.sources import import_prices  # ほかのコマンドに pydantic は要らない

    found = import_prices(options.source)
    found.write(options.output)
    print(f"{found.name} ({found.as_of}): {len(found.models)} モデルの料金 -> {options.output}")
    print("運べなかった単価(使われた呼び出しは、料金未定にする)")
    for what, models in found.left_out.items():
        more = "" if len(models) <= 2 else " ..."
        print(f"  {what}: {len(models)} モデル ({', '.join(models[:2])}{more})")
    return 0


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a date like 2026-11-01") from None


def find_queries() -> dict[str, Query]:
    """本書の cost_analysis.sql のクエリ。"""
    for folder in _FOLDERS:
        path = Path(folder, "cost_analysis.sql")
        if path.exists():
            return read_queries(path.read_text(encoding="utf-8"))
    raise LookupError(f"no cost_analysis.sql in {' or '.join(_FOLDERS)}")


def _sql(options: argparse.Namespace) -> int:
    queries = find_queries()
    unknown = [name for name in options.query or () if name not in queries]
    if unknown:
        print(f"unknown query {unknown[0]!r}; choose from {', '.join(queries)}", file=sys.stderr)
        return 2
    chosen = [queries[name] for name in options.query or queries]
    start, end = _period(options)
    end = end or datetime.now(timezone.utc)
    start = start or end - timedelta(days=30)
    last = end - timedelta(microseconds=1)  # --end が 1 日のとき、予算は前の月のものを見る
    parameters = cost_parameters(
        start, end, as_of=last, tz=options.tz, monthly_budget_usd=options.budget
    )
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(options.source)
        if not source.exists():
            source = Path(scratch)
            _export_for(options.source, source, start, end)
        *tables, few = ENGINES[options.engine](source, [*chosen, _TOO_FEW], parameters)
    if reconfigure := getattr(sys.stdout, "reconfigure", None):  # ノートブックにはない
        reconfigure(errors="replace")  # Windows の cp932 で表せない絵文字などは ? にする
    for table in tables:
        print(f"== {table.query.name}: {table.query.description}")
        print(format_table(table))
        if table.query.name == "anomalies" and few.rows:
            print(_few_samples(few))
        print()
    return 0


def _few_samples(few: ResultTable) -> str:
    names = "、".join(f"{_cell(name)}({count} 件)" for name, count in few.rows[:5])
    more = f"、ほか {len(few.rows) - 5} 個" if len(few.rows) > 5 else ""
    return f"注意: コストの分かるトレースが 15 件に満たない名前では見つからない: {names}{more}"


def _export_for(experiment: str, directory: Path, start: datetime, end: datetime) -> None:
    from .archive.parquet import export_traces_to_parquet  # Parquet を読むだけなら要らない

    month = end - timedelta(days=32)  # budget は、期間より前でも月の初めから読む
    export_traces_to_parquet(experiment, directory, min(start, month), end)


def _period(options: argparse.Namespace) -> tuple[datetime | None, datetime | None]:
    """日の始まり。結果の日と同じ時間帯で区切り、最初と最後の日が欠けないようにする。"""
    try:
        zone = ZoneInfo(options.tz)
    except (LookupError, ValueError, OSError) as error:
        raise ValueError(f"tz={options.tz!r} is not a time zone like Asia/Tokyo") from error
    start, end = options.start, options.end
    return (
        datetime.combine(start, time(), zone) if start else None,
        datetime.combine(end, time(), zone) if end else None,
    )


def _export(options: argparse.Namespace) -> int:
    from .archive.parquet import export_traces_to_parquet

    result = export_traces_to_parquet(options.experiment, options.directory, *_period(options))
    print(f"書いた件数 {result.traces}、飛ばした日 {result.days_skipped}")
    if result.traces_without_spans:
        print(f"スパンなしで書いたトレース {result.traces_without_spans}")
    return 0


def format_table(table: ResultTable) -> str:
    """結果を、全角文字の幅もそろえた表にする。"""
    cells = [table.columns, *(tuple(map(_cell, row)) for row in table.rows)]
    widths = [max(map(_width, column)) for column in zip(*cells, strict=True)]
    lines: list[str] = []
    for row in cells:
        padded = [" " * (w - _width(text)) + text for text, w in zip(row, widths, strict=True)]
        lines.append("  ".join(padded))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, (Decimal, float)):
        return f"{value:.8f}".rstrip("0").rstrip(".")
    return "".join(c for c in str(value) if c.isprintable())  # 制御文字は端末を壊す


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "FWA" else 1 for c in text)


if __name__ == "__main__":
    raise SystemExit(main())
