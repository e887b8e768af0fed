"""モデルとプロンプトの版: 変更の記録、エイリアス、ロールバックの判断。"""

from .aliased import AliasedModel, AliasedPrompt, AliasUnavailableError
from .journal import (
    AliasTarget,
    Change,
    ConcurrentChangeError,
    CooldownError,
    GateRefusedError,
    Journal,
    KnownBadVersionError,
    NoHistoryError,
    Options,
    RollbackError,
    SameVersionError,
    UnknownVersionError,
    VerificationError,
    done_changes,
    find_request,
    known_bad,
)
from .on_alert import RollbackDecision, auto_rollback
from .targets import ModelAlias, PromptAlias
from .traffic import ServingTrafficError, shift_serving_traffic

__all__ = [
    "AliasTarget",
    "AliasUnavailableError",
    "AliasedModel",
    "AliasedPrompt",
    "Change",
    "ConcurrentChangeError",
    "CooldownError",
    "GateRefusedError",
    "Journal",
    "KnownBadVersionError",
    "ModelAlias",
    "NoHistoryError",
    "Options",
    "PromptAlias",
    "RollbackDecision",
    "RollbackError",
    "SameVersionError",
    "ServingTrafficError",
    "UnknownVersionError",
    "VerificationError",
    "auto_rollback",
    "done_changes",
    "find_request",
    "known_bad",
    "shift_serving_traffic",
]
