"""8.2 のコマンド: 今の料金の取り込み、コスト分析の SQL の実行、トレースの Parquet への書き出し。

``python -m chapter8_samples.cost_tracking sql エクスペリメント名`` のように使う。
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import date, datetime, time, timedelta, timezone
from pathlib import Path
from typing import Any

from . import __path__ as _FOLDERS  # 番号付きフォルダーも入っている
from .archive.sql import (
    Query,
    cost_parameters,
    read_queries,
    run_on_duckdb,
    run_on_spark,
    time_zone,
)
from .archive.tables import format_table, printable, write_csv

ENGINES = {"duckdb": run_on_duckdb, "spark": run_on_spark}


def main(arguments: Sequence[str] | None = None) -> int:
    """コマンドを実行し、終了コードを返す。0 は成功、1 は失敗、2 は使い方の誤り。"""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (ValueError, LookupError, ImportError) as error:
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
    sql.add_argument("source", help="Parquet のファイルかフォルダー、またはエクスペリメント名")
    sql.add_argument("--query", action="append", help="クエリ名(複数可)。省略時は全部")
    sql.add_argument("--engine", choices=sorted(ENGINES), default="duckdb")
    sql.add_argument("--budget", default="100", help="月の予算(USD)")
    sql.add_argument("--limit", type=int, help="表示する行数")
    sql.add_argument("--csv", metavar="DIR", help="結果を CSV でも保存するフォルダー")
    sql.add_argument("--archive", metavar="DIR", help="書き出しを残すフォルダー(次回は差分だけ)")
    sql.set_defaults(run=_sql)

    export = commands.add_parser(
        "export",
        parents=[period],
        help="トレースを Parquet に書き出す",
        description="トレースを DIR/day=YYYY-MM-DD/traces.parquet に書き出す。日は UTC で区切る。",
    )
    export.add_argument("experiment", help="エクスペリメント名")
    export.add_argument("directory", metavar="DIR", help="書き出し先(次回は差分だけ)")
    export.add_argument("--no-spans", action="store_true", help="スパンを書かない(速い)")
    export.add_argument("--content", action="store_true", help="入力と出力も書く(個人情報に注意)")
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
    with tempfile.TemporaryDirectory() as scratch:
        parameters = _parameters(options)
        source = _source(options, Path(scratch))
        tables = ENGINES[options.engine](source, chosen, parameters)
    for table in tables:
        print(f"== {table.query.name}: {table.query.description}")
        print(printable(format_table(table, options.limit), sys.stdout.encoding) + "\n")
        if options.csv:
            write_csv(table, options.csv)
    return 0


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    end = _midnight(options.end, options.tz) or datetime.now(timezone.utc)
    start = _midnight(options.start, options.tz) or end - timedelta(days=30)
    last = end - timedelta(microseconds=1)  # --end が 1 日のとき、予算は前の月のものを見る
    budget = options.budget
    return cost_parameters(start, end, as_of=last, tz=options.tz, monthly_budget_usd=budget)


def _midnight(day: date | None, tz: str) -> datetime | None:
    """日の始まり。結果の日と同じ時間帯で区切り、最初と最後の日が欠けないようにする。"""
    return datetime.combine(day, time(), time_zone(tz)) if day else None


def _source(options: argparse.Namespace, scratch: Path) -> Path:
    """Parquet ならそのまま、エクスペリメント名なら書き出してから使う。"""
    if Path(options.source).exists():
        return Path(options.source)
    from .archive.parquet import (
        export_traces_to_parquet,  # Parquet を読むだけなら MLflow は要らない
    )

    target = Path(options.archive) if options.archive else scratch
    period = (_midnight(options.start, options.tz), _midnight(options.end, options.tz))
    export_traces_to_parquet(options.source, target, *period)
    return target


def _export(options: argparse.Namespace) -> int:
    from .archive.parquet import export_traces_to_parquet

    result = export_traces_to_parquet(
        options.experiment,
        options.directory,
        _midnight(options.start, options.tz),
        _midnight(options.end, options.tz),
        include_spans=not options.no_spans,
        include_content=options.content,
        progress=lambda day: print(f"{day.day}: {'済み' if day.skipped else f'{day.traces} 件'}"),
    )
    print(f"書いた件数 {result.traces}、飛ばした日 {result.days_skipped}")
    if result.traces_without_spans:
        print(f"スパンなしで書いたトレース {result.traces_without_spans}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
