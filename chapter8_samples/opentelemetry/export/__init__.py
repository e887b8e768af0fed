"""OTLP の送信: 設定値、接続先の一覧、送信の開始と終了、届いたことの確認。"""

from .config import (
    OtlpConfig,
    OtlpConfigError,
    OtlpError,
    OtlpOptions,
    OtlpSetupError,
    OtlpStatus,
    OtlpTransportOptions,
)
from .delivery import (
    ConnectionCheck,
    DeliveryCounts,
    FlushReport,
    check_config,
    check_otlp_connection,
    delivery_counts,
    flush_all,
)
from .presets import PRESETS, OtlpPreset, preset
from .resolve import build_otlp_config, platform_resource, resolve_config
from .session import disable_otlp_export, otlp_status, start_otlp_export

__all__ = [
    "PRESETS",
    "ConnectionCheck",
    "DeliveryCounts",
    "FlushReport",
    "OtlpConfig",
    "OtlpConfigError",
    "OtlpError",
    "OtlpOptions",
    "OtlpPreset",
    "OtlpSetupError",
    "OtlpStatus",
    "OtlpTransportOptions",
    "build_otlp_config",
    "check_config",
    "check_otlp_connection",
    "delivery_counts",
    "disable_otlp_export",
    "flush_all",
    "otlp_status",
    "platform_resource",
    "preset",
    "resolve_config",
    "start_otlp_export",
]
