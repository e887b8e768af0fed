"""8.5 OpenTelemetry との連携。

本書のファイル(``05_opentelemetry/``)も、この名前の下で import できる。
公開名は、使われたときに読み込む。
"""

if __name__ == "opentelemetry":  # OpenTelemetry 本体と取り違えられた
    raise ImportError(
        f"{__path__[0]!r} was found instead of the OpenTelemetry package because the folder above "
        "it is on sys.path (as working directory, PYTHONPATH or script folder): start Python from "
        "another directory, or move it into a package of your own (app/opentelemetry)"
    )

__path__.append(__path__[0].removesuffix("opentelemetry") + "05_opentelemetry")

import sys
from importlib import import_module
from threading import RLock

_MODULES = {
    "otlp_setup": (
        "setup_otlp_export setup_otlp_for_datadog setup_otlp_for_grafana_tempo "
        "setup_otlp_for_jaeger setup_otlp_via_collector"
    ),
    "export.config": "OtlpConfig OtlpConfigError OtlpSetupError OtlpStatus",
    "export.environment": "build_otlp_config",
    "export.check": "ConnectionCheck check_otlp_connection",
    "export.delivery": "FlushReport flush_all",
    "export.presets": "preset",
    "export.session": "disable_otlp_export otlp_status",
    "genai.conventions": "GENAI_SEMANTIC_CONVENTIONS",
    "genai.evaluation": "EvaluationEvents setup_evaluation_events",
    "genai.semconv": "find_semconv_gaps print_semantic_conventions",
    "genai.metrics": "GenAIMetrics setup_genai_metrics",
    "native": "setup_native_tracing traced annotate_span NativeStatus NativeTracing",
    "web": "trace_http_requests use_unified_tracer_provider",
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
