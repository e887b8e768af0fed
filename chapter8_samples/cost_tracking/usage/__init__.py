"""8.2.3 トレースの使用量とコスト: 読む、料金を付ける、終わったスパンに書き込む。"""

from .pricing import Calculator, TraceCost, UnpricedCall, price_usage, trace_cost
from .reader import (
    PAGE_SIZE,
    ExperimentNotFoundError,
    LlmCall,
    StoreTotals,
    TokenUsage,
    TraceNotFoundError,
    find_experiment_id,
    iter_traces,
    llm_calls,
    load_trace,
    sampling_weight,
    totals_from_store,
)
from .span_costs import BY_MODEL_TAG, STATUS_KEY, CostTracking, Tracker

__all__ = [
    "BY_MODEL_TAG",
    "PAGE_SIZE",
    "STATUS_KEY",
    "Calculator",
    "CostTracking",
    "ExperimentNotFoundError",
    "LlmCall",
    "StoreTotals",
    "TokenUsage",
    "TraceCost",
    "TraceNotFoundError",
    "Tracker",
    "UnpricedCall",
    "find_experiment_id",
    "iter_traces",
    "llm_calls",
    "load_trace",
    "price_usage",
    "sampling_weight",
    "totals_from_store",
    "trace_cost",
]
