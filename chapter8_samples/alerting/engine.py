"""8.4.1 アラートの状態機械: 発報は一度、解消も一度。

しきい値を越えるたびに通知すると、揺れる指標では 6 時間に 56 回鳴る。待ち時間(for)と発報の維持
(keep_firing_for)を備えた状態機械と、再起動で忘れない状態ファイルがあれば、発報と解消の 2 回で済む。

Databricks でもそのまま使う。ジョブで定期的に動かすなら、状態ファイルを Volume に置く。
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Protocol

from .delivery import Alert, AlertSeverity, AlertStatus, Delivery, fingerprint
from .metrics import MetricSample, MetricSource
from .rules import AlertConfig, Rule

logger = logging.getLogger(__name__)

STATE_VERSION = 1
PHASES = ("inactive", "pending", "firing")


class Notifier(Protocol):
    """``MultiChannelNotifier`` の、ここで使う部分。"""

    def notify(
        self, alerts: Alert | Iterable[Alert], *, only: Iterable[str] | None = None
    ) -> list[Delivery]:
        """送って、結果を返す。"""
        ...

    def keep_alive(self, alerts: Sequence[Alert]) -> list[Delivery]:
        """送り直しが必要な通知先へ、発報中のものを送る。"""
        ...


@dataclass
class RuleState:
    """一つのルールの状態。日時は UTC。"""

    phase: str = "inactive"
    """inactive、pending、firing。"""
    since: datetime | None = None
    """今の phase になった時刻。"""
    fired_at: datetime | None = None
    """最後に発報した時刻。解消の通知にも同じ値が入る。"""
    last_true: datetime | None = None
    value: float | None = None
    n: int = 0
    notified_at: datetime | None = None
    """発報を最後に知らせた時刻。知らせていなければ ``None``。"""
    acknowledged: bool = False
    examples: list[str] = field(default_factory=list[str])
    told: dict[str, Any] | None = None
    """知らせた発報。ルールを設定から消しても、同じ相手に解消を知らせられるように残す。"""

    def enter(self, phase: str, at: datetime) -> None:
        """次の phase に移る。"""
        self.phase, self.since = phase, at

    def advance(
        self, breached: bool | None, at: datetime, hold: timedelta, keep: timedelta
    ) -> None:
        """判定を一つ受け取って進む。``None``(標本なし)では何も変わらない。

        時計が戻ったら、未来になった記録を ``at`` に直す(でないと、追いつくまで発報も解消もない)。

        Args:
            hold: pending でいる期間(``for``)。
            keep: 戻ってから解消までの期間(``keep_firing_for``)。
        """
        for key in ("since", "last_true", "notified_at"):
            if (noted := getattr(self, key)) and noted > at:
                setattr(self, key, at)
        if breached:
            self.last_true = at
            if self.phase == "inactive":
                self.enter("pending", at)
            if self.phase == "pending" and at - (self.since or at) >= hold:
                self.enter("firing", at)
                self.fired_at = at
        elif breached is False:
            calm = at - (self.last_true or at) >= keep
            if self.phase == "pending" or (self.phase == "firing" and calm):
                self.enter("inactive", at)


class StateFile:
    """状態を JSON で残す。書き換えは一瞬で入れ替わり、壊れたファイルは脇に退ける。"""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def load(self) -> dict[str, Any]:
        """前回の状態。ファイルがない、または壊れていれば空。"""
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["version"] != STATE_VERSION:
                raise ValueError(f"version {data['version']}")
            _ = [_state_from(s) for s in data["rules"].values()]
            for entry in data["outbox"]:
                Alert.from_dict(entry["alert"])
                _check_names(entry["only"] or [])
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            aside = self.path.with_suffix(self.path.suffix + ".bad")
            self.path.replace(aside)
            logger.warning(
                "alert state %s is unreadable (%s); moved to %s", self.path, error, aside
            )
            return {}
        return data

    def save(self, data: Mapping[str, Any]) -> None:
        """書き込む。"""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        text = json.dumps({"version": STATE_VERSION, **data}, ensure_ascii=False, default=_iso)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)


def _iso(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"cannot write {type(value).__name__} to the alert state")


def _check_names(value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{value!r} is not a list of names")


def _state_from(data: Mapping[str, Any]) -> RuleState:
    fields = dict(data)
    if fields["phase"] not in PHASES or (fields["phase"] != "inactive" and not fields["since"]):
        raise ValueError(f"phase {fields['phase']!r} since {fields['since']!r}")
    if not isinstance(fields.get("value"), int | float | None):
        raise ValueError(f"value {fields['value']!r}")
    _check_names(fields.get("examples", []))
    if fields.get("told") is not None:
        Alert.from_dict(fields["told"])
    for key in ("since", "fired_at", "last_true", "notified_at"):
        fields[key] = datetime.fromisoformat(data[key]) if data[key] else None
    return RuleState(**fields)


def utc_now() -> datetime:
    """いまの UTC。"""
    return datetime.now(timezone.utc)


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

    def __init__(
        self,
        config: AlertConfig,
        source: MetricSource,
        notifier: Notifier | None = None,
        *,
        state_path: str | os.PathLike[str] | None = None,
        clock: Callable[[], datetime] = utc_now,
        trace_url: Callable[[str], str] | None = None,
    ) -> None:
        self.config, self.source, self.notifier = config, source, notifier
        self._clock, self._trace_url = clock, trace_url
        self._file = StateFile(state_path) if state_path else None
        self._lock = threading.RLock()
        saved = self._file.load() if self._file else {}
        self._states = {k: _state_from(s) for k, s in saved.get("rules", {}).items()}
        self._outbox: list[dict[str, Any]] = saved.get("outbox", [])
        self._samples: dict[str, MetricSample] = {}
        self.last_evaluated_at: datetime | None = None
        self.failures: dict[str, str] = {}
        """直近の評価で失敗したルールと理由。状態ファイルを書けなければ ``alert_state``。"""
        self.last_deliveries: list[Delivery] = []

    def evaluate(self, at: datetime | None = None) -> list[Alert]:
        """一度だけ評価し、知らせるべき変化(発報、解消)を返す。通知先があれば送る。"""
        with self._lock:
            at = at or self._clock()
            self.failures = {}
            # 長い窓から読むと、短い窓は読んだものの一部で済む
            for rule in sorted(self.config.rules, key=lambda r: -r.queries()[0][1]):
                self._evaluate_rule(rule, at)
            watchdog = self.config.watchdog
            hold, keep = self.config.hold_and_keep(watchdog)
            self._state(watchdog).advance(bool(self.failures), at, hold, keep)
            alerts = self._due(at)
            self._outbox += [{"alert": alert.to_dict(), "only": None} for alert in alerts]
            self.last_evaluated_at = at
            self._save()  # 送る前に残す: 送信中に落ちても、次に起動したときに送る
            self._send()
            self._save()
            return alerts

    def active(self) -> list[Alert]:
        """発報中のアラート(抑制中のものも含む)。"""
        with self._lock:
            pairs = self._all_rules()
            return [self._alert(r, s, AlertStatus.FIRING) for r, s in pairs if s.phase == "firing"]

    def last_samples(self) -> dict[str, MetricSample]:
        """ルールの名前 -> 直近に求めた値(図に使う)。"""
        with self._lock:
            return dict(self._samples)

    def phases(self) -> dict[str, str]:
        """ルールの名前 -> inactive、pending、firing。"""
        with self._lock:
            return {rule.name: state.phase for rule, state in self._all_rules()}

    def acknowledge(self, name: str) -> None:
        """対応中とする(ルールの名前か ``fingerprint``)。解消するまで、繰り返しの通知を止める。"""
        with self._lock:
            for rule, state in self._all_rules():
                if name in (rule.name, self._key(rule)):
                    state.acknowledged = True
                    self._save()
                    return
        raise KeyError(f"no rule named {name!r}")

    def run_forever(
        self,
        interval_seconds: float,
        *,
        stop: threading.Event | None = None,
        heartbeat: Callable[[], object] | None = None,
    ) -> None:
        """``stop`` が立つまで評価し続ける。``heartbeat`` は評価が終わるたびに呼ばれる。"""
        stop = stop or threading.Event()
        while not stop.is_set():
            try:
                self.evaluate()
                if heartbeat:
                    heartbeat()
            except Exception:  # 監視そのものが止まるより、記録して次の回に賭ける
                logger.exception("alert evaluation failed")
            stop.wait(interval_seconds)

    def _evaluate_rule(self, rule: Rule, at: datetime) -> None:
        try:
            end = at - self.config.offset_delta
            samples = [self.source.sample(metric, window, end) for metric, window in rule.queries()]
            state = self._state(rule)
            breached = rule.judge(samples, state.phase == "firing")
            state.advance(breached, at, *self.config.hold_and_keep(rule))
        except Exception as error:  # 一つのルールの失敗で他を止めない
            logger.warning("rule %s could not be evaluated: %s", rule.name, error)
            self.failures[rule.name] = f"{type(error).__name__}: {error}"
            return
        self._samples[rule.name] = samples[0]
        state.value, state.n = samples[0].value, samples[0].n

    def _due(self, at: datetime) -> list[Alert]:
        firing = self.active()
        found: list[Alert] = []
        for rule, state in self._all_rules():
            if state.phase == "firing":
                alert = self._alert(rule, state, AlertStatus.FIRING)
                if self._should_notify(state, alert, at) and not self.config.silences(
                    alert, firing, at
                ):
                    state.examples = self._examples(rule, at)
                    state.notified_at = at
                    alert = self._alert(rule, state, AlertStatus.FIRING)
                    state.told = alert.to_dict()
                    found.append(alert)
            elif state.notified_at is not None:
                found.append(self._alert(rule, state, AlertStatus.RESOLVED))
                state.notified_at, state.acknowledged, state.examples = None, False, []
                state.told = None
        return found + self._close_removed_rules(at)

    def _close_removed_rules(self, at: datetime) -> list[Alert]:
        """発報中に消したルール(名前やラベルの変更も)の解消。でないと、相手では開いたままになる。"""
        known = {self._key(rule) for rule, _ in self._all_rules()}
        gone = [self._states.pop(key) for key in list(self._states) if key not in known]
        told = [Alert.from_dict(state.told) for state in gone if state.told]
        return [
            replace(alert, status=AlertStatus.RESOLVED, ends_at=max(at, alert.starts_at))
            for alert in told
        ]

    def _should_notify(self, state: RuleState, alert: Alert, at: datetime) -> bool:
        if state.notified_at is None:
            return True
        repeat = self.config.repeat_for(alert)
        return bool(repeat) and not state.acknowledged and at - state.notified_at >= repeat

    def _examples(self, rule: Rule, at: datetime) -> list[str]:
        if rule.name == self.config.watchdog.name:
            return []
        metric, window = rule.queries()[-1]
        try:
            return self.source.examples(metric, window, at - self.config.offset_delta)
        except Exception as error:  # 例がなくてもアラートは出す
            logger.warning("no example traces for %s: %s", rule.name, error)
            return []

    def _alert(self, rule: Rule, state: RuleState, status: AlertStatus) -> Alert:
        failures = "; ".join(f"{k}: {v}" for k, v in sorted(self.failures.items()))
        watchdog, url = rule.name == self.config.watchdog.name, self._trace_url
        measured: dict[str, Any] = {
            "metric": rule.metric,
            "value": state.value,
            "threshold": rule.threshold,
            "n": state.n,
            "window_seconds": rule.queries()[0][1].total_seconds(),
        }
        starts_at = state.fired_at or state.since or self._clock()
        ends_at = max(state.since or starts_at, starts_at)  # 時計が戻っても、始まりより前にしない
        return Alert(
            name=rule.name,
            summary=failures[:500] if watchdog and failures else rule.summary,
            severity=AlertSeverity(rule.severity),
            status=status,
            **({} if watchdog else measured),
            starts_at=starts_at,
            ends_at=ends_at if status is AlertStatus.RESOLVED else None,
            labels={**self.config.labels, **rule.labels},
            examples=tuple(state.examples),
            links={t: link for t in state.examples if url and (link := url(t))},
            runbook_url=rule.runbook_url,
            action=rule.action,
        )

    def _state(self, rule: Rule) -> RuleState:
        return self._states.setdefault(self._key(rule), RuleState())

    def _key(self, rule: Rule) -> str:
        return fingerprint(rule.name, {**self.config.labels, **rule.labels})

    def _all_rules(self) -> list[tuple[Rule, RuleState]]:
        return [(r, self._state(r)) for r in (*self.config.rules, self.config.watchdog)]

    def _send(self) -> None:
        entries, self._outbox = self._outbox, []
        if self.notifier is None:
            return
        self.last_deliveries = []
        for entry in _latest(entries):
            try:
                alert = Alert.from_dict(entry["alert"])
                deliveries = self.notifier.notify(alert, only=entry["only"])
            except Exception as error:  # 通知先の誤りで評価を止めない。次の評価で送り直す
                logger.error("the notifier raised %s", type(error).__name__)
                self._outbox.append(entry)
                continue
            self.last_deliveries += deliveries
            if again := [d.handler for d in deliveries if not d.ok and d.retryable]:
                self._outbox.append({**entry, "only": again})
        heard = [  # まだ知らせていないもの(抑制中、時間帯)は、送り直しもしない
            self._alert(rule, state, AlertStatus.FIRING)
            for rule, state in self._all_rules()
            if state.phase == "firing" and state.notified_at
        ]
        try:
            self.last_deliveries += self.notifier.keep_alive(heard)
        except Exception as error:  # 次の評価でまた送る
            logger.error("the notifier raised %s", type(error).__name__)

    def _save(self) -> None:
        if self._file is None:
            return
        rules = {key: asdict(state) for key, state in self._states.items()}
        data = {"rules": rules, "outbox": self._outbox, "evaluated_at": self.last_evaluated_at}
        try:
            self._file.save(data)
        except OSError as error:  # ディスクが満杯でも、通知は送る
            logger.error("alert state %s was not saved: %s", self._file.path, error)
            self.failures["alert_state"] = f"{type(error).__name__}: {error}"


def _latest(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """同じアラートの古い通知を捨てる。古い発報が解消の後に届くと、開いたままになる。"""
    newest = {entry["alert"]["fingerprint"]: entry for entry in entries}
    return [entry for entry in entries if newest[entry["alert"]["fingerprint"]] is entry]
