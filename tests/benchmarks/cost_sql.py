"""コスト分析の 10 本の SQL を、合成したアーカイブで測る。

実行::

    $ python tests/benchmarks/cost_sql.py --rows 1000000

``--spark`` を付けると PySpark でも測り、結果が等しいことを確かめる(Java 17 が要る)。
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from bench_report import Headline, best_seconds, print_table, version_of  # noqa: E402

CHUNK = 50_000


def test_module(name: str) -> Any:
    """tests/cost_tracking のファイル。合成データと結果の比べ方は、テストと同じものを使う。"""
    path = ROOT / "tests" / "cost_tracking" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"cost_{name}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_rows(path: Path, count: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from chapter8_samples.cost_tracking.archive.parquet import archive_schema

    rows, schema = iter(test_module("conftest").synthetic_rows(count)), archive_schema()
    with pq.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(rows, CHUNK)):
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))


def seconds_per_query(path: Path, repeat: int) -> dict[str, float]:
    """クエリの名前 -> 秒。"""
    from chapter8_samples.cost_tracking.__main__ import find_queries
    from chapter8_samples.cost_tracking.archive import sql as sql_runner

    archive = test_module("conftest")
    parameters = sql_runner.cost_parameters(archive.START, archive.END)

    def seconds(query: Any) -> float:
        return best_seconds(lambda: sql_runner.run_on_duckdb(path, [query], parameters), repeat)

    return {query.name: seconds(query) for query in find_queries().values()}


def same_on_spark(path: Path) -> list[bool]:
    """クエリごとに、DuckDB と PySpark の結果が等しいか。"""
    from chapter8_samples.cost_tracking.__main__ import find_queries
    from chapter8_samples.cost_tracking.archive import sql as sql_runner

    archive = test_module("conftest")
    parameters = sql_runner.cost_parameters(archive.START, archive.END)
    queries = list(find_queries().values())
    ours = sql_runner.run_on_duckdb(path, queries, parameters)
    theirs = sql_runner.run_on_spark(path, queries, parameters)
    return [archive.normal(a) == archive.normal(b) for a, b in zip(ours, theirs, strict=True)]


def headline(quick: bool) -> list[Headline]:
    """1 本のクエリの時間。"""
    count = 300 if quick else 100_000
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traces.parquet"
        write_rows(path, count)
        named = seconds_per_query(path, 1 if quick else 3)
        show(path, count, named)
    found = named.values()
    return [
        Headline(
            f"コスト分析の SQL {len(found)} 本(DuckDB、{count:,} 行)",
            f"1 本 {min(found):.3f} 秒から {max(found):.3f} 秒、合計 {sum(found):.2f} 秒",
            "-",
        )
    ]


def show(path: Path, count: int, found: dict[str, float]) -> None:
    """クエリごとの表を出す。"""
    size = path.stat().st_size / 1e6
    title = f"SQL {count:,} 行({size:.1f} MB)、DuckDB {version_of('duckdb')}"
    rows = [[name, f"{seconds:.3f}"] for name, seconds in found.items()]
    print_table(title, ("クエリ", "秒"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--spark", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "traces.parquet"
        write_rows(path, options.rows)
        show(path, options.rows, seconds_per_query(path, options.repeat))
        if options.spark:
            same = same_on_spark(path)
            print(f"PySpark {version_of('pyspark')} と等しい結果: {sum(same)} / {len(same)}")


if __name__ == "__main__":
    main()
