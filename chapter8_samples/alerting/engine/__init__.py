"""アラートの評価と、再起動で忘れない状態。"""

from .engine import AlertEngine, Notifier
from .file import StateHeldError
from .state import RuleState

__all__ = ["AlertEngine", "Notifier", "RuleState", "StateHeldError"]
