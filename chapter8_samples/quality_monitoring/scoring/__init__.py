"""採点: 計画、エンジン、定期的な採点、登録、ジャッジの接続先、コードのスコアラー。"""

from .custom import CustomScorerError, setup_custom_code_scorer, validate_custom_scorer
from .cycle import run_scoring_cycle
from .engine import score_traces
from .judge_endpoint import JudgeEndpointError, ensure_judge_endpoint, judge_endpoint_exists
from .judges import (
    DEFAULT_JUDGE,
    BudgetError,
    JudgeNotConfiguredError,
    JudgePrice,
    ScoringError,
    require_judges,
)
from .plan import (
    FINISHED_TRACES,
    ProgressCallback,
    ScoringOptions,
    ScoringReport,
    ScoringTarget,
    show_progress,
)
from .registry import (
    KeptSetting,
    ScorerNotFoundError,
    ScorerPlan,
    ScorerSetupError,
    ScorerStatus,
    apply_setting,
    check_sample_rate,
    detect_backend,
    find_status,
    keep_setting,
    kept_setting,
    setup_scorers,
    status_of,
)

__all__ = [
    "DEFAULT_JUDGE",
    "FINISHED_TRACES",
    "BudgetError",
    "CustomScorerError",
    "JudgeEndpointError",
    "JudgeNotConfiguredError",
    "JudgePrice",
    "KeptSetting",
    "ProgressCallback",
    "ScorerNotFoundError",
    "ScorerPlan",
    "ScorerSetupError",
    "ScorerStatus",
    "ScoringError",
    "ScoringOptions",
    "ScoringReport",
    "ScoringTarget",
    "apply_setting",
    "check_sample_rate",
    "detect_backend",
    "ensure_judge_endpoint",
    "find_status",
    "judge_endpoint_exists",
    "keep_setting",
    "kept_setting",
    "require_judges",
    "run_scoring_cycle",
    "score_traces",
    "setup_custom_code_scorer",
    "setup_scorers",
    "show_progress",
    "status_of",
    "validate_custom_scorer",
]
