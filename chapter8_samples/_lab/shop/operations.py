"""チャット画面の横で動く運用: 採点し、アラートを評価し、リリースを戻し、起きたことを並べる。

本番と違うのはアラートの集計期間だけで、結果をすぐ見られるように 30 秒に縮めてある。
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

from mlflow.genai.scorers import RetrievalGroundedness

from chapter8_samples.alerting import (
    Alert,
    AlertConfig,
    AlertRule,
    AlertStatus,
    ConsoleNotificationHandler,
    MultiChannelNotifier,
    PromptRollbackManager,
    auto_rollback,
    setup_alerting,
)
from chapter8_samples.quality_monitoring import ScorerPlan, run_scoring_cycle, setup_scorers

from .support_bot import BAD_PROMPT, GOOD_PROMPT, PROMPT_NAME, forget_releases, register_release
from .traffic import Traffic

logger = logging.getLogger(__name__)

JUDGE_MODEL, QUALITY = "openai:/gpt-4.1-mini", "groundedness_check"
QUALITY_FLOOR, ALERT_SECONDS, MIN_SAMPLES = 0.8, 30, 8
BURST, PORTION = 30, 5
"""1 回に送る質問の数と、途中でやめられる単位。"""
LOOKBACK = timedelta(minutes=5)
CHECK_SECONDS = 1.0
RECOVERY_PAUSE_SECONDS = 2.0
RECOVERY_SECONDS = 120.0
"""戻した後に、回復を確かめる質問を送り続ける長さ。"""
"""監視の間隔と、戻した後に回復を確かめる質問を送る間隔。"""


@dataclass(frozen=True, kw_only=True)
class Event:
    """時系列に並べる出来事。``url`` は、例のトレースを開くリンク(なければ空)。"""

    kind: str
    text: str
    at: str
    url: str


class OperationRefusedError(RuntimeError):
    """いまはできない操作。文面は画面にそのまま出す。"""


def quality_rule(seconds: float = ALERT_SECONDS, min_samples: int = MIN_SAMPLES) -> AlertRule:
    """根拠のない答えが増えたら人を呼び、直前のリリースを戻すルール。集計期間は秒。"""
    return AlertRule(
        name="answers_not_grounded",
        metric=f"pass_rate:{QUALITY}",
        window=timedelta(seconds=seconds),
        op="<",
        threshold=QUALITY_FLOOR,
        clear_threshold=0.9,
        confidence=0.95,
        min_samples=min_samples,
        severity="critical",
        action="rollback",
        summary="資料に根拠のない答えが増えています",
    )


class Operations:
    """リリース、アクセス、採点、アラート、ロールバックを受け持つ。どのスレッドから呼んでもよい。

    Args:
        experiment: トレースのあるエクスペリメントの名前(すでにあるもの)。
        traffic: サンプルの質問を送るもの。
    """

    def __init__(self, experiment: str, traffic: Traffic) -> None:
        self.experiment, self.traffic = experiment, traffic
        self._problem = ""
        self._events: deque[Event] = deque(maxlen=50)
        self._sending, self._releasing = threading.Lock(), threading.Lock()
        self._rolled_back = False
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._scorers = setup_scorers(
            experiment,
            [ScorerPlan(scorer=RetrievalGroundedness(name=QUALITY, model=JUDGE_MODEL))],
        )
        notifier = MultiChannelNotifier().add_handler("console", ConsoleNotificationHandler())
        config = AlertConfig(rules=(quality_rule(),), offset="0s")
        self.engine = setup_alerting(experiment, config, notifier)
        forget_releases()
        self.releases = PromptRollbackManager(PROMPT_NAME, cooldown_seconds=1)
        self.good_version = register_release(GOOD_PROMPT, "資料だけで短く答える")
        self.releases.promote(self.good_version, reason="最初のリリース")

    # 操作 ------------------------------------------------------------------

    def release_bad_prompt(self) -> None:
        """悪いプロンプトを新しい版として登録し、本番のエイリアスを移す。"""
        with self._releasing:
            if self.current_version() != self.good_version:
                raise OperationRefusedError("悪いプロンプトは、もう本番に出ています。")
            version = register_release(BAD_PROMPT, "詳しく答える")
            self.releases.promote(version, reason="もっと詳しい案内に変更")
            self._rolled_back = False
            self._note("release", f"v{version} をリリース(もっと詳しい案内に変更)")

    def send_burst(self) -> None:
        """サンプルの質問を、別のスレッドで ``BURST`` 件送る。"""
        if not self._sending.acquire(blocking=False):
            raise OperationRefusedError("質問を送っている途中です。終わるまで待ってください。")
        self._start(self._burst)

    def current_version(self) -> str:
        """本番のプロンプトの版。"""
        return str(self.releases.current_version())

    # 監視 ------------------------------------------------------------------

    def start_watching(self) -> None:
        """別のスレッドで、採点とアラートの評価を続ける。"""
        self._start(self._watch)

    def stop(self) -> None:
        """スレッドを、始めた分だけ終わらせて止める。"""
        self._stop.set()
        for thread in self._threads:
            thread.join(15)

    def check(self) -> None:
        """新しい答えを採点してルールを評価し、発報したらリリースを戻し、回復を確かめる。"""
        run_scoring_cycle(self.experiment, self._scorers, lookback=LOOKBACK, flush=False)
        for alert in self.engine.evaluate():
            self._answer(alert)
        if self._recovering() and self._sending.acquire(blocking=False):
            self._start(self._recover)

    def status(self) -> dict[str, Any]:
        """画面に出す、いまの様子。"""
        version = self.current_version()
        return {
            "version": version,
            "healthy_version": version == self.good_version,
            "recovering": self._recovering(),
            "sending": self._sending.locked(),
            "problem": self._problem,
            "alert": self._alert_status(),
            "next_step": self._next_step(version == self.good_version),
            "events": [asdict(event) for event in self._events],
        }

    def _answer(self, alert: Alert) -> None:
        share = f"根拠あり {alert.value or 0:.0%}、{alert.n} 件"
        if alert.status is AlertStatus.RESOLVED:
            self._rolled_back = False
            self._note("resolved", f"アラートが解消しました({share})")
            return
        self._note("alert", f"{alert.summary}({share})", next(iter(alert.links.values()), ""))
        with self._releasing:
            decision = auto_rollback(alert, self.releases, mode="apply")
        change = decision.change
        if decision.outcome == "applied" and change is not None:
            self._rolled_back = True
            move = f"v{change.from_version} から v{change.to_version}"
            self._note("rollback", f"{move} に自動で戻しました")
        else:
            self._note("suggest", "戻すリリースがありません。人の判断を待ちます")

    def _alert_status(self) -> dict[str, Any]:
        rule = quality_rule()
        sample = self.engine.last_samples().get(rule.name)
        return {
            "firing": self._firing(),
            "summary": rule.summary,
            "value": sample.value if sample else None,
            "n": sample.n if sample else 0,
            "threshold": rule.threshold,
        }

    def _firing(self) -> bool:
        return any(alert.name == quality_rule().name for alert in self.engine.active())

    def _recovering(self) -> bool:
        return self._rolled_back and self._firing()

    def _next_step(self, healthy: bool) -> str:
        if self._recovering():
            return "回復を確かめる質問を送っています。悪い答えが集計期間から外れると解消します。"
        if self._firing():
            return "自動では戻せません。原因を調べてください。"
        if not healthy:
            return "質問を送ってください。答えが採点されると、アラートが検知します。"
        return "悪いプロンプトをリリースすると、アラートとロールバックを試せます。"

    def _note(self, kind: str, text: str, url: str = "") -> None:
        at = datetime.now(timezone.utc).isoformat()
        self._events.append(Event(kind=kind, text=text, at=at, url=url))

    # スレッド ---------------------------------------------------------------

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="chat-operations", daemon=True)
        self._threads = [*(t for t in self._threads if t.is_alive()), thread]
        thread.start()

    def _burst(self) -> None:
        try:
            for _ in range(BURST // PORTION):
                if self._stop.is_set():
                    return
                self.traffic.send(PORTION)
        finally:
            self._sending.release()

    def _recover(self) -> None:
        """アラートが解消するまで、質問を少しずつ送る。解消しなければ、期限でやめる。"""
        deadline = time.monotonic() + RECOVERY_SECONDS
        try:
            while self._recovering() and not self._stop.wait(RECOVERY_PAUSE_SECONDS):
                if time.monotonic() >= deadline:
                    self._rolled_back = False
                    self._note("alert", "戻しても回復しません。ほかの原因を調べてください")
                    return
                self.traffic.send(PORTION)
        finally:
            self._sending.release()

    def _watch(self) -> None:
        while not self._stop.wait(CHECK_SECONDS):
            try:
                self.check()
                self._problem = ""
            except Exception as error:  # 監視を止めず、理由を画面に出して次の回を待つ
                logger.warning("the check failed: %s", error)
                self._problem = "トレースを読めません。端末の表示を確かめてください。"
