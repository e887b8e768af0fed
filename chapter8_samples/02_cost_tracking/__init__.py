"""8.2 コストとトークンの追跡。"""

from .._sections import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    trace_costs="setup_cost_tracking CostTracking",
    trace_pricing="TraceCost price_trace",
    token_tracking=(
        "ModelTotals ModelUsage TokenTracking TokenUsageSummary "
        "aggregate_token_usage_from_traces get_token_usage_from_trace "
        "setup_token_tracking usage_by_model"
    ),
    cost_calculator="CostCalculator InvalidUsageError PriceBreakdown format_yen",
    cost_tracker="BudgetAlert CostSnapshot CostTracker",
    price_table=(
        "CostError ModelPrice NoPriceError PriceNotEffectiveError PriceTable "
        "PriceTableError UnknownModelError"
    ),
    trace_archive="enable_trace_archive export_traces_to_parquet",
    trace_reader="ExperimentNotFoundError TokenUsage TraceNotFoundError",
)
