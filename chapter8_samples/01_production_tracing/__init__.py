"""8.1 本番環境のトレーシング。"""

from .._sections import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    basic_setup="setup_production_tracing reset_production_tracing tracing_status",
    export_profiles="EXPORT_PROFILES TracingSetupError TracingStatus",
    call_overhead="restore_call_overhead trim_call_overhead",
    autologging="enable_autologging",
    graceful_shutdown="GracefulShutdownHandler setup_graceful_shutdown tracing_lifespan",
    trace_flush="FlushResult flush_traces",
    trace_spool="TraceSpool",
    metadata_tagging=(
        "RequestContext RequestContextMiddleware add_trace_metadata find_traces "
        "incoming_trace init_flask outgoing_headers request_scope run_with_context"
    ),
    manual_spans="atraced_stream record_error traced_step traced_stream",
    pii_masking="mask_pii",
    sampling_strategies=(
        "AdaptiveSampler ConditionalSampler KeepRules ProbabilisticSampler "
        "WeightedEstimates weighted_estimates"
    ),
    tail_sampling="Decision TraceSummary",
)
