"""8.4 アラートとロールバック。

本書のファイル(``04_alerting/``)も、この名前の下で import できる。
公開名は、使われたときに読み込む。
"""

__path__.append(__path__[0].removesuffix("alerting") + "04_alerting")

import sys
from importlib import import_module
from threading import RLock

_MODULES = {
    "alert_config": "setup_alerting",
    "notification_handlers": (
        "ConsoleNotificationHandler MultiChannelNotifier PagerDutyNotificationHandler "
        "SlackNotificationHandler notifier_from_config"
    ),
    "rollback": "ModelRollbackManager PromptRollbackManager get_champion_version quick_rollback",
    "rules": ("AlertConfig AlertConfigError AlertRule BurnRateRule Inhibit MuteWindow load_config"),
    "metrics": "MetricSample MetricSourceError",
    "slo": "Slo",
    "engine": "AlertEngine StateHeldError",
    "delivery": (
        "Alert AlertSeverity AlertStatus Delivery NotificationConfigError NotificationHandler "
        "RetryPolicy AlertmanagerNotificationHandler EmailNotificationHandler "
        "TeamsNotificationHandler ReplayGuard SignedWebhookNotificationHandler "
        "WebhookRefusedError verify_signature"
    ),
    "releases": (
        "Change GateRefusedError RollbackError AliasedModel AliasedPrompt RollbackDecision "
        "auto_rollback shift_serving_traffic"
    ),
    "tools": "RecordedTraces Replay replay to_databricks_alert to_prometheus_rules",
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
