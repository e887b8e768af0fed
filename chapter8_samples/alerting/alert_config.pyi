"""8.4.1 アラートの設計: しきい値のルールを YAML か Python で書く。"""

import os
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from . import AlertConfig
from .engine import AlertEngine, Notifier

def support_bot_alerts() -> AlertConfig:
    """サポートボットのルール。数値は、自分のアプリの目標に合わせて変える。"""

def setup_alerting(experiment_name: str, config: AlertConfig | Mapping[str, object] | str | os.PathLike[str] | None=None, notifier: Notifier | None=None, *, tracking_uri: str | None=None, state_path: str | os.PathLike[str] | None=None, clock: Callable[[], datetime]=lambda: datetime.now(timezone.utc)) -> AlertEngine:
    """エクスペリメントのトレースを見張る ``AlertEngine`` を作る。

    Args:
        config: ``AlertConfig``、その辞書、YAML ファイルのパス。省略すると標準のルール。
        notifier: 通知先。省略すると、設定の ``receivers`` から作る(秘密は環境変数から読む)。
            どちらもなければ、``evaluate`` の戻り値だけで知らせる。
        tracking_uri: 省略すると、環境の設定に従う。
        state_path: 状態ファイル。省略すると、再起動で状態を忘れる。

    Raises:
        AlertConfigError: 設定の誤り(すべてをまとめて報告する)。
        NotificationConfigError: 通知先の秘密が環境変数にない。
        MetricSourceError: エクスペリメントがない、または接続できない。
    """

def main() -> None:
    """本物のトレースで 10 分の障害を起こし、1 分ごとに評価する。発報も解消も一度だけになる。"""
