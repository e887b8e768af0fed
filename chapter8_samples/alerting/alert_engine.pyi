"""8.4.1 アラートの状態機械: 発報は一度、解消も一度。"""

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Protocol
from .alert_delivery import Alert, AlertStatus, Delivery
from .alert_config import AlertConfig
from .alert_rules import Rule
from .trace_metrics import MetricSample, MetricSource
logger = logging.getLogger(__name__)
STATE_VERSION = 1
PHASES = ('inactive', 'pending', 'firing')

class Notifier(Protocol):
    """``MultiChannelNotifier`` の、ここで使う部分。"""

    def notify(self, alerts: Alert | Iterable[Alert], *, only: Iterable[str] | None=None) -> list[Delivery]:
        """送って、結果を返す。"""

    def keep_alive(self, alerts: Sequence[Alert]) -> list[Delivery]:
        """送り直しが必要な通知先へ、発報中のものを送る。"""

@dataclass
class RuleState:
    """一つのルールの状態。日時は UTC。"""
    phase: str = 'inactive'
    'inactive、pending、firing。'
    since: datetime | None = None
    '今の phase になった時刻。'
    fired_at: datetime | None = None
    '最後に発報した時刻。解消の通知にも同じ値が入る。'
    last_true: datetime | None = None
    value: float | None = None
    n: int = 0
    notified_at: datetime | None = None
    '発報を最後に知らせた時刻。知らせていなければ ``None``。'
    acknowledged: bool = False
    examples: list[str] = field(default_factory=list[str])
    told: dict[str, Any] | None = None
    '知らせた発報。ルールを設定から消しても、同じ相手に解消を知らせられるように残す。'

    def enter(self, phase: str, at: datetime) -> None:
        """次の phase に移る。"""

    def advance(self, breached: bool | None, at: datetime, hold: timedelta, keep: timedelta) -> None:
        """判定を一つ受け取って進む。``None``(標本なし)では何も変わらない。

        時計が戻ったら、未来になった記録を ``at`` に直す(でないと、追いつくまで発報も解消もない)。

        Args:
            hold: pending でいる期間(``for``)。
            keep: 戻ってから解消までの期間(``keep_firing_for``)。
        """

class StateFile:
    """状態を JSON で残す。書き換えは一瞬で入れ替わり、壊れたファイルは脇に退ける。"""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def load(self) -> dict[str, Any]:
        """前回の状態。ファイルがない、または壊れていれば空。"""

    def save(self, data: Mapping[str, Any]) -> None:
        """書き込む。"""

def _state_from(data: Mapping[str, Any]) -> RuleState:
    ...

def utc_now() -> datetime:
    """いまの UTC。"""

class AlertEngine:
    """ルールを評価し、変化だけを知らせる。

    一つのルールの失敗は他を止めず、``alert_evaluation_failed`` というアラートになる。届かなかった
    通知は次の評価で送り直す。同じ状態ファイルを複数のプロセスで使ってはならない(通知が重複する)。

    Args:
        config: ルールと抑制の設定。
        source: 指標の出どころ。
        state_path: 状態ファイル。省略すると、再起動で状態を忘れる。
        trace_url: トレース ID から UI の URL を作る関数。
    """

    def __init__(self, config: AlertConfig, source: MetricSource, notifier: Notifier | None=None, *, state_path: str | os.PathLike[str] | None=None, clock: Callable[[], datetime]=utc_now, trace_url: Callable[[str], str] | None=None) -> None:
        self.config, self.source, self.notifier = (config, source, notifier)
        self._clock, self._trace_url = (clock, trace_url)
        self._file = StateFile(state_path) if state_path else None
        self._lock = threading.RLock()
        self._states = {k: _state_from(s) for k, s in saved.get('rules', {}).items()}
        self._outbox: list[dict[str, Any]] = saved.get('outbox', [])
        self._samples: dict[str, MetricSample] = {}
        self.last_evaluated_at: datetime | None = None
        self.failures: dict[str, str] = {}
        self.last_deliveries: list[Delivery] = []

    def evaluate(self, at: datetime | None=None) -> list[Alert]:
        """一度だけ評価し、知らせるべき変化(発報、解消)を返す。通知先があれば送る。"""

    def active(self) -> list[Alert]:
        """発報中のアラート(抑制中のものも含む)。"""

    def last_samples(self) -> dict[str, MetricSample]:
        """ルールの名前 -> 直近に求めた値(図に使う)。"""

    def phases(self) -> dict[str, str]:
        """ルールの名前 -> inactive、pending、firing。"""

    def acknowledge(self, name: str) -> None:
        """対応中とする(ルールの名前か ``fingerprint``)。解消するまで、繰り返しの通知を止める。"""

    def run_forever(self, interval_seconds: float, *, stop: threading.Event | None=None, heartbeat: Callable[[], object] | None=None) -> None:
        """``stop`` が立つまで評価し続ける。``heartbeat`` は評価が終わるたびに呼ばれる。"""

    def _evaluate_rule(self, rule: Rule, at: datetime) -> None:
        ...

    def _due(self, at: datetime) -> list[Alert]:
        ...

    def _close_removed_rules(self, at: datetime) -> list[Alert]:
        """発報中に消したルール(名前やラベルの変更も)の解消。でないと、相手では開いたままになる。"""

    def _should_notify(self, state: RuleState, alert: Alert, at: datetime) -> bool:
        ...

    def _examples(self, rule: Rule, at: datetime) -> list[str]:
        ...

    def _alert(self, rule: Rule, state: RuleState, status: AlertStatus) -> Alert:
        ...

    def _state(self, rule: Rule) -> RuleState:
        ...

    def _key(self, rule: Rule) -> str:
        ...

    def _all_rules(self) -> list[tuple[Rule, RuleState]]:
        ...

    def _send(self) -> None:
        ...

    def _save(self) -> None:
        ...

def main() -> None:
    """揺れるエラー率を 30 秒ごとに評価し、再起動をはさんでも通知が 2 通で済むことを見る。"""
