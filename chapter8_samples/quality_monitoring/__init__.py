"""8.3 品質の監視。

本書のファイル(``03_quality_monitoring/``)も、この名前の下で import できる。
公開名は、使われたときに読み込む。
"""

__path__.append(__path__[0].removesuffix("quality_monitoring") + "03_quality_monitoring")

import sys
from importlib import import_module
from threading import RLock

_MODULES = {
    "scorer_setup": (
        "setup_quality_scorers evaluate_with_scorers setup_builtin_scorers "
        "setup_custom_guidelines_scorer"
    ),
    "scorer_lifecycle": (
        "RECOMMENDED_SAMPLE_RATES change_sample_rate delete_all_scorers "
        "demonstrate_scorer_lifecycle get_scorer_status "
        "list_scorer_statuses pause_scorer remove_scorer resume_scorer stop_all_scorers"
    ),
    "feedback_collection": (
        "FeedbackCollector log_issue_report log_rating_feedback log_text_feedback "
        "log_thumbs_feedback log_user_correction send_feedback withdraw_feedback"
    ),
    "backfill_scorers": (
        "backfill backfill_date_range backfill_last_week backfill_new_scorer "
        "backfill_with_custom_sample_rates backfill_with_scorer_names"
    ),
    "feedback.corrections": "corrections_to_dataset",
    "feedback.kinds": (
        "FeedbackDeliveryError FeedbackError FeedbackNotAllowedError FeedbackRequest FeedbackType "
        "FeedbackValidationError IssueType Severity TraceNotFoundError pseudonymize"
    ),
    "feedback.outbox": "FeedbackOutbox OutboxStatus ReplayReport",
    "feedback.router": "create_feedback_router",
    "feedback.summary": "FeedbackSummary summarize_feedback",
    "scoring.custom": "CustomScorerError setup_custom_code_scorer validate_custom_scorer",
    "scoring.cycle": "run_scoring_cycle",
    "scoring.gate": "ReleaseComparison ReleaseRun compare_releases",
    "scoring.judge_endpoint": "JudgeEndpointError ensure_judge_endpoint",
    "scoring.judges": (
        "BudgetError JudgeNotConfiguredError JudgePrice ScorerSetupError ScoringError"
    ),
    "scoring.lease": "ScoringBusyError",
    "scoring.backfills": "BackfillError",
    "scoring.plan": "ScorerPlan ScoringOptions ScoringReport ScoringTarget",
    "scoring.registry": (
        "ScorerNotFoundError ScorerStatus estimate_monthly_judge_cost setup_scorers"
    ),
    "scoring.verdicts": "VerdictComparison compare_verdicts",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]
# 最初の import が複数のスレッドで同時に起きても、作りかけのモジュールを渡さない。MLflow も同時の
# import に弱いので、ロックは節ごとではなく、いちばん上のパッケージに 1 つ置く
_IMPORTING = vars(sys.modules[__name__.partition(".")[0]]).setdefault("_IMPORTING", RLock())


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _IMPORTING:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
