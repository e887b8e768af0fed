"""8.2 コストとトークンの追跡。

本書のファイル(``02_cost_tracking/``)も、この名前の下で import できる。
公開名は、使われたときに読み込む。
"""

__path__.append(__path__[0].removesuffix("cost_tracking") + "02_cost_tracking")

import sys
from importlib import import_module
from threading import RLock

_MODULES = {
    "token_tracking": (
        "setup_cost_tracking ModelUsage TokenTracking aggregate_token_usage_from_traces "
        "get_token_usage_from_trace price_trace setup_token_tracking usage_by_model"
    ),
    "cost_calculator": "CostCalculator CostTracker format_yen",
    "prices.call": "InvalidUsageError PriceBreakdown",
    "prices.model": (
        "CostError ModelPrice NoPriceError PriceNotEffectiveError PriceTableError UnknownModelError"
    ),
    "prices.table": "PriceTable",
    "usage.reader": "ExperimentNotFoundError TraceNotFoundError",
    "usage.calls": "TokenUsage",
    "usage.summary": "ModelTotals TokenUsageSummary",
    "usage.span_costs": "CostTracking",
    "usage.pricing": "TraceCost",
    "tracker": "BudgetAlert CostSnapshot",
    "archive.parquet": "enable_trace_archive export_traces_to_parquet",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
# 最初の import が複数のスレッドで同時に起きても、作りかけのモジュールを渡さない。MLflow も同時の
# import に弱いので、ロックは節ごとではなく、いちばん上のパッケージに 1 つ置く
_IMPORTING = vars(sys.modules[__name__.partition(".")[0]]).setdefault("_IMPORTING", RLock())


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _IMPORTING:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
