"""アラートのルールと設定。"""

from .checking import AlertConfigError
from .config import AlertConfig, Inhibit, MuteWindow
from .file import load_config
from .model import AlertRule, BurnRateRule, Rule
from .references import WATCHDOG
from .values import Duration, format_duration, parse_duration

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
]
