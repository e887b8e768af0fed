"""アラートの評価と、再起動で忘れない状態。"""

from .engine import AlertEngine, Notifier
from .file import StateHeldError, read_state
from .state import RuleState

__all__ = ["AlertEngine", "Notifier", "RuleState", "StateHeldError", "read_state"]
