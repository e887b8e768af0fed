"""8.2 トレースを Parquet に書き出し、SQL で分析できるようにする(本書にリストなし)。

MLflow の内部の表は版ごとに形が変わるので、直接 SQL を書かない。Databricks の資料にある列に合わせた
Parquet を読む。Databricks では書き出す代わりに、``enable_trace_archive`` でアーカイブを有効にする。
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from mlflow.entities import Span, Trace

from ..usage.reader import find_experiment_id, iter_traces, with_time_zone
from . import extra

_LABEL = b"chapter8.export"  # ファイルに残す印: エクスペリメントの ID と、書き終わった日か
_DAY, _GRACE = timedelta(days=1), timedelta(hours=1)  # 日をまたぐリクエストが終わるのを待つ
_CONTENT = ("mlflow.traceInputs", "mlflow.traceOutputs")
_KEPT_ATTRIBUTES = (
    "mlflow.llm.model", "mlflow.llm.provider", "mlflow.chat.tokenUsage", "mlflow.llm.cost",
    "mlflow.spanType", "cost.status", "cost.reason", "cost.price_source",
)  # fmt: skip


@dataclass(slots=True)
class ExportResult:
    """書いた数と、前に書き終わっていた日数、保存先でスパンが欠けていたトレースの数。"""

    traces: int = 0
    files: list[Path] = field(default_factory=list[Path])
    days_skipped: int = 0
    traces_without_spans: int = 0


def archive_schema() -> Any:
    """書き出す列(``pyarrow.Schema``)。実際のアーカイブ表の定義は公開されておらず、未確認。"""
    with extra("sql"):
        import pyarrow as pa
    text, strings = pa.string(), pa.map_(pa.string(), pa.string())
    span = pa.struct([
        ("span_id", text), ("parent_span_id", text), ("name", text), ("attributes", strings),
        ("start_time_unix_nano", pa.int64()), ("end_time_unix_nano", pa.int64()),
    ])  # fmt: skip
    return pa.schema([
        ("trace_id", text), ("client_request_id", text), ("state", text),
        ("request_time", pa.timestamp("us", tz="UTC")),
        ("execution_duration_ms", pa.decimal128(30, 9)),
        ("trace_metadata", strings), ("tags", strings), ("spans", pa.list_(span)),
    ])  # fmt: skip


def export_traces_to_parquet(
    experiment_name: str,
    directory: str | Path,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    include_spans: bool = True,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> ExportResult:
    """トレースを ``<directory>/day=YYYY-MM-DD/traces.parquet`` に、1 件 1 行で書き出す。

    UTC の日ごとに、``start`` の日(既定は最初のトレースの日)から ``end``(既定はいま)の手前まで。
    書き終わった日は飛ばし、途中で止まっても壊れたファイルは残らない。アーカイブを読めなかった日は、
    次も書く。書き終わった日に後から届いたトレースは、その日のフォルダーを消して呼ぶと加わる。
    入力と出力は個人情報が入りうるので書かない。モデル別の分析にはスパンが要る。
    別のエクスペリメントの書き出しがある場所では ``ValueError``。
    """
    archive_schema()  # 追加パッケージがないことは、トレースを探す前に分かる
    experiment_id, result = find_experiment_id(experiment_name), ExportResult()
    written = Path(directory).glob("day=*/traces.parquet")
    owners = {_label_of(path).partition(" ")[0] for path in written} - {experiment_id, ""}
    if owners:  # 混ざると、SQL の合計が両方の分になってしまう
        message = f"{directory} holds experiment {min(owners)}, not {experiment_id}"
        raise ValueError(f"{message}; use one directory per experiment")
    start, stop = start and with_time_zone("start", start), with_time_zone("end", end or now())
    for day in _days(experiment_id, start, stop):
        path = Path(directory, f"day={day:%Y-%m-%d}", "traces.parquet")
        label = f"{experiment_id} spans={include_spans}"
        if _label_of(path) == f"{label} complete":
            result.days_skipped += 1
            continue
        # まだ増える日と、読めなかったアーカイブ。どちらかがあれば、次も書く
        unfinished = [] if day + _DAY + _GRACE <= min(stop, now()) else [path.parent.name]
        window = (experiment_id, day, min(day + _DAY, stop))
        rows = _rows(window, include_spans, result, unfinished)
        result.traces += _write(path, rows, label, unfinished)
        result.files.append(path)
    return result


def _days(experiment_id: str, start: datetime | None, stop: datetime) -> Iterator[datetime]:
    if start is None:
        first = next(iter_traces(experiment_id, None, stop, page_size=1), None)
        if first is None:
            return
        start = datetime.fromtimestamp(first.info.request_time / 1000, timezone.utc)
    day = start.astimezone(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    while day < stop:
        yield day
        day += _DAY


def _label_of(path: Path) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (FileNotFoundError, pa.ArrowInvalid):  # 停電などで壊れたファイルは、書き直す
        return ""
    return metadata.get(_LABEL, b"(unknown)").decode()


def _rows(
    window: tuple[str, datetime, datetime], spans: bool, result: ExportResult, unfinished: list[str]
) -> Iterator[dict[str, Any]]:
    """期間の行。MLflow はスパンの欠けたトレースを検索結果から黙って落とすので、後から補う。

    アーカイブを読めないときは、スパンを空で返す。次は読めるかもしれないので ``unfinished`` に足す。
    """
    seen: set[str] = set()
    if spans:
        for trace in iter_traces(*window, include_spans=True, page_size=100):
            if trace.data.spans and trace.info.trace_id not in seen:
                seen.add(trace.info.trace_id)
                yield _row(trace)
    for trace in iter_traces(*window):
        if trace.info.trace_id not in seen:  # 読む間に増えると、次のページにもう一度届く
            seen.add(trace.info.trace_id)
            result.traces_without_spans += spans
            if spans and trace.info.tags.get("mlflow.trace.spansLocation") == "ARCHIVE_REPO":
                unfinished.append(trace.info.trace_id)
            yield _row(trace)


def _write(path: Path, rows: Iterator[dict[str, Any]], label: str, unfinished: list[str]) -> int:
    """500 行ずつ別の場所に書き、最後に本来の名前へ変える。同時に 2 つ動いてもよい。"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, schema = 0, archive_schema()
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        temporary = Path(scratch, "traces.tmp")
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while batch := list(islice(rows, 500)):
                writer.write_table(pa.Table.from_pylist(batch, schema=schema))
                count += len(batch)
            label += "" if unfinished else " complete"  # 行を読み終えると分かる
            writer.add_key_value_metadata({_LABEL: label})
        temporary.replace(path)
    return count


