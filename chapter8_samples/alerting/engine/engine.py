"""8.4.1 アラートの評価と通知: 発報は一度、解消も一度。

しきい値を越えるたびに通知すると、揺れる指標では 6 時間に 56 回鳴る。待ち時間(for)と発報の維持
(keep_firing_for)を備えた状態機械と、再起動で忘れない状態ファイルがあれば、発報と解消の 2 回で済む。

通知は、送る前と届いた後に記録する。その間に落ちたときだけ、次の評価がもう一度送る(PagerDuty や
Alertmanager は、``fingerprint`` の同じものを一つにまとめる)。

Databricks でもそのまま使う。ジョブで定期的に動かすなら、状態ファイルを Volume に置く(``file.py``)。
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Protocol

from ..delivery import Alert, Delivery
from ..metrics import MetricSource
from ..rules import AlertConfig
from .board import RuleBoard
from .file import LEASE, StateFile, StateHeldError
from .state import Unsent

logger = logging.getLogger(__name__)


class Notifier(Protocol):
    """``MultiChannelNotifier`` の、ここで使う部分。"""

    def notify(
        self,
        alerts: Alert | Iterable[Alert],
        *,
        only: Mapping[str, Collection[str]] | None = None,
    ) -> list[Delivery]:
        """送って、結果を返す。``only`` は ``fingerprint`` -> まだ受け取っていない通知先。"""
        ...

    def keep_alive(self, alerts: Sequence[Alert]) -> list[Delivery]:
        """送り直しが必要な通知先へ、発報中のものを送る。"""
        ...


class AlertEngine(RuleBoard):
    """ルールを評価し、変化だけを知らせる。

    一つのルールの失敗は他を止めず、``alert_evaluation_failed`` というアラートになる。届かなかった
    通知は、次の評価で送り直す。

    Args:
        config: ルールと抑制の設定。
        source: 指標の出どころ。
        state_path: 状態ファイル。省略すると、再起動で状態を忘れる。
        trace_url: トレース ID から UI の URL を作る関数。
    """

    def __init__(
        self,
        config: AlertConfig,
        source: MetricSource,
        notifier: Notifier | None = None,
        *,
        state_path: str | os.PathLike[str] | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
        trace_url: Callable[[str], str] = lambda _: "",
    ) -> None:
        super().__init__(config, source, trace_url)
        self.notifier, self._clock = notifier, clock
        self._file = StateFile(state_path) if state_path else None
        self._outbox: dict[str, Unsent] = {}
        self._pending: set[str] = set()
        """まだ送っている途中のもの。"""
        self._stays = False

    def evaluate(self, at: datetime | None = None) -> list[Alert]:
        """一度だけ評価し、知らせるべき変化(発報、解消)を返す。通知先があれば送る。

        状態ファイルを読み書きできなくても通知は送り、``failures["alert_state"]`` に理由を残す。

        Raises:
            StateHeldError: 状態ファイルを、ほかのエンジンが使っている。
        """
        with self._lock:
            at = at or self._clock()
            self.failures = {}
            with self._held():
                alerts = self._judge(at)
                self._outbox |= {alert.fingerprint: Unsent(alert) for alert in alerts}
                self._save()
                self._send(self._outbox.values())
                self._save()
                self._keep_alive()
            return alerts

    def run_forever(self, interval_seconds: float, *, stop: threading.Event | None = None) -> None:
        """``stop`` が立つまで評価し続ける。

        その間、状態ファイルを手放さない。ほかのエンジンが使っていれば、それが終わるまで控えている。
        評価の途中で ``stop`` が立ったら、その通信が終わってから戻る。
        """
        stop = stop or threading.Event()
        self._stays = True
        waiting = False
        if self._file:
            self._file.lease = LEASE + timedelta(seconds=interval_seconds)
        while not stop.is_set():
            try:
                self.evaluate()
                waiting = False
            except StateHeldError as error:
                if not waiting:
                    logger.warning("standing by: %s", error)
                waiting = True
            except Exception:  # 監視そのものが止まるより、記録して次の回に任せる
                logger.exception("alert evaluation failed")
            stop.wait(interval_seconds)
        self.close()

    def close(self) -> None:
        """送っている途中だったものの結果を残し、状態ファイルを手放す。"""
        with self._lock:
            self._stays = False
            if self._pending:
                with self._held():
                    self._send([u for key, u in self._outbox.items() if key in self._pending])
                    self._save()
            else:
                self._use_file(StateFile.release)

    @contextmanager
    def _held(self) -> Generator[None]:
        """状態ファイルを使う。送っている途中のものがあれば、済んでも手放さない(二重に届く)。"""
        self._use_file(self._load)
        try:
            yield
        finally:
            if not (self._stays or self._pending):
                self._use_file(StateFile.release)

    def _load(self, file: StateFile) -> None:
        if saved := file.hold():
            self._states, self._outbox = saved.rules, saved.outbox

    def _save(self) -> None:
        self._use_file(lambda file: file.save(self._states, self._outbox))

    def _use_file(self, work: Callable[[StateFile], None]) -> None:
        if self._file is None:
            return
        try:
            work(self._file)
        except OSError as error:  # ディスクが満杯でも、通知は送る
            logger.error("alert state is not saved: %s", error)
            self.failures["alert_state"] = f"{type(error).__name__}: {error}"

    def _send(self, entries: Collection[Unsent]) -> None:
        """送る。届かなかったものは残る。"""
        self._pending = set()
        alerts = [entry.alert for entry in entries]
        only = {entry.alert.fingerprint: entry.only for entry in entries if entry.only}
        try:
            deliveries = self.notifier.notify(alerts, only=only) if self.notifier and alerts else []
        except Exception as error:  # 通知先の誤りで評価を止めない。次の評価で送り直す
            logger.error("the notifier raised %s", type(error).__name__)
            return
        self._pending = {delivery.fingerprint for delivery in deliveries if delivery.pending}
        owed: dict[str, set[str]] = {}
        for delivery in deliveries:
            if delivery.retryable and not delivery.ok:
                owed.setdefault(delivery.fingerprint, set()).add(delivery.handler)
        for alert in alerts:
            self._outbox.pop(alert.fingerprint, None)
            if names := owed.get(alert.fingerprint):
                self._outbox[alert.fingerprint] = Unsent(alert, tuple(sorted(names)))

    def _keep_alive(self) -> None:
        if self.notifier is None:
            return
        # まだ知らせていないもの(抑制中、時間帯)は、送り直しもしない
        heard = [
            self._alert(rule, s) for rule, s in self._pairs() if s.phase == "firing" and s.told
        ]
        try:
            self.notifier.keep_alive(heard)
        except Exception as error:  # 次の評価でまた送る
            logger.error("the notifier raised %s", type(error).__name__)
