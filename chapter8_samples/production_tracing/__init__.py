"""8.1 本番環境のトレーシング。

本書のファイル(``01_production_tracing/``)も、この名前の下で import できる。
公開名は、使われたときに読み込む。
"""

__path__.append(__path__[0].removesuffix("production_tracing") + "01_production_tracing")

import sys
from importlib import import_module
from threading import RLock

_MODULES = {
    "basic_setup": (
        "setup_production_tracing EXPORT_PROFILES reset_production_tracing tracing_status"
    ),
    "graceful_shutdown": "setup_graceful_shutdown tracing_lifespan",
    "metadata_tagging": (
        "RequestContext RequestContextMiddleware add_trace_metadata find_traces "
        "init_flask request_scope"
    ),
    "sampling_strategies": (
        "AdaptiveSampler ConditionalSampler ProbabilisticSampler "
        "WeightedEstimates weighted_estimates"
    ),
    "autologging": "enable_autologging",
    "log_context": "TraceContextFilter",
    "propagation": "incoming_trace outgoing_headers run_with_context",
    "spans": "atraced_stream record_error traced_step traced_stream",
    "masking": "mask_pii",
    "policies": "Decision KeepRules TraceSummary",
    "delivery.flush": "FlushResult flush_traces",
    "delivery.settings": "TracingSetupError TracingStatus",
    "delivery.shutdown": "GracefulShutdownHandler",
    "delivery.spool": "TraceSpool",
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
