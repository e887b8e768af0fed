"""アラートのルールと設定。"""

from .config import WATCHDOG, AlertConfig, Inhibit, MuteWindow
from .file import load_config
from .model import (
    AlertConfigError,
    AlertRule,
    BurnRateRule,
    Duration,
    Rule,
    format_duration,
    parse_duration,
    wilson_bounds,
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
    "format_duration",
    "load_config",
    "parse_duration",
    "wilson_bounds",
]
