"""通知(Webhook)と OTLP の受信側。実体は `webhook_receiver` と `otlp_receiver` にある。"""

from .http_server import Answer, Received
from .otlp_receiver import OtlpReceiver, ReceivedSpan
from .webhook_receiver import WebhookReceiver

__all__ = ["Answer", "OtlpReceiver", "Received", "ReceivedSpan", "WebhookReceiver"]
