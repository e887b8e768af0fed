"""8.4.1 アラートの設計: しきい値のルールを YAML か Python で書く。"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import Any
from .alert_rules import DAYS, AlertRule, Duration, Rule
from .alert_delivery import Alert
from .alert_engine import AlertEngine, Notifier
WATCHDOG = 'alert_evaluation_failed'

@dataclass(frozen=True, kw_only=True)
class Inhibit:
    """``when`` に合うアラートの発報中は、``mute`` に合うアラートを知らせない。

    ``equal`` のラベルが両方で同じときだけ働く。互いに抑え合う組では、どちらも抑えない
    (Alertmanager と同じ。でなければ、両方とも誰にも知らされない)。
    """
    when: Mapping[str, str]
    mute: Mapping[str, str]
    equal: tuple[str, ...] = ()

    def applies(self, alert: Alert, other: Alert) -> bool:
        """``other`` の発報中に ``alert`` を抑えるか。"""

@dataclass(frozen=True, kw_only=True)
class MuteWindow:
    """毎日(または決まった曜日)の、知らせない時間帯。夜をまたいでよい。

    ``start`` と ``end`` が同じなら 24 時間。曜日は、始まる日の曜日。
    """
    match: Mapping[str, str] = field(default_factory=dict[str, str])
    start: str = '00:00'
    end: str = '00:00'
    days: tuple[str, ...] = DAYS
    timezone: str = 'UTC'

    def __post_init__(self) -> None:
        ...

    def covers(self, at: datetime) -> bool:
        """``at`` がこの時間帯か。"""

    def _on(self, day: datetime) -> bool:
        ...

@dataclass(frozen=True, kw_only=True)
class AlertConfig:
    """ルールの集まりと、評価のしかた。

    Args:
        offset: 窓の終わりを、いまからどれだけ遡らせるか。トレースは終わってから届くので、
            遅いリクエストが届くだけの長さにする。
        repeat: 発報中の通知を繰り返す間隔。省略すると繰り返さない。経路(``routes``)ごとの
            ``repeat`` が先に使われる。
        evaluation_failure_for: ルールの評価の失敗がこれだけ続いたら知らせる。
    """
    experiment: str = ''
    rules: Sequence[Rule] = ()
    offset: Duration = '30s'
    repeat: Duration | None = None
    evaluation_failure_for: Duration = '1m'
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    inhibit: tuple[Inhibit, ...] = ()
    mute: tuple[MuteWindow, ...] = ()
    receivers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    routes: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        ...

    @property
    def offset_delta(self) -> timedelta:
        """``offset`` の長さ。"""

    def repeat_for(self, alert: Alert) -> timedelta:
        """このアラートの通知を繰り返す間隔。0 は繰り返さない。"""

    @property
    def watchdog(self) -> AlertRule:
        """評価の失敗を知らせる、組み込みのルール。"""

    def hold_and_keep(self, rule: Rule) -> tuple[timedelta, timedelta]:
        """``for_`` と ``keep_firing_for`` の長さ。"""

    def silences(self, alert: Alert, firing: Sequence[Alert], at: datetime) -> bool:
        """いまは知らせないか(抑制または時間帯)。"""

    @classmethod
    def default(cls, experiment: str='') -> AlertConfig:
        """LLM アプリの標準のルール。数値は自分のアプリの SLO に合わせて変える。"""

def setup_alerting(experiment_name: str, config: AlertConfig | Mapping[str, Any] | str | os.PathLike[str] | None=None, notifier: Notifier | None=None, *, tracking_uri: str | None=None, state_path: str | os.PathLike[str] | None=None, clock: Callable[[], datetime]=lambda: datetime.now(timezone.utc)) -> AlertEngine:
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

def load_config(config: AlertConfig | Mapping[str, Any] | str | os.PathLike[str]) -> AlertConfig:
    """``AlertConfig`` にする。誤りはまとめて ``AlertConfigError`` になる。"""

def main(argv: Sequence[str] | None=None) -> int:
    """引数があれば CLI(``alert_cli.py``)。なければ、障害が一度だけ発報し、解消することを見る。"""
