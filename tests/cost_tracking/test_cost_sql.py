"""cost_analysis.sql: 難しい行での正しさと、2 つのエンジンの一致。"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from chapter8_samples.cost_tracking import __main__ as commands
from chapter8_samples.cost_tracking.__main__ import find_queries
from chapter8_samples.cost_tracking.__main__ import main as command
from chapter8_samples.cost_tracking.archive.sql import (
    cost_parameters,
    run_on_duckdb,
    run_on_spark,
)

from .conftest import normal, span, tokens, usd

ROOT = Path(__file__).resolve().parents[2]
START = datetime(2026, 10, 1, tzinfo=timezone.utc)
END = datetime(2026, 11, 20, tzinfo=timezone.utc)
PARAMETERS = cost_parameters(START, END, monthly_budget_usd=20)
TEN = [
    "daily_summary", "by_model", "top_users", "by_hour", "anomalies",
    "week_over_week", "sessions", "error_waste", "budget", "token_efficiency",
]  # fmt: skip


def records(path: Path, name: str, parameters: dict[str, Any] = PARAMETERS) -> list[dict[str, Any]]:
    table = run_on_duckdb(path, [find_queries()[name]], parameters)[0]
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_the_file_has_the_ten_queries_each_explained() -> None:
    queries = find_queries()
    assert list(queries) == TEN
    assert all(len(query.description) > 15 for query in queries.values())


def test_daily_summary_keeps_days_money_and_gaps_apart(edge_parquet: Path) -> None:
    days = {str(row["day"]): row for row in records(edge_parquet, "daily_summary")}
    assert list(days) == ["2026-11-02", "2026-11-01", "2026-10-31"]  # 日本の日付
    assert days["2026-10-31"]["cost_usd"] == Decimal("0.5")
    november = days["2026-11-02"]
    assert november["stored"] == 11
    assert november["requests"] == 20  # 重み 10 の 1 件は 10 件分。壊れた重みは 1
    # 壊れた JSON、料金なし、数値でない金額、partial、missing_usage。LLM を呼ばない 2 件は数えない
    assert november["unpriced"] == 5
    assert november["cost_usd"] == Decimal("0.0000016") + Decimal("12.5") + Decimal("0.86")


def test_by_model_counts_each_call_once(edge_parquet: Path) -> None:
    models = {row["model"]: row for row in records(edge_parquet, "by_model")}
    assert set(models) == {"gpt-4o", "gpt-4o-mini", "gpt-4o-mini-2024-07-18"}
    # 親の合計(rollup)は 8 段上でも除かれ、使用量のないスパンをはさんだ親も除かれる
    assert models["gpt-4o"]["stored_calls"] == 2
    assert models["gpt-4o"]["cost_usd"] == Decimal("1.25")
    assert models["gpt-4o-mini-2024-07-18"]["cost_usd"] == Decimal("0.0000016")
    silent = models["gpt-4o-mini"]
    assert (silent["stored_calls"], silent["unpriced"], silent["cost_usd"]) == (1, 1, None)


def test_a_partly_priced_parent_far_above_is_not_counted_again(
    archive_of: Callable[..., Path], row: Any
) -> None:
    calls = [
        span("top", None, '"agent"', 0.5, 400, "partial"),
        *[span(f"m{i}", f"m{i - 1}" if i else "top") for i in range(6)],
        span("known", "m5", '"gpt-4o"', 0.5, 200, "priced"),
        span("other", "m5", '"my-model"', None, 200, "unpriced"),
    ]
    path = archive_of([row(1, START, usd(0.5), tokens(300, 100), status="partial", spans=calls)])
    found = {r["model"]: (r["stored_calls"], r["tokens"]) for r in records(path, "by_model")}
    assert found == {"gpt-4o": (1, 200), "my-model": (1, 200)}


def test_users_come_from_metadata(edge_parquet: Path) -> None:
    users = {row["user_id"]: row for row in records(edge_parquet, "top_users")}
    assert users["利用者"]["cost_usd"] == Decimal("12.5")
    assert users["(unknown)"]["stored"] == 2
    assert users["(unknown)"]["unpriced"] == 1


def test_budget_uses_the_local_month(edge_parquet: Path) -> None:
    at = datetime(2026, 11, 10, 15, tzinfo=timezone.utc)  # 日本の 11 月 11 日 0 時
    row = records(edge_parquet, "budget", cost_parameters(START, at, monthly_budget_usd=20))[0]
    assert row["spent_usd"] == Decimal("13.6100016")  # 10 月 31 日 23:59:59 の 0.5 は含まない
    assert row["remaining_usd"] == Decimal("20") - Decimal("13.6100016")
    assert (row["days_elapsed"], row["days"]) == (10, 30)
    assert row["projected_usd"] == pytest.approx(13.6100016 * 3)
    assert row["unpriced"] == 5


def test_budget_of_a_month_without_records_is_zero_not_missing(empty_parquet: Path) -> None:
    row = records(empty_parquet, "budget")[0]
    assert (row["spent_usd"], row["used_pct"], row["unpriced"]) == (0, 0, 0)


def test_error_waste(edge_parquet: Path) -> None:
    row = records(edge_parquet, "error_waste")[0]
    assert (row["errors"], row["wasted_usd"]) == (2, Decimal("12.5"))


def test_one_outlier_among_sixty_is_found(archive_of: Callable[..., Path], row: Any) -> None:
    rows = [row(i, START, '{"total_cost": 0.01}', '{"total_tokens": 1}') for i in range(60)]
    rows.append(row(99, START, '{"total_cost": 1.0}', '{"total_tokens": 1}'))
    found = records(archive_of(rows), "anomalies")
    assert [(r["trace_id"], r["times_median"]) for r in found] == [("tr-00000099", 100)]


@pytest.mark.parametrize(("count", "found", "said"), [(14, 0, True), (15, 1, False)])
def test_too_few_traces_for_an_anomaly_are_named(
    archive_of: Callable[..., Path],
    row: Any,
    capsys: pytest.CaptureFixture[str],
    count: int,
    found: int,
    said: bool,
) -> None:
    """C17: 15 件に満たない名前では、100 万ドルの 1 件も見つからない。黙っていない。"""
    rows = [row(i, START, usd(0.01 if i else 1e6)) for i in range(count)]
    path = archive_of([*rows, row(99, START)])  # コストの分からない 1 件は、数に入らない
    period = ["--start", "2026-10-01", "--end", "2026-11-20"]
    assert command(["sql", str(path), "--query", "anomalies", *period]) == 0
    out = capsys.readouterr().out
    assert out.count("tr-000000") == found
    assert ("15 件に満たない名前では見つからない: chat(14 件)" in out) == said
    assert "15 件に満たない" in find_queries()["anomalies"].description


def test_a_partly_priced_call_is_counted_and_marked(
    archive_of: Callable[..., Path], row: Any
) -> None:
    """料金の一部だけ決まった呼び出しには理由がある。理由のない partial は、子の合計。"""
    call = span("s", None, '"gpt-4o"', 0.5, 100, "partial")
    call["attributes"].append(("cost.reason", '"90 tokens have no known price"'))
    found = records(archive_of([row(1, START, usd(0.5), "{}", spans=[call])]), "by_model")[0]
    assert (found["stored_calls"], found["unpriced"], found["cost_usd"]) == (1, 1, Decimal("0.5"))


def test_costs_in_tags_of_earlier_code_are_read(archive_of: Callable[..., Path], row: Any) -> None:
    old = row(1, START, None, '{"input_tokens": 1, "output_tokens": 1}')
    old["tags"].append(("cost.total_usd", "0.0075"))
    day = records(archive_of([old]), "daily_summary")[0]
    assert (day["cost_usd"], day["unpriced"]) == (Decimal("0.0075"), 0)


def test_sessions_and_efficiency(edge_parquet: Path) -> None:
    session = records(edge_parquet, "sessions")[0]
    assert (session["session_id"], session["turns"], session["unpriced"]) == ("s1", 11, 4)
    efficiency = {row["trace_name"]: row for row in records(edge_parquet, "token_efficiency")}
    assert efficiency["chat"]["unpriced"] == 5


def test_week_over_week_starts_on_monday_in_the_given_zone(edge_parquet: Path) -> None:
    weeks = [str(row["week_start"]) for row in records(edge_parquet, "week_over_week")]
    assert weeks == ["2026-11-02", "2026-10-26"]


def test_empty_archive_gives_empty_tables(empty_parquet: Path) -> None:
    queries = [query for name, query in find_queries().items() if name != "budget"]
    for table in run_on_duckdb(empty_parquet, queries, PARAMETERS):
        assert table.rows == []


@pytest.mark.parametrize("name", ["t; DROP TABLE x", "a.b.c.d", "`x`", "", "a b", "x--"])
def test_unchecked_table_names_never_reach_sql(name: str) -> None:
    with pytest.raises(ValueError, match="trace_table"):
        cost_parameters(START, END, trace_table=name)


def test_values_are_bound_not_pasted(edge_parquet: Path) -> None:
    evil = {**PARAMETERS, "tz": "Asia/Tokyo'; DROP VIEW archived_traces; --"}
    with pytest.raises(ValueError, match="Unknown TimeZone"):
        run_on_duckdb(edge_parquet, [find_queries()["by_hour"]], evil)


def test_naive_times_are_refused() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        cost_parameters(datetime(2026, 1, 1), END)


def test_a_broken_weight_is_one_request(archive_of: Callable[..., Path], row: Any) -> None:
    """usage.sampling_weight と同じ扱い。"""
    weights = ("-2", "0", "x", "NaN", None)
    traces = [
        row(i, START + timedelta(days=i), usd(0.5), '{"total_tokens": 1}', weight=weight)
        for i, weight in enumerate(weights)
    ]
    days = records(archive_of(traces), "daily_summary")
    found = [(day["requests"], day["cost_usd"], day["cost_per_request"]) for day in days]
    assert found == [(1, Decimal("0.5"), 0.5)] * len(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tz", "Nowhere/City"], "tz='Nowhere/City' is not a time zone"),
        (["--tz", "UTC'; DROP TABLE x; --"], "is not a time zone"),
        (["--budget", "abc"], "monthly_budget_usd must be a number > 0, got 'abc'"),
        (["--budget", "0.00004"], "monthly_budget_usd must be a number > 0, got '0.00004'"),
        (["--budget", "0"], "monthly_budget_usd must be a number > 0, got '0'"),
        (["--budget", "NaN"], "monthly_budget_usd must be a number > 0"),
    ],
)
def test_the_command_refuses_bad_parameters(
    edge_parquet: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert command(["sql", str(edge_parquet), *options]) == 1
    assert message in capsys.readouterr().err


def test_the_command_runs_in_a_notebook_too(edge_parquet: Path) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as shown:  # reconfigure() のない標準出力
        assert command(["sql", str(edge_parquet), "--query", "daily_summary"]) == 0
    assert "== daily_summary" in shown.getvalue()


def test_the_command_names_a_file_that_is_no_archive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.parquet"
    path.write_text("not parquet", encoding="utf-8")
    assert command(["sql", str(path)]) == 1
    assert f"error: cannot query {path}" in capsys.readouterr().err


def test_days_of_the_command_begin_in_the_zone(
    archive_of: Callable[..., Path], row: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """--start と --end も、結果の日と同じ時間帯。予算は、期間の最後の瞬間の月。"""
    hours = (("2026-11-30T14:59", 1), ("2026-11-30T15:00", 2), ("2026-12-31T14:59", 4))
    rows = [
        row(usd, datetime.fromisoformat(f"{at}+00:00"), f'{{"total_cost": {usd}}}', "{}")
        for at, usd in (*hours, ("2026-12-31T15:00", 8))
    ]
    december = ["--start", "2026-12-01", "--end", "2027-01-01", "--query", "daily_summary"]
    path = str(archive_of(rows))
    assert command(["sql", path, *december, "--query", "budget", "--budget", "12"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "2026-" in line] == ["2026-12-31", "2026-12-01"]
    budget = dict(zip(lines[-3].split(), lines[-2].split(), strict=True))
    assert (budget["spent_usd"], budget["used_pct"], budget["days"]) == ("6", "50", "31")


@pytest.mark.slow
def test_the_command_on_a_japanese_console(
    archive_of: Callable[..., Path], row: Any, tmp_path: Path
) -> None:
    """別のプロセスで、cp932 の端末に。頼んだ順に並び、どんな名前でも表示できる。"""
    path = archive_of([row(1, START, '{"total_cost": 1}', "{}", user="利用者\U0001f600\x1b[31m")])
    module = "chapter8_samples.cost_tracking"
    queries = ["--query", "budget", "--query", "top_users", "--budget", "20"]
    options = [*queries, "--start", "2026-10-01", "--end", "2026-11-20"]
    run = subprocess.run(
        [sys.executable, "-m", module, "sql", str(path), *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "cp932"},
        capture_output=True,
        encoding="cp932",
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    titles = [line.split(":")[0] for line in run.stdout.splitlines() if line.startswith("==")]
    assert titles == ["== budget", "== top_users"]
    assert "利用者?[31m" in run.stdout


def test_the_file_is_found_in_any_folder_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """番号付きフォルダーでも、アプリへコピーしてページと同じところに置いても。"""
    monkeypatch.setattr(commands, "_FOLDERS", [str(tmp_path)])
    assert command(["sql", "anything"]) == 1
    assert f"error: no cost_analysis.sql in {tmp_path}" in capsys.readouterr().err
    shutil.copy(ROOT / "chapter8_samples/02_cost_tracking/cost_analysis.sql", tmp_path)
    assert list(find_queries()) == TEN


def test_hours_are_local(edge_parquet: Path) -> None:
    hours = records(edge_parquet, "by_hour")
    found = [(hour["hour_of_day"], hour["stored"], hour["requests"]) for hour in hours]
    assert found == [(0, 2, 2), (9, 10, 19), (23, 1, 1)]


needs_spark = pytest.mark.skipif(
    importlib.util.find_spec("pyspark") is None or shutil.which("java") is None,
    reason="PySpark と Java 17 が要る: pip install 'chapter8-samples[spark]'",
)


@pytest.mark.slow
@pytest.mark.timeout(600)  # Spark を 3 回起動する
@needs_spark
def test_both_engines_give_the_same_ten_results(
    edge_parquet: Path, empty_parquet: Path, synthetic_parquet: Callable[[int], Path]
) -> None:
    queries = list(find_queries().values())
    for path in (edge_parquet, empty_parquet, synthetic_parquet(100_000)):
        ours = run_on_duckdb(path, queries, PARAMETERS)
        theirs = run_on_spark(path, queries, PARAMETERS)
        for duck, spark in zip(ours, theirs, strict=True):
            assert duck.columns == spark.columns
            assert normal(duck) == normal(spark), f"{path.name}: {duck.query.name}"
