"""8.1.4 トレースを失わずに送る: 設定値、期限つきのフラッシュ、終了、ディスクの置き場。"""

from .flush import FlushResult, flush_traces
from .settings import TracingSetupError, TracingStatus
from .shutdown import GracefulShutdownHandler
from .spool import SpoolStats, TraceSpool, replay

__all__ = [
    "FlushResult",
    "GracefulShutdownHandler",
    "SpoolStats",
    "TraceSpool",
    "TracingSetupError",
    "TracingStatus",
    "flush_traces",
    "replay",
]
