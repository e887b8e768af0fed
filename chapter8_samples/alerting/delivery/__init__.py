"""アラートの配送: 型、再試行、通知先、署名。"""

from .channels import (
    AlertmanagerNotificationHandler,
    EmailNotificationHandler,
    TeamsNotificationHandler,
    handlers_from_config,
    label_name,
)
from .fanout import Fanout, unreached
from .posting import (
    Alert,
    AlertSeverity,
    AlertStatus,
    Delivery,
    HttpHandler,
    HttpPoster,
    NotificationConfigError,
    NotificationHandler,
    RetryPolicy,
    encodable,
    fingerprint,
    json_bytes,
)
from .signature import (
    ReplayGuard,
    SignedWebhookNotificationHandler,
    WebhookRefusedError,
    alert_from_mlflow_webhook,
    verify_signature,
)
from .texts import one_line, pagerduty_event, pagerduty_payload, slack_message

__all__ = [
    "Alert",
    "AlertSeverity",
    "AlertStatus",
    "AlertmanagerNotificationHandler",
    "Delivery",
    "EmailNotificationHandler",
    "Fanout",
    "HttpHandler",
    "HttpPoster",
    "NotificationConfigError",
    "NotificationHandler",
    "ReplayGuard",
    "RetryPolicy",
    "SignedWebhookNotificationHandler",
    "TeamsNotificationHandler",
    "WebhookRefusedError",
    "alert_from_mlflow_webhook",
    "encodable",
    "fingerprint",
    "handlers_from_config",
    "json_bytes",
    "label_name",
    "one_line",
    "pagerduty_event",
    "pagerduty_payload",
    "slack_message",
    "unreached",
    "verify_signature",
]
