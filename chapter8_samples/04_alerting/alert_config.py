"""8.4.1 アラートの設計: しきい値のルールを YAML か Python で書く。

MLflow には、トレースの指標で通知するしくみがまだない。ここでは、記録済みのトレースと評価から指標を
求め、状態機械で発報と解消を決め、通知先に渡す。設定の誤りは、起動時にまとめて報告する。

実行::

    $ python chapter8_samples/04_alerting/alert_config.py
    [発報] CRITICAL high_error_rate エラー率が 5% 超 (error_rate 0.35, しきい値 0.05, 標本数 20)
    [解消] CRITICAL high_error_rate 発報時の内容: エラー率が 5% 超 (error_rate 0, ...)
    エラー率: 最小 0.00 最大 0.50
    値をそのまま 5% と比べていたら: 通知 14 通

Databricks では ``tracking_uri="databricks"`` とし、``once`` を定期ジョブにする。
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from chapter8_samples.alerting.rules.model import (
    DAYS,
    AlertConfigError,
    AlertRule,
    BurnRateRule,
    Duration,
    Rule,
    parse_clock,
    parse_duration,
    parse_zone,
    refusals,
)

if TYPE_CHECKING:
    from chapter8_samples.alerting.delivery.posting import Alert
    from chapter8_samples.alerting.engine import AlertEngine, Notifier

__all__ = [
    "AlertConfig",
    "AlertConfigError",
    "AlertRule",
    "BurnRateRule",
    "Inhibit",
    "MuteWindow",
    "load_config",
    "parse_duration",
    "setup_alerting",
]

WATCHDOG = "alert_evaluation_failed"
"""指標を求められないルールがあることを知らせる、組み込みのアラートの名前。"""


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
        same = all(alert.labels.get(k) == other.labels.get(k) for k in self.equal)
        mutual = alert.matches(self.when) and other.matches(self.mute)
        applies = alert.matches(self.mute) and other.matches(self.when)
        return same and applies and not mutual


@dataclass(frozen=True, kw_only=True)
class MuteWindow:
    """毎日(または決まった曜日)の、知らせない時間帯。夜をまたいでよい。

    ``start`` と ``end`` が同じなら 24 時間。曜日は、始まる日の曜日。
    """

    match: Mapping[str, str] = field(default_factory=dict[str, str])
    start: str = "00:00"
    end: str = "00:00"
    days: tuple[str, ...] = DAYS
    timezone: str = "UTC"

    def __post_init__(self) -> None:
        clocks = [("start", parse_clock, self.start), ("end", parse_clock, self.end)]
        found = refusals([*clocks, ("timezone", parse_zone, self.timezone)])
        found += [
            f"days: {day!r} is not one of {', '.join(DAYS)}" for day in self.days if day not in DAYS
        ]
        found += [] if self.days else ["days: the list is empty; name at least one"]
        if found:
            raise AlertConfigError([f"mute: {problem}" for problem in found])

    def covers(self, at: datetime) -> bool:
        """``at`` がこの時間帯か。"""
        local = at.astimezone(parse_zone(self.timezone))
        start, end, now = parse_clock(self.start), parse_clock(self.end), local.time()
        if start < end:
            return self._on(local) and start <= now < end
        return (self._on(local) and now >= start) or (
            self._on(local - timedelta(days=1)) and now < end
        )

    def _on(self, day: datetime) -> bool:
        return DAYS[day.weekday()] in self.days  # strftime("%a") は、ロケールによって「金」になる


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

    experiment: str = ""
    rules: Sequence[Rule] = ()
    offset: Duration = "30s"
    repeat: Duration | None = None
    evaluation_failure_for: Duration = "1m"
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    inhibit: tuple[Inhibit, ...] = ()
    mute: tuple[MuteWindow, ...] = ()
    receivers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    routes: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        names = [rule.name for rule in self.rules]
        found = [
            f"rules: duplicate name {n!r}" for n in sorted({n for n in names if names.count(n) > 1})
        ]
        found += [f"rules: {WATCHDOG!r} is a built-in alert; rename the rule"] * (WATCHDOG in names)
        durations = ("offset", "evaluation_failure_for", "repeat")
        found += refusals((key, parse_duration, getattr(self, key) or "0s") for key in durations)
        repeats = ((f"routes[{i}].repeat", r.get("repeat")) for i, r in enumerate(self.routes))
        found += refusals((key, parse_duration, value or "0s") for key, value in repeats)
        if found:
            raise AlertConfigError(found)

    @property
    def offset_delta(self) -> timedelta:
        """``offset`` の長さ。"""
        return parse_duration(self.offset)

    def repeat_for(self, alert: Alert) -> timedelta:
        """このアラートの通知を繰り返す間隔。0 は繰り返さない。"""
        matching = (route for route in self.routes if alert.matches(route.get("match", {})))
        route = next(matching, dict[str, Any]())
        return parse_duration(route.get("repeat") or self.repeat or "0s")

    @property
    def watchdog(self) -> AlertRule:
        """評価の失敗を知らせる、組み込みのルール。"""
        return AlertRule(
            name=WATCHDOG, for_=self.evaluation_failure_for, summary="alert rules could not be read"
        )

    def hold_and_keep(self, rule: Rule) -> tuple[timedelta, timedelta]:
        """``for_`` と ``keep_firing_for`` の長さ。"""
        return parse_duration(rule.for_), parse_duration(rule.keep_firing_for)

    def silences(self, alert: Alert, firing: Sequence[Alert], at: datetime) -> bool:
        """いまは知らせないか(抑制または時間帯)。"""
        if any(w.covers(at) and alert.matches(w.match) for w in self.mute):
            return True
        return any(i.applies(alert, other) for i in self.inhibit for other in firing)

    @classmethod
    def default(cls, experiment: str = "") -> AlertConfig:
        """LLM アプリの標準のルール。数値は自分のアプリの SLO に合わせて変える。"""
        rules = (
            AlertRule(
                name="high_error_rate",
                metric="error_rate",
                window="5m",
                threshold=0.05,
                clear_threshold=0.03,
                # 合成した通信で試した値: 障害 20 件と平穏な 480 時間で選び、誤報は 2 件。選ぶのに
                # 使わなかった乱数では、障害 40 件を 1.5 から 5 分で検知し、2,640 時間で誤報は 6 件
                confidence=0.99,
                for_="30s",
                keep_firing_for="5m",
                severity="critical",
                action="rollback",
                summary="エラー率が 5% 超",
            ),
            AlertRule(
                name="slow_p95",
                metric="latency_p95_ms",
                window="10m",
                threshold=10_000,
                clear_threshold=8_000,
                for_="2m",
                keep_firing_for="5m",
                min_samples=30,
                summary="遅延の p95 が 10 秒超",
            ),
            AlertRule(name="cost_per_hour", metric="cost_usd_per_hour", window="1h", threshold=10),
            AlertRule(
                name="no_traffic",
                metric="trace_count",
                window="10m",
                op="<",
                threshold=1,
                for_="10m",
                summary="10 分間トレースなし",
            ),
        )
        return cls(experiment=experiment, rules=rules)


def setup_alerting(
    experiment_name: str,
    config: AlertConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    notifier: Notifier | None = None,
    *,
    tracking_uri: str | None = None,
    state_path: str | os.PathLike[str] | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> AlertEngine:
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
    from chapter8_samples.alerting.delivery.channels import notifier_from_config
    from chapter8_samples.alerting.engine import AlertEngine
    from chapter8_samples.alerting.metrics.measures import metric_problem
    from chapter8_samples.alerting.metrics.source import TraceSearch, metric_source

    loaded = AlertConfig.default() if config is None else load_config(config)
    checked = ((r, metric_problem(r.metric, rate_for=_rate_for(r))) for r in loaded.rules)
    wrong = [f"rule {rule.name!r}: {problem}" for rule, problem in checked if problem]
    if wrong:
        raise AlertConfigError(wrong)
    if loaded.receivers and notifier is None:
        notifier = notifier_from_config(loaded)
    search = TraceSearch(experiment_name, tracking_uri)
    return AlertEngine(
        replace(loaded, experiment=experiment_name),
        metric_source(search),
        notifier,
        state_path=state_path,
        clock=clock,
        trace_url=search.trace_url,
    )


def _rate_for(rule: Rule) -> str:
    """割合の指標でなければ意味のない項目。なければ空。"""
    if isinstance(rule, BurnRateRule):
        return "a burn rate"
    return "" if rule.confidence is None else "confidence"


def load_config(config: AlertConfig | Mapping[str, Any] | str | os.PathLike[str]) -> AlertConfig:
    """``AlertConfig`` にする。誤りはまとめて ``AlertConfigError`` になる。"""
    if isinstance(config, AlertConfig):
        return config
    is_path = isinstance(config, str | os.PathLike)
    from chapter8_samples.alerting.rules.file import config_from_mapping, read_yaml

    return config_from_mapping(read_yaml(config) if is_path else config)


def main(argv: Sequence[str] | None = None) -> int:
    """引数があれば CLI(``alert_cli.py``)。なければ、障害が一度だけ発報し、解消することを見る。"""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments:
        from chapter8_samples.alerting import __main__ as alert_cli

        return alert_cli.main(arguments)
    from chapter8_samples import _lab

    _demo(_lab)
    return 0


def _demo(_lab: Any) -> None:
    """本物のトレースで 10 分の障害を起こし、1 分ごとに評価する。"""
    import random

    import mlflow

    from chapter8_samples.alerting.alert_config import setup_alerting
    from chapter8_samples.alerting.notification_handlers import (
        ConsoleNotificationHandler,
        MultiChannelNotifier,
    )

    rng = random.Random(7)
    start = datetime(2026, 1, 1, 9, 0, tzinfo=timezone.utc)
    with _lab.sample("ch8-alert-config", fresh_store=True):
        for second in range(0, 45 * 60, 15):  # 45 分に 180 件。20 分から 30 分の間が障害
            incident = 20 * 60 <= second < 30 * 60
            began = round((start.timestamp() + second) * 1e9)
            span = mlflow.start_span_no_context("answer", start_time_ns=began)
            if rng.random() < (0.4 if incident else 0.02):
                span.set_status("ERROR")
            span.end(end_time_ns=began + 800_000_000)
        mlflow.flush_trace_async_logging()
        notifier = MultiChannelNotifier().add_handler("console", ConsoleNotificationHandler())
        engine = setup_alerting("ch8-alert-config", notifier=notifier)
        naive, error_rates = 0, list[float]()
        for minute in range(10, 46):
            engine.evaluate(at=start + timedelta(minutes=minute))
            sample = engine.last_samples()["high_error_rate"]
            naive += (sample.value or 0) > 0.05
            error_rates.append(sample.value or 0)
        print(f"エラー率: 最小 {min(error_rates):.2f} 最大 {max(error_rates):.2f}")
        print(f"値をそのまま 5% と比べていたら: 通知 {naive} 通")


if __name__ == "__main__":
    sys.exit(main())
