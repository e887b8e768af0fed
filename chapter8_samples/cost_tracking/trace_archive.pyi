"""8.2 トレースを Parquet に書き出し、SQL で分析できるようにする(本書にリストなし)。"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
COMPLETE_KEY = b'chapter8.complete'
EXPERIMENT_KEY = b'chapter8.experiment'
GRACE = timedelta(hours=1)

class MissingDependencyError(ImportError):
    """SQL 用の追加パッケージが入っていない。"""

def require(module: str) -> Any:
    """追加パッケージを読み込む。なければ、入れ方を示す例外にする。"""

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

def export_traces_to_parquet(experiment_name: str, directory: str | Path, start: datetime | None=None, end: datetime | None=None, *, include_spans: bool=True, include_content: bool=False, progress: Callable[[ExportProgress], object]=lambda _: None, now: Callable[[], datetime]=lambda: datetime.now(timezone.utc)) -> ExportResult:
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

def enable_trace_archive(experiment_name: str, table: str) -> None:
    """Databricks のトレースアーカイブを有効にする。``table`` は ``catalog.schema.name``。

    Raises:
        NotImplementedError: 接続先が Databricks でない。``export_traces_to_parquet`` を使う。
    """

def main() -> None:
    ...
