"""8.2 トレースを Parquet に書き出し、SQL で分析できるようにする(本書にリストなし)。

MLflow の内部の表は版ごとに形が変わるので、直接 SQL を書かない。Databricks のトレースアーカイブと
同じ列の Parquet に書き出せば、同じ SQL がどこでも動く。1 日 1 ファイルで、終わった日は飛ばす。

Databricks では書き出す代わりに、``enable_trace_archive`` でアーカイブを有効にする。
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import Span, Trace

from ..usage.reader import find_experiment_id, iter_traces, with_time_zone
from .extras import extra

COMPLETE_KEY = b"chapter8.complete"
EXPERIMENT_KEY = b"chapter8.experiment"
GRACE = timedelta(hours=1)  # 日付が変わる前に始まったリクエストが終わるのを待つ
_KEPT_ATTRIBUTES = (
    "mlflow.llm.model", "mlflow.llm.provider", "mlflow.chat.tokenUsage", "mlflow.llm.cost",
    "mlflow.spanType", "cost.status", "cost.price_source",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExportProgress:
    """1 日分が終わるたびに渡される進み具合。"""

    day: date
    traces: int
    skipped: bool


@dataclass(frozen=True, slots=True)
class ExportResult:
    """書き出した結果。

    ``days_skipped`` は、前回までに書き終わっていた日の数。``traces_without_spans`` は、スパンが
    まだ保存されていないか壊れていて、スパンなしで書いたトレースの数。
    """

    directory: Path
    traces: int
    files: tuple[Path, ...] = field(default_factory=tuple[Path, ...])
    days_skipped: int = 0
    traces_without_spans: int = 0


def archive_schema() -> Any:
    """アーカイブ表の列(``pyarrow.Schema``)。Databricks の ``*_trace_unified`` に合わせた名前。"""
    with extra("sql"):
        import pyarrow as pa
    strings = pa.map_(pa.string(), pa.string())
    span = pa.struct([
        ("span_id", pa.string()), ("parent_span_id", pa.string()), ("name", pa.string()),
        ("start_time_unix_nano", pa.int64()), ("end_time_unix_nano", pa.int64()),
        ("attributes", strings),
    ])  # fmt: skip
    return pa.schema([
        ("trace_id", pa.string()), ("client_request_id", pa.string()),
        ("request_time", pa.timestamp("us", tz="UTC")), ("state", pa.string()),
        ("execution_duration_ms", pa.decimal128(30, 9)),
        ("request", pa.string()), ("response", pa.string()),
        ("trace_metadata", strings), ("tags", strings), ("spans", pa.list_(span)),
    ])  # fmt: skip


def export_traces_to_parquet(
    experiment_name: str,
    directory: str | Path,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    include_spans: bool = True,
    include_content: bool = False,
    progress: Callable[[ExportProgress], object] = lambda _: None,
    now: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> ExportResult:
    """トレースを ``<directory>/day=YYYY-MM-DD/traces.parquet`` に書き出す。

    日は UTC で区切る。途中で止まっても壊れたファイルは残らず、もう一度呼ぶと続きから進む。
    書き終えた日に後から届いたトレース(ためてあった分の再送など)は、その日のフォルダーを消して
    もう一度呼ぶと加わる。

    Args:
        start: この日から(その日の 0 時まで広げる)。``None`` は最初のトレースの日。
        end: この時刻の手前まで。``None`` はいま。
        include_spans: スパンも書くか。モデル別の分析に要る。読み込みは数倍遅くなる。
        include_content: 入力と出力、全部の属性も書くか。個人情報が入りうるので既定では書かない。

    Raises:
        ExperimentNotFoundError: エクスペリメントがない。
        MissingDependencyError: pyarrow がない。
        ValueError: ``start`` か ``end`` にタイムゾーンがない、または ``directory`` に別の
            エクスペリメントの書き出しがある(混ざると、合計が両方の分になってしまう)。
    """
    archive_schema()  # 追加パッケージがないことは、トレースを探す前に分かる
    experiment_id, directory = find_experiment_id(experiment_name), Path(directory)
    _refuse_another_experiment(directory, experiment_id)
    start, stop = start and with_time_zone("start", start), with_time_zone("end", end or now())
    files: list[Path] = []
    total = skipped = without_spans = 0
    for day in _days(experiment_id, start, stop):
        path = directory / f"day={day}" / "traces.parquet"
        rows = _DayRows(experiment_id, day, stop, include_spans, include_content)
        done = _is_complete(path, rows.kind)
        count = 0 if done else _write(path, iter(rows), rows.labels(now()))
        without_spans += rows.without_spans
        files += [path] if count else []
        total, skipped = total + count, skipped + done
        progress(ExportProgress(day, count, done))
    return ExportResult(directory, total, tuple(files), skipped, without_spans)


class _DayRows:
    """1 日分の行。MLflow はスパンの欠けたトレースを検索結果から黙って落とすので、補う。"""

    def __init__(
        self, experiment_id: str, day: date, stop: datetime, spans: bool, content: bool
    ) -> None:
        self.midnight = _midnight(day + timedelta(days=1))
        self.window = (experiment_id, _midnight(day), min(self.midnight, stop))
        self.spans, self.content = spans, content
        self.experiment_id = experiment_id
        self.kind = f"{experiment_id} spans={spans} content={content}"
        self.without_spans = 0

    def closed(self, now: datetime) -> bool:
        """この日の行が、もう増えないか。"""
        return self.window[2] == self.midnight and self.midnight + GRACE <= now

    def labels(self, now: datetime) -> dict[bytes, bytes]:
        """ファイルに残す印: どのエクスペリメントの分か、書き終わった日か。"""
        complete = {COMPLETE_KEY: self.kind.encode()} if self.closed(now) else {}
        return {EXPERIMENT_KEY: self.experiment_id.encode(), **complete}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        seen: set[str] = set()
        if self.spans:
            for trace in iter_traces(*self.window, include_spans=True, page_size=100):
                seen.add(trace.info.trace_id)
                yield _trace_row(trace, True, self.content)
        for trace in iter_traces(*self.window):
            if trace.info.trace_id not in seen:
                self.without_spans += self.spans
                yield _trace_row(trace, False, self.content)


def _days(experiment_id: str, start: datetime | None, stop: datetime) -> Iterator[date]:
    if start is None:
        first = next(iter_traces(experiment_id, None, stop, page_size=1), None)
        if first is None:
            return
        start = _utc(first.info.request_time)
    day = start.astimezone(timezone.utc).date()
    while _midnight(day) < stop:
        yield day
        day += timedelta(days=1)


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), timezone.utc)


def _utc(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, timezone.utc)


def _is_complete(path: Path, kind: str) -> bool:
    return path.exists() and _labels_of(path).get(COMPLETE_KEY) == kind.encode()


def _labels_of(path: Path) -> dict[bytes, bytes]:
    import pyarrow.parquet as pq

    return pq.read_schema(path).metadata or {}


def _refuse_another_experiment(directory: Path, experiment_id: str) -> None:
    for path in directory.glob("day=*/traces.parquet"):
        owner = _labels_of(path).get(EXPERIMENT_KEY, experiment_id.encode()).decode()
        if owner != experiment_id:
            raise ValueError(
                f"{directory} holds experiment {owner}, not {experiment_id}; "
                "use one directory per experiment"
            )


def _write(path: Path, rows: Iterator[dict[str, Any]], labels: dict[bytes, bytes]) -> int:
    """500 行ずつ書き、最後に本来の名前へ変える。1 行もなければファイルを作らない。"""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = archive_schema().with_metadata(labels)
    first = next(rows, None)
    if first is None:
        path.unlink(missing_ok=True)
        return 0
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    count, batch = 0, [first]
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        while batch:
            count += len(batch)
            writer.write_table(pa.Table.from_pylist(batch, schema=schema))
            batch = [row for row, _ in zip(rows, range(500), strict=False)]
    temporary.replace(path)
    return count


def _trace_row(trace: Trace, include_spans: bool, include_content: bool) -> dict[str, Any]:
    info = trace.info
    return {
        "trace_id": info.trace_id,
        "client_request_id": info.client_request_id,
        "request_time": _utc(info.request_time),
        "state": info.state.value,
        "execution_duration_ms": Decimal(info.execution_duration or 0),
        "request": info.request_preview if include_content else None,
        "response": info.response_preview if include_content else None,
        "trace_metadata": list(_kept_metadata(info.trace_metadata, include_content)),
        "tags": list(info.tags.items()),
        "spans": [_span_row(s, include_content) for s in trace.data.spans]
        if include_spans
        else None,
    }


def _kept_metadata(metadata: dict[str, str], include_content: bool) -> Iterator[tuple[str, str]]:
    content = () if include_content else ("mlflow.traceInputs", "mlflow.traceOutputs")
    return ((key, value) for key, value in metadata.items() if key not in content)


def _span_row(span: Span, include_content: bool) -> dict[str, Any]:
    return {
        "span_id": span.span_id,
        "parent_span_id": span.parent_id,
        "name": span.name,
        "start_time_unix_nano": span.start_time_ns,
        "end_time_unix_nano": span.end_time_ns,
        "attributes": [
            (key, json.dumps(value, ensure_ascii=False, default=str))
            for key, value in span.attributes.items()
            if include_content or key in _KEPT_ATTRIBUTES
        ],
    }


def enable_trace_archive(experiment_name: str, table: str) -> None:
    """Databricks のトレースアーカイブを有効にする。``table`` は ``catalog.schema.name``。

    Raises:
        NotImplementedError: 接続先が Databricks でない。``export_traces_to_parquet`` を使う。
    """
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("databricks"):
        raise NotImplementedError(
            f"trace archival needs a Databricks tracking URI, got {uri!r}; "
            "use export_traces_to_parquet() instead"
        )
    from mlflow.tracing.archival import enable_databricks_trace_archival

    enable_databricks_trace_archival(
        delta_table_fullname=table, experiment_id=find_experiment_id(experiment_name)
    )