def _row(trace: Trace) -> dict[str, Any]:
    info = trace.info
    return {
        "trace_id": info.trace_id,
        "client_request_id": info.client_request_id,
        "request_time": info.request_time * 1000,  # マイクロ秒
        "state": info.state.value,
        "execution_duration_ms": Decimal(info.execution_duration or 0),
        "trace_metadata": [(k, v) for k, v in info.trace_metadata.items() if k not in _CONTENT],
        "tags": list(info.tags.items()),
        "spans": [_span(span) for span in trace.data.spans],
    }


def _span(span: Span) -> dict[str, Any]:
    kept = {key: span.get_attribute(key) for key in _KEPT_ATTRIBUTES}
    return {
        "span_id": span.span_id,
        "parent_span_id": span.parent_id,
        "name": span.name,
        "start_time_unix_nano": span.start_time_ns,
        "end_time_unix_nano": span.end_time_ns,
        "attributes": [
            (key, json.dumps(value, ensure_ascii=False, default=str))
            for key, value in kept.items()
            if value is not None
        ],
    }


def enable_trace_archive(experiment_name: str, table: str) -> None:
    """Databricks のトレースアーカイブを有効にする。``table`` は ``catalog.schema.name``。"""
    if not (uri := mlflow.get_tracking_uri()).startswith("databricks"):
        message = f"trace archival needs a Databricks tracking URI, got {uri!r}"
        raise NotImplementedError(f"{message}; use export_traces_to_parquet() instead")
    from mlflow.tracing.archival import enable_databricks_trace_archival

    experiment_id = find_experiment_id(experiment_name)
    enable_databricks_trace_archival(delta_table_fullname=table, experiment_id=experiment_id)
