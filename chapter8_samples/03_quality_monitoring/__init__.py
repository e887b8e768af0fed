"""8.3 品質の監視。"""

from .._sections import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    scorer_setup=(
        "setup_quality_scorers ScorerPlan ScorerSetupError ScorerStatus "
        "evaluate_with_scorers setup_builtin_scorers setup_custom_guidelines_scorer "
        "setup_scorers"
    ),
    scorer_lifecycle=(
        "RECOMMENDED_SAMPLE_RATES ScorerNotFoundError change_sample_rate "
        "delete_all_scorers demonstrate_scorer_lifecycle estimate_monthly_judge_cost "
        "get_scorer_status list_scorer_statuses pause_scorer remove_scorer resume_scorer "
        "server_scored_until set_trace_archive stop_all_scorers"
    ),
    correction_dataset="corrections_to_dataset",
    custom_scorers="CustomScorerError setup_custom_code_scorer validate_custom_scorer",
    judge_endpoint="JudgeEndpointError ensure_judge_endpoint",
    scoring_cycle="run_scoring_cycle",
    scoring_plan=(
        "BudgetError JudgeNotConfiguredError JudgePrice ScoringError ScoringOptions ScoringReport "
        "ScoringTarget"
    ),
    feedback_collection=(
        "FeedbackCollector FeedbackType IssueType Severity log_issue_report "
        "log_rating_feedback log_text_feedback log_thumbs_feedback log_user_correction "
        "pseudonymize"
    ),
    feedback_api="create_feedback_router",
    feedback_delivery=(
        "FeedbackDeliveryError FeedbackError FeedbackRequest FeedbackValidationError "
        "TraceNotFoundError send_feedback"
    ),
    feedback_outbox="FeedbackOutbox ReplayReport",
    feedback_summary="FeedbackSummary summarize_feedback",
    backfill_scorers=(
        "BackfillError BackfillReport backfill backfill_date_range backfill_last_week "
        "backfill_new_scorer backfill_with_custom_sample_rates backfill_with_scorer_names"
    ),
)
