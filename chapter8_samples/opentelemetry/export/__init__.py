"""OTLP の送信: 設定値、接続先の一覧、送信の開始と終了、届いたことの確認。"""

from .check import ConnectionCheck, check_otlp_connection
from .config import (
    OtlpConfig,
    OtlpConfigError,
    OtlpOptions,
    OtlpSetupError,
    OtlpStatus,
    OtlpTransportOptions,
)
from .delivery import FlushReport, flush_all
from .environment import build_otlp_config, platform_resource, resolve_config
from .presets import PRESETS, preset
from .session import disable_otlp_export, otlp_status, start_otlp_export

__all__ = [
    "PRESETS",
    "ConnectionCheck",
    "FlushReport",
    "OtlpConfig",
    "OtlpConfigError",
    "OtlpOptions",
    "OtlpSetupError",
    "OtlpStatus",
    "OtlpTransportOptions",
    "build_otlp_config",
    "check_otlp_connection",
    "disable_otlp_export",
    "flush_all",
    "otlp_status",
    "platform_resource",
    "preset",
    "resolve_config",
    "start_otlp_export",
]
