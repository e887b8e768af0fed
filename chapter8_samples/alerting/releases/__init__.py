"""モデルとプロンプトの版: 変更の記録、エイリアス、ロールバックの判断。"""

from .aliased import AliasedModel, AliasedPrompt, AliasUnavailableError
from .errors import (
    ConcurrentChangeError,
    CooldownError,
    GateRefusedError,
    KnownBadVersionError,
    NoHistoryError,
    RollbackError,
    SameVersionError,
    UnknownVersionError,
    VerificationError,
)
from .journal import Change
from .on_alert import RollbackDecision, auto_rollback
from .switch import AliasRollback
from .targets import AliasTarget, ModelAlias, PromptAlias
from .traffic import ServingTrafficError, shift_serving_traffic

__all__ = [
    "AliasRollback",
    "AliasTarget",
    "AliasUnavailableError",
    "AliasedModel",
    "AliasedPrompt",
    "Change",
    "ConcurrentChangeError",
    "CooldownError",
    "GateRefusedError",
    "KnownBadVersionError",
    "ModelAlias",
    "NoHistoryError",
    "PromptAlias",
    "RollbackDecision",
    "RollbackError",
    "SameVersionError",
    "ServingTrafficError",
    "UnknownVersionError",
    "VerificationError",
    "auto_rollback",
    "shift_serving_traffic",
]
