"""8.5 OpenTelemetry との連携。"""

from .._sections import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    otlp_setup=(
        "setup_otlp_export disable_otlp_export otlp_status setup_otlp_for_datadog "
        "setup_otlp_for_grafana_tempo setup_otlp_for_jaeger setup_otlp_via_collector"
    ),
    otlp_config="OtlpConfig OtlpConfigError OtlpSetupError OtlpStatus build_otlp_config",
    otlp_delivery="ConnectionCheck FlushReport check_config check_otlp_connection flush_all",
    otlp_presets="OtlpPreset preset",
    genai_semconv="GENAI_SEMANTIC_CONVENTIONS find_semconv_gaps print_semantic_conventions",
    genai_metrics="GenAIMetrics setup_genai_metrics",
    unified_provider="trace_http_requests use_unified_tracer_provider",
)
