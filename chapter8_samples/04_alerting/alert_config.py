"""8.4.1 アラートの設計: しきい値のルールを YAML か Python で書く。

MLflow には、トレースの指標で通知するしくみがまだない。ここでは、記録済みのトレースと評価から指標を
求め、発報(鳴り始め)と解消を判定して通知する。決して鳴らないルールや、存在しない通知先への経路は、
起動時にまとめてエラーにする。
YAML で書いた例は、部品の ``alerting/rules/alerts.yaml`` にある。

実行::

    $ python chapter8_samples/04_alerting/alert_config.py
    [発報] CRITICAL high_error_rate エラー率が 5% 超 (error_rate 0.52, しきい値 0.05, 標本数 25)
    [解消] CRITICAL high_error_rate 発報時の内容: エラー率が 5% 超 (error_rate 0, ...)
    障害は 20 分から 30 分。通知した時刻: firing 26 分、resolved 40 分
    値をそのまま 5% と比べていたら: 通知 15 通

Databricks では ``tracking_uri="databricks"`` とし、``once`` を定期ジョブにする。状態ファイルは
Volume に置く。
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta, timezone

from chapter8_samples.alerting import (
    AlertConfig,
    AlertRule,
    ConsoleNotificationHandler,
    Inhibit,
    MultiChannelNotifier,
    MuteWindow,
    load_config,
    notifier_from_config,
)
from chapter8_samples.alerting.engine import AlertEngine, Notifier
from chapter8_samples.alerting.metrics import metric_source

# サポートボットのルール。数値は、自分のアプリの目標に合わせて変える
ERRORS = AlertRule(
    name="high_error_rate",
    metric="error_rate",
    window="5m",
    threshold=0.05,
    clear_threshold=0.03,  # 5% の前後で揺れても、鳴り直さない
    confidence=0.995,  # 偶然の揺れでは鳴らない(二項検定)
    low_traffic_confidence=0.9999999,  # 標本が 200 件未満の間は、こちら(この実行例も)
    for_="30s",
    keep_firing_for="5m",
    severity="critical",
    action="rollback",
    summary="エラー率が 5% 超",
)
QUALITY = AlertRule(
    name="ungrounded_answers",
    metric="pass_rate:groundedness_check",  # 8.3 のスコアラーの名前を続ける
    window="6h",
    op="<",
    threshold=0.8,
    min_samples=50,
    summary="根拠のある回答が 80% 未満",
)
TRAFFIC = AlertRule(
    name="traffic_lost",
    metric="trace_count",
    window="1h",
    compare="1w",  # しきい値は、先週の同じ時間に対する比になる
    op="<",
    threshold=0.05,
    min_samples=100,
    summary="リクエストが先週の 5% 未満",
)


def support_bot_alerts() -> AlertConfig:
    """ルールに、知らせない時間帯と抑制を添えた設定。"""
    night = MuteWindow(
        match={"severity": "warning"}, start="22:00", end="07:00", timezone="Asia/Tokyo"
    )
    # エラーで呼び出した後は、同じサービスの警告を重ねて送らない
    quiet = Inhibit(
        when={"name": "high_error_rate"}, mute={"severity": "warning"}, equal=("service",)
    )
    return AlertConfig(
        labels={"service": "support-bot"},
        rules=(ERRORS, QUALITY, TRAFFIC),
        mute=(night,),
        inhibit=(quiet,),
    )


def setup_alerting(
    experiment_name: str,
    config: AlertConfig | Mapping[str, object] | str | os.PathLike[str] | None = None,
    notifier: Notifier | None = None,
    *,
    tracking_uri: str | None = None,
    state_path: str | os.PathLike[str] | None = None,
    clock: Callable[[], datetime] = lambda: datetime.now(timezone.utc),
) -> AlertEngine:
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
    loaded = AlertConfig.default() if config is None else load_config(config)
    if loaded.receivers and notifier is None:
        notifier = notifier_from_config(loaded)
    source = metric_source(experiment_name, tracking_uri)
    return AlertEngine(
        replace(loaded, experiment=experiment_name),
        source,
        notifier,
        state_path=state_path,
        clock=clock,
        trace_url=source.trace_url,
    )


def main() -> None:
    """本物のトレースで 10 分の障害を起こし、1 分ごとに評価する。発報も解消も一度だけになる。"""
    import random

    import mlflow

    from chapter8_samples import _lab

    rng = random.Random(7)
    start = datetime(2026, 1, 1, 9, 0, tzinfo=timezone.utc)
    with _lab.sample("ch8-alert-config", fresh_store=True):
        for second in range(0, 45 * 60, 12):  # 45 分に 225 件。20 分から 30 分の間が障害
            incident = 20 * 60 <= second < 30 * 60
            began = round((start.timestamp() + second) * 1e9)
            span = mlflow.start_span_no_context("answer", start_time_ns=began)
            if rng.random() < (0.5 if incident else 0.02):
                span.set_status("ERROR")
            span.end(end_time_ns=began + 800_000_000)
        mlflow.flush_trace_async_logging()
        notifier = MultiChannelNotifier().add_handler("console", ConsoleNotificationHandler())
        engine = setup_alerting("ch8-alert-config", support_bot_alerts(), notifier)
        times: list[str] = []
        naive = 0
        for minute in range(10, 46):
            for alert in engine.evaluate(at=start + timedelta(minutes=minute)):
                times.append(f"{alert.status.value} {minute} 分")
            error_rate = engine.last_samples()["high_error_rate"].value
            if error_rate is not None and error_rate > 0.05:
                naive += 1
        print("障害は 20 分から 30 分。通知した時刻:", "、".join(times))
        print(f"値をそのまま 5% と比べていたら: 通知 {naive} 通")


if __name__ == "__main__":
    main()
