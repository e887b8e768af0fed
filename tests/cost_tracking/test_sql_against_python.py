"""10 本の SQL の答えが、SQL を使わない計算(plain_costs)と、難しい行ばかりの表で等しい。"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from math import isclose
from pathlib import Path
from typing import Any

import pytest

from chapter8_samples.cost_tracking.__main__ import find_queries
from chapter8_samples.cost_tracking.archive.sql import (
    ResultTable,
    cost_parameters,
    run_on_duckdb,
    run_on_spark,
)

from .conftest import edge_rows, span, trace_row, write_archive
from .plain_costs import answers
from .test_cost_sql import needs_spark

START = datetime(2026, 10, 1, tzinfo=timezone.utc)
END = datetime(2028, 3, 5, tzinfo=timezone.utc)
AS_OF = datetime(2028, 2, 29, 3, 34, 56, 789000, tzinfo=timezone.utc)
BUDGET, ZONE = "1234567.8901", "Asia/Tokyo"

WEIGHTS = [
    None, "1", "10", "100", "1000000", "1e6", "3.3333333333333335", "1.0101010101010102",
    "999999.99", " 10 ", "", "ten", "NaN", "Infinity", "-Infinity", "-2", "0", "-0.0",
    "1e400", "1e7", "1,000",
]  # fmt: skip
USD = [0, 1.6e-06, 0.30000000000000004, 0.0075, 1, 100, 12345.678901234567, 999999.9999999999, 1e6]
COSTS = [
    None, "{not json", "null", "[]", "", '{"total_cost": null}', '{"total_cost": "abc"}', "{}",
    '{"total_cost": NaN}', '{"total_cost": true}', '{"total_cost": "0.25"}', '{"total_cost": -0.5}',
]  # fmt: skip
USAGES = [
    None, "null", "{not json", "{}", '{"input_tokens": 1e3, "output_tokens": 5.0}',
    '{"input_tokens": 128955, "output_tokens": 0, "cache_read_input_tokens": 100000}',
    '{"input_tokens": null, "output_tokens": 7}', '{"input_tokens": "90", "output_tokens": "x"}',
    '{"input_tokens": 999999999999, "output_tokens": 1}',
]  # fmt: skip
MODELS = [
    None, "null", "gpt-4o", '"gpt-4o"', '"gpt-4o', '"\U0001f600 モデル"', '"it\'s \\"quoted\\""',
    "''", '"a/b:c@d#1"', '""', "123", '"x; DROP TABLE t; --"', '" "', '"' + "長" * 300 + '"',
]  # fmt: skip
PEOPLE = [
    None,
    "u1",
    "利用者\U0001f600",
    "O'Brien",
    '"q"',
    "",
    "--",
    "%s $1 :tz",
    "\u0000x",
    "é",
    "é",
]
TIMES = [
    "2028-02-28T14:59:59.999999", "2028-02-28T15:00:00", "2028-02-29T00:00:00",
    "2028-02-29T03:34:56", "2028-02-29T03:34:56.789000",
    "2028-02-29T14:59:59.999999", "2028-02-29T15:00:00", "2028-01-31T14:59:59.999999",
    "2028-01-31T15:00:00", "2027-12-31T15:00:00", "2028-03-04T23:59:59",
]  # fmt: skip


def hard_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """難しい値を、くじで組み合わせた行。20 行に 1 行は、同じ行が 2 度入る。"""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        usd = rng.choice([*USD, rng.random(), rng.uniform(0, 1e6)])
        cost = json.dumps({"total_cost": usd}) if rng.random() < 0.8 else rng.choice(COSTS)
        at = datetime.fromisoformat(rng.choice(TIMES)).replace(tzinfo=timezone.utc)
        status = rng.choice([None, None, "priced", "unpriced", "partial", "missing_usage"])
        weight = rng.choice([*WEIGHTS, repr(1 / rng.uniform(1e-6, 1))])
        row = trace_row(
            number,
            at - timedelta(days=rng.choice([0, 0, 7, 300])),
            cost,
            rng.choice(USAGES),
            state=rng.choice(["OK", "ERROR", "IN_PROGRESS"]),
            user=rng.choice(PEOPLE),
            session=rng.choice([*PEOPLE, f"s{rng.randrange(20)}"]),
            weight=weight,
            status=status,
            spans=hard_spans(rng),
        )
        row["tags"][0] = ("mlflow.traceName", rng.choice(["chat", "\U0001f600", "rag's", "few"]))
        row["tags"] += [("cost.total_usd", "0.0075")] if rng.random() < 0.1 else []
        row["execution_duration_ms"] = Decimal(rng.choice([-5, 0, 10**9]))
        rows += [row, row] if rng.random() < 0.05 else [row]
    return rows


def hard_spans(rng: random.Random) -> list[dict[str, Any]]:
    """親子の鎖。使用量、料金、印は、どのスパンにもあったりなかったりする。"""
    spans: list[dict[str, Any]] = []
    for number in range(rng.randrange(5)):
        usd, status = rng.choice([None, *USD]), rng.choice([None, "priced", "unpriced", "partial"])
        used = rng.choice([None, 80, 1000])
        parent = rng.choice([None, *(s["span_id"] for s in spans)])
        spans.append(span(f"s{number}", parent, None, usd, used, status))
        if (model := rng.choice(MODELS)) is not None:
            spans[-1]["attributes"].append(("mlflow.llm.model", model))
        if status == "partial" and rng.random() < 0.5:
            spans[-1]["attributes"].append(("cost.reason", '"no price for audio"'))
    return spans


def outliers() -> list[dict[str, Any]]:
    """名前ごとの件数と、1 件だけ高いトレース。見つかるのは 15 件から。"""
    rows: list[dict[str, Any]] = []
    for count, times in ((14, 1e6), (15, 21.1), (15, 20.9), (21, 3.1), (40, 2.9), (40, 30)):
        for number in range(count):
            usd = 0.01 * (times if number == 0 else 1)
            row = trace_row(len(rows), START, json.dumps({"total_cost": usd}))
            row["tags"][0] = ("mlflow.traceName", f"{count} x {times}")
            rows.append(row)
    return rows


def most_expensive() -> list[dict[str, Any]]:
    """C1: 1 件 100 万ドル、重み 100 万まで。"""

    def row(number: int, usd: float, weight: str) -> dict[str, Any]:
        call = span("s", None, '"gpt-4o"', usd, 10**6, "priced")
        usage = json.dumps({"input_tokens": 10**6, "output_tokens": 10**6})
        cost = json.dumps({"total_cost": usd})
        return trace_row(number, AS_OF - timedelta(hours=number), cost, usage,
                         weight=weight, state="ERROR", spans=[call])  # fmt: skip

    amounts = [
        (1.0, "100"), (100.0, "1"), (1e6, "1000000"), (1e6, "3.3333333333333335"),
        (0.30000000000000004, "1000000"), (999999.9999999999, "999999.9999999999"),
    ]  # fmt: skip
    return [row(number, *amount) for number, amount in enumerate(amounts)]


def free() -> list[dict[str, Any]]:
    call = span("s", None, '"local"', 0, 10, "priced")
    return [trace_row(1, AS_OF - timedelta(1), '{"total_cost": 0}', "{}", spans=[call])]


ARCHIVES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "edge": edge_rows,
    "hard": lambda: hard_rows(600, seed=14),
    "harder": lambda: hard_rows(600, seed=15),
    "outliers": outliers,
    "expensive": most_expensive,
    "free": free,
    "empty": list,
}


def same(actual: Any, expected: Any) -> bool:
    """USD は 1e-6 の位まで等しい。割り算の結果は DOUBLE なので、その精度まで。"""
    if isinstance(expected, Fraction) and isinstance(actual, Decimal):
        return round(actual, 6) == Decimal(round(expected * 10**6)).scaleb(-6)
    if isinstance(expected, (float, Fraction)):
        return actual is not None and isclose(actual, expected, rel_tol=1e-13, abs_tol=5e-7)
    if isinstance(expected, date):
        return str(actual) == str(expected)
    return actual == expected


def differences(table: ResultTable, expected: list[dict[str, Any]]) -> list[str]:
    """SQL と違うところ。"""
    name, rows = table.query.name, [dict(zip(table.columns, r, strict=True)) for r in table.rows]
    if len(rows) != len(expected):
        return [f"{name}: {len(rows)} rows, expected {len(expected)}"]
    return [
        f"{name}[{number}].{key}: {row[key]!r}, expected {value!r}"
        for number, (row, wanted) in enumerate(zip(rows, expected, strict=True))
        for key, value in (dict.fromkeys(row) | wanted).items()
        if not same(row.get(key), value)
    ]


def check(run: Callable[..., list[ResultTable]], path: Path, rows: list[dict[str, Any]]) -> None:
    parameters = cost_parameters(START, END, as_of=AS_OF, tz=ZONE, monthly_budget_usd=BUDGET)
    expected = answers(rows, START, END, AS_OF, BUDGET, ZONE)
    tables = run(write_archive(path, rows), list(find_queries().values()), parameters)
    assert len(tables) == 10
    assert [d for t in tables for d in differences(t, expected[t.query.name])] == []


@pytest.mark.parametrize("name", ARCHIVES)
def test_duckdb_answers_like_plain_python(tmp_path: Path, name: str) -> None:
    check(run_on_duckdb, tmp_path / "rows.parquet", ARCHIVES[name]())


@pytest.mark.slow
@pytest.mark.timeout(600)
@needs_spark
def test_spark_answers_like_plain_python(tmp_path: Path) -> None:
    for name, rows in ARCHIVES.items():
        check(run_on_spark, tmp_path / f"{name}.parquet", rows())
