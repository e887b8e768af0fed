"""Parquet への書き出し: 差分、再開、列、SQL までの通し。"""

from __future__ import annotations

import os
import shutil
import sys
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow.entities import Trace
from mlflow.tracing.client import TracingClient
from quality_monitoring.fake_workspace import FakeWorkspace

from chapter8_samples.cost_tracking import (
    ExperimentNotFoundError,
    enable_trace_archive,
    export_traces_to_parquet,
    setup_cost_tracking,
)
from chapter8_samples.cost_tracking.__main__ import find_queries
from chapter8_samples.cost_tracking.__main__ import main as command
from chapter8_samples.cost_tracking.archive import parquet
from chapter8_samples.cost_tracking.archive.sql import cost_parameters, run_on_duckdb

DAY_1 = datetime(2024, 12, 20, 6, tzinfo=timezone.utc)


def record(at: datetime, count: int = 1) -> None:
    start = int(at.timestamp() * 1e9)
    for _ in range(count):
        root = mlflow.start_span_no_context("chat", inputs={"q": "住所は秘密"}, start_time_ns=start)
        span = mlflow.start_span_no_context("llm", "CHAT_MODEL", root, start_time_ns=start)
        usage = {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 1500}
        span.set_attributes({"mlflow.llm.model": "gpt-4o", "mlflow.chat.tokenUsage": usage})
        span.end(end_time_ns=start + 10**9)
        root.end(end_time_ns=start + 10**9)
    mlflow.flush_trace_async_logging()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``three_days`` が記録し終えた保存先の置き場。2 つ目のテストからは、写して使う。"""
    return tmp_path_factory.mktemp("recorded") / "mlflow.db"


@pytest.fixture
def three_days(tracking_uri: str, recorded: Path) -> str:
    database = tracking_uri.removeprefix("sqlite:///")
    if recorded.exists():
        shutil.copy(recorded, database)
    mlflow.set_experiment("archive")
    if not recorded.exists():
        tracking = setup_cost_tracking()
        for days, count in ((0, 2), (1, 3), (2, 1)):
            record(DAY_1 + timedelta(days=days), count)
        tracking.uninstall()
        shutil.copy(database, recorded)
    return "archive"


def clock(hours: float) -> Any:
    return lambda: DAY_1 + timedelta(hours=hours)


def test_days_are_written_once_and_today_again(three_days: str, tmp_path: Path) -> None:
    result = export_traces_to_parquet(three_days, tmp_path / "a", now=clock(50))
    assert (result.traces, result.days_skipped) == (6, 0)
    days = {path.parent.name: pq.read_metadata(path).num_rows for path in result.files}
    assert days == {"day=2024-12-20": 2, "day=2024-12-21": 3, "day=2024-12-22": 1}
    record(DAY_1 + timedelta(days=2, hours=1))
    again = export_traces_to_parquet(three_days, tmp_path / "a", now=clock(50))
    assert (again.traces, again.days_skipped) == (2, 2)
    assert pq.read_table(tmp_path / "a").num_rows == 7


@pytest.mark.slow
def test_a_day_is_closed_only_after_late_requests_had_time(three_days: str, tmp_path: Path) -> None:
    end_of_day_1 = 18.0
    for hours, skipped in ((end_of_day_1 + 0.5, 0), (end_of_day_1 + 2, 0), (end_of_day_1 + 2, 1)):
        result = export_traces_to_parquet(three_days, tmp_path / "a", now=clock(hours))
        assert result.days_skipped == skipped, hours


@pytest.mark.slow
def test_an_interrupted_export_leaves_no_broken_file(
    three_days: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = parquet._row  # pyright: ignore[reportPrivateUsage]

    def fail_on_the_second_day(trace: Trace) -> dict[str, Any]:
        if trace.info.request_time >= (DAY_1 + timedelta(hours=20)).timestamp() * 1000:
            raise OSError("disk full")
        return rows(trace)

    monkeypatch.setattr(parquet, "_row", fail_on_the_second_day)
    with pytest.raises(OSError, match="disk full"):
        export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
    assert [p.parent.name for p in (tmp_path / "a").rglob("*.parquet")] == ["day=2024-12-20"]
    monkeypatch.undo()
    result = export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
    assert (result.traces, result.days_skipped) == (4, 1)
    assert not list((tmp_path / "a").rglob("*.tmp"))


def test_a_broken_file_is_written_again(three_days: str, tmp_path: Path) -> None:
    """電源断で、中身のないファイルが残ることがある。それからも書き出せる。"""
    files = export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100)).files
    files[0].write_bytes(b"")
    files[1].write_bytes(bytes(1000))
    result = export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
    assert (result.traces, result.days_skipped) == (5, 2)
    assert pq.read_table(tmp_path / "a").num_rows == 6


def test_a_file_of_another_tool_is_not_overwritten(three_days: str, tmp_path: Path) -> None:
    path = tmp_path / "a" / "day=2024-12-20" / "traces.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(ValueError, match=r"holds experiment \(unknown\)"):
        export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
    assert pq.read_table(path).num_rows == 1


@pytest.mark.parametrize("spans", [True, False])
def test_a_trace_found_on_two_pages_is_written_once(
    three_days: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spans: bool
) -> None:
    """読んでいる間に、早く始まったトレースが届くと、次のページが 1 件ずれる。"""
    pages = TracingClient.search_traces

    def record_after_the_first_page(self: TracingClient, **options: Any) -> Any:
        found = pages(self, **{**options, "max_results": 1})
        if not options["page_token"]:
            record(DAY_1 - timedelta(hours=1))
        return found

    monkeypatch.setattr(TracingClient, "search_traces", record_after_the_first_page)
    result = export_traces_to_parquet(
        three_days, tmp_path / "a", DAY_1, include_spans=spans, now=clock(1)
    )
    ids = pq.read_table(tmp_path / "a")["trace_id"].to_pylist()
    assert len(ids) == len(set(ids)) == result.traces


def test_two_exports_at_the_same_time_do_not_mix(
    three_days: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = parquet._row  # pyright: ignore[reportPrivateUsage]

    def run_another(trace: Trace) -> dict[str, Any]:
        monkeypatch.setattr(parquet, "_row", row)
        export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
        return row(trace)

    monkeypatch.setattr(parquet, "_row", run_another)
    export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
    assert pq.read_table(tmp_path / "a").num_rows == 6
    assert {path.name for path in tmp_path.glob("a/*/*")} == {"traces.parquet"}


@pytest.mark.slow
def test_traces_whose_spans_are_lost_are_kept(
    three_days: str, tracking_uri: str, tmp_path: Path
) -> None:
    """MLflow の検索は、スパンの欠けたトレースを黙って落とす。件数と金額は落とさない。"""
    import sqlite3

    with sqlite3.connect(tracking_uri.removeprefix("sqlite:///")) as database:
        victim = database.execute("SELECT MIN(request_id) FROM trace_info").fetchone()[0]
        database.execute("DELETE FROM spans WHERE trace_id = ?", (victim,))
    result = export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
    assert (result.traces, result.traces_without_spans) == (6, 1)
    result = export_traces_to_parquet(
        three_days, tmp_path / "a", include_spans=False, now=clock(100)
    )
    assert (result.traces, result.traces_without_spans) == (6, 0)
    assert all(row == [] for row in pq.read_table(tmp_path / "a")["spans"].to_pylist())


def test_a_day_whose_archive_cannot_be_read_is_written_again(
    three_days: str, tracking_uri: str, tmp_path: Path
) -> None:
    """MLflow は、アーカイブの置き場が止まっていると、スパンを空にして返す。"""
    import sqlite3

    def place(kind: str, uri: str = "") -> None:
        with sqlite3.connect(tracking_uri.removeprefix("sqlite:///")) as database:
            (victim,) = database.execute("SELECT MIN(request_id) FROM trace_info").fetchone()
            for tag in (("spansLocation", kind), ("archiveLocation", uri)):
                row = (f"mlflow.trace.{tag[0]}", tag[1], victim)
                database.execute(
                    "REPLACE INTO trace_tags (key, value, request_id) VALUES (?, ?, ?)", row
                )

    def export() -> tuple[int, int, int]:
        result = export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
        return result.traces, result.traces_without_spans, result.days_skipped

    place("ARCHIVE_REPO", (tmp_path / "stopped").as_uri())
    assert export() == (6, 1, 0)
    place("TRACKING_STORE")
    assert export()[1:] == (0, 3)
    assert all(pq.read_table(tmp_path / "a")["spans"].to_pylist())
    assert export() == (0, 0, 4)


def test_inputs_and_outputs_are_left_out(three_days: str, tmp_path: Path) -> None:
    export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
    assert "住所は秘密" not in str(pq.read_table(tmp_path / "a").to_pylist())


@pytest.mark.slow
def test_two_experiments_are_not_mixed_in_one_directory(
    three_days: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """片方の日のファイルが上書きされたり消えたりして、合計が混ざる。書く前に断る。"""
    export_traces_to_parquet(three_days, tmp_path / "a", now=clock(50))
    mlflow.set_experiment("other")
    record(DAY_1 + timedelta(days=1))
    with pytest.raises(ValueError, match="use one directory per experiment"):
        export_traces_to_parquet("other", tmp_path / "a", now=clock(50))
    assert pq.read_table(tmp_path / "a").num_rows == 6
    assert command(["export", "other", str(tmp_path / "a")]) == 1
    assert "one directory per experiment" in capsys.readouterr().err


def test_the_queries_run_on_the_export(three_days: str, tmp_path: Path) -> None:
    export_traces_to_parquet(three_days, tmp_path / "a", now=clock(100))
    parameters = cost_parameters(DAY_1 - timedelta(days=1), DAY_1 + timedelta(days=5))
    query = find_queries()["by_model"]
    table = run_on_duckdb(tmp_path / "a", [query], parameters)[0]
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["model"], row["stored_calls"], row["unpriced"]) == ("gpt-4o", 6, 0)
    assert row["cost_usd"] == Decimal("0.045")


def test_a_partly_priced_call_keeps_its_place_in_the_queries(
    tracking_uri: str, tmp_path: Path
) -> None:
    """合計だけにあるトークンには料金が付かない。呼び出しは数え、子の合計を持つ親は数えない。"""
    mlflow.set_experiment("archive")
    tracking = setup_cost_tracking()
    start = int(DAY_1.timestamp() * 1e9)
    root = mlflow.start_span_no_context("agent", start_time_ns=start)
    span = mlflow.start_span_no_context("llm", "CHAT_MODEL", root, start_time_ns=start)
    usage = {"input_tokens": 1000, "output_tokens": 500, "total_tokens": 9000}
    span.set_attributes({"mlflow.llm.model": "gpt-4o", "mlflow.chat.tokenUsage": usage})
    root.set_attribute("mlflow.chat.tokenUsage", usage)
    span.end()
    root.end()
    tracking.uninstall()
    mlflow.flush_trace_async_logging()
    export_traces_to_parquet("archive", tmp_path, now=clock(100))
    parameters = cost_parameters(DAY_1 - timedelta(days=1), DAY_1 + timedelta(days=5))
    table = run_on_duckdb(tmp_path, [find_queries()["by_model"]], parameters)[0]
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [(r["model"], r["stored_calls"], r["unpriced"]) for r in rows] == [("gpt-4o", 1, 1)]
    assert rows[0]["cost_usd"] == Decimal("0.0075")


@pytest.mark.slow
def test_the_command_prints_tables(three_days: str, capsys: pytest.CaptureFixture[str]) -> None:
    period = ["--start", "2024-12-01", "--end", "2024-12-31"]
    assert command(["sql", three_days, "--query", "daily_summary", *period]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("== daily_summary: ")
    assert lines[1].split()[:5] == ["day", "stored", "requests", "unpriced", "cost_usd"]
    assert [line.split()[:2] for line in lines[2:5]] == [
        ["2024-12-22", "1"], ["2024-12-21", "3"], ["2024-12-20", "2"],
    ]  # fmt: skip


def test_the_command_exports_what_is_new(
    three_days: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    period = ["--start", "2024-12-20", "--end", "2024-12-22", "--tz", "UTC"]
    assert command(["export", three_days, str(tmp_path / "a"), *period]) == 0
    assert capsys.readouterr().out == "書いた件数 5、飛ばした日 0\n"
    assert command(["export", three_days, str(tmp_path / "a"), "--end", "2024-12-24"]) == 0
    assert capsys.readouterr().out == "書いた件数 4、飛ばした日 1\n"
    assert pq.read_table(tmp_path / "a").num_rows == 6


def test_the_budget_sees_its_whole_month(
    three_days: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """予算は月の初めから数える。--start が月の途中でも、そこまでの分を書き出さないと足りない。"""
    period = ["--start", "2024-12-22", "--end", "2024-12-23", "--tz", "UTC"]
    assert command(["sql", three_days, "--query", "budget", *period]) == 0
    titles, values = capsys.readouterr().out.splitlines()[1:3]
    budget = dict(zip(titles.split(), values.split(), strict=True))
    assert float(budget["spent_usd"]) == pytest.approx(6 * 0.0075)


def test_the_command_explains_mistakes(
    tracking_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, code, message in (
        (["sql", "no-such-experiment"], 1, "no experiment 'no-such-experiment'"),
        (["export", "no-such-experiment", str(tmp_path)], 1, "no experiment 'no-such-experiment'"),
        (["sql", "x", "--query", "nope"], 2, "unknown query 'nope'; choose from daily_summary"),
    ):
        assert command(arguments) == code
        assert message in capsys.readouterr().err
    for arguments in ([], ["sql", "x", "--start", "yesterday"], ["sql", "x", "--engine", "sqlite"]):
        with pytest.raises(SystemExit, match="2"):
            command(arguments)


def test_missing_packages_name_the_install_command(
    three_days: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r'pip install "chapter8-samples\[sql\]"'):
        export_traces_to_parquet(three_days, tmp_path)


@pytest.mark.slow
def test_empty_and_unknown_experiments(tracking_uri: str, tmp_path: Path) -> None:
    mlflow.set_experiment("empty")
    assert export_traces_to_parquet("empty", tmp_path).files == []
    with pytest.raises(ExperimentNotFoundError, match="nope"):
        export_traces_to_parquet("nope", tmp_path)


@pytest.mark.slow
def test_the_databricks_archive_is_switched_on_by_the_real_client() -> None:
    with FakeWorkspace() as workspace:
        os.environ.update(DATABRICKS_HOST=workspace.url, DATABRICKS_TOKEN="secret")
        mlflow.set_tracking_uri("databricks")
        experiment = mlflow.create_experiment("/production/my-llm-app")
        enable_trace_archive("/production/my-llm-app", "main.ops.traces")
        assert workspace.sent("POST", "/trace-archival") == [
            {"experiment_id": experiment, "archive_table_fullname": "main.ops.traces"}
        ]


def test_naive_times_are_refused(three_days: str, tmp_path: Path) -> None:
    for bound in ("start", "end"):
        with pytest.raises(ValueError, match=f"{bound}=.* has no time zone"):
            export_traces_to_parquet(three_days, tmp_path, **{bound: datetime(2024, 12, 21)})


def test_the_databricks_archive_is_refused_elsewhere(tracking_uri: str) -> None:
    with pytest.raises(NotImplementedError, match="use export_traces_to_parquet"):
        enable_trace_archive("x", "main.monitoring.traces")
