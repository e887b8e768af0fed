"""アラートのルールと設定。

``alerts.yaml`` が主な項目の例で、``file.py`` がそれを読む。ルールの型と判定は ``model.py`` に、
設定全体の型は ``config.py`` にある。残りは誤りを見つける部分で、使うだけなら読まなくてよい。
"""

from ..durations import Duration, format_duration, parse_duration
from .checking import AlertConfigError
from .config import AlertConfig, Inhibit, MuteWindow
from .file import load_config
from .model import AlertRule, BurnRateRule, Rule
from .values import Severity

__all__ = [
    "AlertConfig",
    "AlertConfigError",
    "AlertRule",
    "BurnRateRule",
    "Duration",
    "Inhibit",
    "MuteWindow",
    "Rule",
    "Severity",
    "format_duration",
    "load_config",
    "parse_duration",
]
