"""8.2 コストとトークンの追跡。

本書のファイル(``02_cost_tracking/``)も、この名前の下で import できる。
公開名は、使われたときに読み込む。
"""

__path__.append(__path__[0].removesuffix("cost_tracking") + "02_cost_tracking")

_MODULES = {
    "token_tracking": (
        "setup_cost_tracking ModelTotals ModelUsage TokenTracking TokenUsageSummary "
        "aggregate_token_usage_from_traces get_token_usage_from_trace price_trace "
        "setup_token_tracking usage_by_model"
    ),
    "cost_calculator": "CostCalculator CostTracker InvalidUsageError PriceBreakdown format_yen",
    "prices.model": (
        "CostError ModelPrice NoPriceError PriceNotEffectiveError PriceTableError UnknownModelError"
    ),
    "prices.table": "PriceTable",
    "usage.reader": "ExperimentNotFoundError TokenUsage TraceNotFoundError",
    "usage.span_costs": "CostTracking",
    "usage.pricing": "TraceCost",
    "tracker": "BudgetAlert CostSnapshot",
    "archive.parquet": "enable_trace_archive export_traces_to_parquet",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
