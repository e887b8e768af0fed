"""アラートの配送: 型、再試行、通知先、署名。"""

from .alert import (
    Alert,
    AlertSeverity,
    AlertStatus,
    Delivery,
    NotificationConfigError,
    NotificationHandler,
    fingerprint,
)
from .channels import (
    AlertmanagerNotificationHandler,
    EmailNotificationHandler,
    TeamsNotificationHandler,
    handlers_from_config,
    label_name,
)
from .fanout import Fanout, unreached
from .posting import HttpHandler, HttpPoster, RetryPolicy
from .signature import (
    ReplayGuard,
    SignedWebhookNotificationHandler,
    WebhookRefusedError,
    verify_signature,
)
from .texts import (
    encodable,
    json_bytes,
    one_line,
    pagerduty_event,
    pagerduty_payload,
    slack_message,
)

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
