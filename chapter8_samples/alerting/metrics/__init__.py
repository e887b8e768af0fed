"""アラートの指標と、その読み出し。"""

from .measures import (
    MetricSample,
    MetricSource,
    MetricSourceError,
    TraceRow,
    measure,
    metric_problem,
)
from .source import TraceSearch, metric_source

__all__ = [
    "MetricSample",
    "MetricSource",
    "MetricSourceError",
    "TraceRow",
    "TraceSearch",
    "measure",
    "metric_problem",
    "metric_source",
]
