"""アラートのルールと設定。"""

from .config import WATCHDOG, AlertConfig, Inhibit, MuteWindow
from .file import delivery_problems, load_config
from .model import (
    AlertConfigError,
    AlertRule,
    BurnRateRule,
    Duration,
    Rule,
    format_duration,
    parse_duration,
)

__all__ = [
    "WATCHDOG",
    "AlertConfig",
    "AlertConfigError",
    "AlertRule",
    "BurnRateRule",
    "Duration",
    "Inhibit",
    "MuteWindow",
    "Rule",
    "delivery_problems",
    "format_duration",
    "load_config",
    "parse_duration",
]
