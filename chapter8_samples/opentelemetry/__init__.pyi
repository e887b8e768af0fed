from .export.config import OtlpConfig as OtlpConfig
from .export.config import OtlpConfigError as OtlpConfigError
from .export.config import OtlpSetupError as OtlpSetupError
from .export.config import OtlpStatus as OtlpStatus
from .export.config import build_otlp_config as build_otlp_config
from .export.delivery import ConnectionCheck as ConnectionCheck
from .export.delivery import FlushReport as FlushReport
from .export.delivery import check_config as check_config
from .export.delivery import check_otlp_connection as check_otlp_connection
from .export.delivery import flush_all as flush_all
from .export.presets import OtlpPreset as OtlpPreset
from .export.presets import preset as preset
from .export.session import disable_otlp_export as disable_otlp_export
from .export.session import otlp_status as otlp_status
from .genai.metrics import GenAIMetrics as GenAIMetrics
from .genai.metrics import setup_genai_metrics as setup_genai_metrics
from .genai.semconv import GENAI_SEMANTIC_CONVENTIONS as GENAI_SEMANTIC_CONVENTIONS
from .genai.semconv import find_semconv_gaps as find_semconv_gaps
from .genai.semconv import print_semantic_conventions as print_semantic_conventions
from .otlp_setup import setup_otlp_export as setup_otlp_export
from .otlp_setup import setup_otlp_for_datadog as setup_otlp_for_datadog
from .otlp_setup import setup_otlp_for_grafana_tempo as setup_otlp_for_grafana_tempo
from .otlp_setup import setup_otlp_for_jaeger as setup_otlp_for_jaeger
from .otlp_setup import setup_otlp_via_collector as setup_otlp_via_collector
from .web import trace_http_requests as trace_http_requests
from .web import use_unified_tracer_provider as use_unified_tracer_provider

__all__ = ['ConnectionCheck', 'FlushReport', 'GENAI_SEMANTIC_CONVENTIONS', 'GenAIMetrics', 'OtlpConfig', 'OtlpConfigError', 'OtlpPreset', 'OtlpSetupError', 'OtlpStatus', 'build_otlp_config', 'check_config', 'check_otlp_connection', 'disable_otlp_export', 'find_semconv_gaps', 'flush_all', 'otlp_status', 'preset', 'print_semantic_conventions', 'setup_genai_metrics', 'setup_otlp_export', 'setup_otlp_for_datadog', 'setup_otlp_for_grafana_tempo', 'setup_otlp_for_jaeger', 'setup_otlp_via_collector', 'trace_http_requests', 'use_unified_tracer_provider']
