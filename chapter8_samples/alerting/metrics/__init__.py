"""アラートの指標と、その読み出し。"""

from .measures import (
    MetricSample,
    MetricSource,
    MetricSourceError,
    RowNumbers,
    TraceRow,
    measure,
    metric_problem,
)
from .source import RowSource, TraceSearch, metric_source, samples_of, to_ms

__all__ = [
    "MetricSample",
    "MetricSource",
    "MetricSourceError",
    "RowNumbers",
    "RowSource",
    "TraceRow",
    "TraceSearch",
    "measure",
    "metric_problem",
    "metric_source",
    "samples_of",
    "to_ms",
]
