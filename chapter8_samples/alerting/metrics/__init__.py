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
from .source import TraceSearch, metric_source, sample_of, split_samples, to_ms

__all__ = [
    "MetricSample",
    "MetricSource",
    "MetricSourceError",
    "RowNumbers",
    "TraceRow",
    "TraceSearch",
    "measure",
    "metric_problem",
    "metric_source",
    "sample_of",
    "split_samples",
    "to_ms",
]
