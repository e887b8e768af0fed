"""8.4 アラートとロールバック。"""

from .._sections import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    alert_config="setup_alerting AlertConfig Inhibit MuteWindow load_config",
    alert_rules="AlertConfigError AlertRule BurnRateRule",
    alert_engine="AlertEngine",
    alert_replay="RecordedTraces Replay SyntheticTraffic replay",
    alert_exports="to_alertmanager_config to_databricks_alert to_prometheus_rules",
    alert_delivery=(
        "Alert AlertSeverity AlertStatus Delivery NotificationConfigError "
        "NotificationHandler RetryPolicy"
    ),
    notification_handlers=(
        "ConsoleNotificationHandler MultiChannelNotifier PagerDutyNotificationHandler "
        "SlackNotificationHandler"
    ),
    notification_channels=(
        "AlertmanagerNotificationHandler EmailNotificationHandler "
        "TeamsNotificationHandler notifier_from_config"
    ),
    webhook_signature=(
        "ReplayGuard SignedWebhookNotificationHandler WebhookRefusedError "
        "alert_from_mlflow_webhook verify_signature"
    ),
    trace_metrics="MetricSample MetricSourceError",
    in_process_metrics="InProcessMetricSource",
    heartbeat_push="HeartbeatPush",
    serving_traffic="shift_serving_traffic",
    rollback="ModelRollbackManager PromptRollbackManager get_champion_version quick_rollback",
    alias_journal="Change RollbackError",
    rollback_on_alert="RollbackDecision auto_rollback",
    aliased_prompt="AliasedModel AliasedPrompt",
)
