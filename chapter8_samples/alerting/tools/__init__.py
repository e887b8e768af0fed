"""ルールを試す道具と、ほかの監視基盤への書き出し。"""

from .backtest import RecordedTraces, Replay, RuleReplay, replay
from .exports import to_databricks_alert, to_prometheus_rules, watched_series

__all__ = [
    "RecordedTraces",
    "Replay",
    "RuleReplay",
    "replay",
    "to_databricks_alert",
    "to_prometheus_rules",
    "watched_series",
]
