"""8.4.1 アラートの設計: しきい値のルールを YAML か Python で書く。"""

import os
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from . import AlertConfig, AlertRule
from .engine import AlertEngine, Notifier
ERRORS = AlertRule(name='high_error_rate', metric='error_rate', window='5m', threshold=0.05, clear_threshold=0.03, confidence=0.995, low_traffic_confidence=0.9999999, for_='30s', keep_firing_for='5m', severity='critical', action='rollback', summary='エラー率が 5% 超')
QUALITY = AlertRule(name='ungrounded_answers', metric='pass_rate:groundedness_check', window='6h', op='<', threshold=0.8, min_samples=50, summary='根拠のある回答が 80% 未満')
TRAFFIC = AlertRule(name='traffic_lost', metric='trace_count', window='1h', compare='1w', op='<', threshold=0.05, min_samples=100, summary='リクエストが先週の 5% 未満')

def support_bot_alerts() -> AlertConfig:
    """ルールに、知らせない時間帯と抑制を添えた設定。"""

def setup_alerting(experiment_name: str, config: AlertConfig | Mapping[str, object] | str | os.PathLike[str] | None=None, notifier: Notifier | None=None, *, tracking_uri: str | None=None, state_path: str | os.PathLike[str] | None=None, clock: Callable[[], datetime]=lambda: datetime.now(timezone.utc)) -> AlertEngine:
    """エクスペリメントのトレースを監視する ``AlertEngine`` を作る。

    Args:
        config: ``AlertConfig``、その辞書、YAML ファイルのパス。省略すると標準のルール。集計期間の
            終わりは、トレースが届くのを待つため、評価の時刻の ``offset`` (30 秒)前とする。
        notifier: 通知先。省略すると、設定の ``receivers`` から作る(秘密は環境変数から読む)。
            どちらもなければ、``evaluate`` の戻り値だけで知らせる。
        tracking_uri: 省略すると、環境の設定に従う。
        state_path: 状態ファイル。省略すると、再起動で状態を忘れる。複数のワーカーで動かすときは、
            同じファイルを渡す(渡さなければ、それぞれが知らせる)。

    Raises:
        AlertConfigError: 設定の誤り(すべてをまとめて報告する)。
        NotificationConfigError: 通知先の秘密が環境変数にない。
        MetricSourceError: エクスペリメントがない、または接続できない。
    """

def main() -> None:
    """本物のトレースで 10 分の障害を起こし、1 分ごとに評価する。発報も解消も一度だけになる。"""
