"""通知(Webhook)と OTLP の受信側。実体は `webhook_receiver` と `otlp_receiver` にある。"""

from .otlp_receiver import (
    OtlpReceiver,
    ReceivedEvent,
    ReceivedMetric,
    ReceivedRequest,
    ReceivedSpan,
)
from .webhook_receiver import Answer, Received, WebhookReceiver

__all__ = [
    "Answer",
    "OtlpReceiver",
    "Received",
    "ReceivedEvent",
    "ReceivedMetric",
    "ReceivedRequest",
    "ReceivedSpan",
    "WebhookReceiver",
]
