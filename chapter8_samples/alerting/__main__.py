"""8.4.4 アラートのコマンド: 検査、1 回の評価、監視、再生、書き出し、指標の公開。

    python -m chapter8_samples.alerting check alerts.yaml

cron やジョブからは ``once`` を、常駐させるなら ``watch`` を使う。終了コードは 0(正常)、1(発報中)、
2(設定の誤り、ファイルを読み書きできない、ほかのエンジンが状態ファイルを使っている)、3(指標を読めない。
通知先には知らせる)。``watch`` を二つ動かすと、二つ目は、一つ目が終わるまで控えている。

Databricks では ``once`` を定期ジョブにし、状態ファイルを Volume に置く
(``--state /Volumes/main/default/alerts/state.db``)。
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

from . import (
    AlertConfig,
    AlertConfigError,
    AlertEngine,
    MetricSourceError,
    MultiChannelNotifier,
    NotificationConfigError,
    load_config,
    notifier_from_config,
    replay,
    setup_alerting,
    to_prometheus_rules,
)
from .engine import StateHeldError
from .metrics import RowNumbers, RowSource, TraceSearch, metric_source, to_ms
from .metrics.exporter import MetricsCollector, serve_metrics
from .rules import parse_duration
from .tools import watched_series

CRON_STEP = timedelta(minutes=1)
"""cron で動かせる、最も短い間隔。"""
OK, FIRING, CONFIG_ERROR, SOURCE_ERROR = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """コマンドを実行し、終了コードを返す。"""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except (AlertConfigError, NotificationConfigError, StateHeldError, OSError) as error:
        print(error, file=sys.stderr)
        return CONFIG_ERROR
    except MetricSourceError as error:
        print(error, file=sys.stderr)
        return SOURCE_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="LLM アプリのアラート",
        epilog="終了コード: 0 正常、1 発報中、2 設定の誤り、3 指標を読めない",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _command(commands, "check", _check, "設定を検査する")
    once = _command(commands, "once", _once, "1 回だけ評価して通知する")
    watch = _command(commands, "watch", _watch, "評価し続ける")
    past = _command(commands, "replay", _replay, "過去のトレースで試す")
    metrics = _command(commands, "serve-metrics", _serve_metrics, "Prometheus に指標を公開する")
    metrics.add_argument("--port", type=_port, default=9464)
    metrics.add_argument("--address", default="127.0.0.1", help="待ち受けるアドレス")
    for made in (once, watch, past, metrics):
        made.add_argument("--experiment", help="設定の experiment の代わりに使う")
        made.add_argument("--tracking-uri")
    for made in (once, watch):
        made.add_argument("--state", default="alert_state.db", help="状態ファイル")
    once.set_defaults(wait_seconds=120.0)  # すぐに終わるので、送り終えるまで待つ
    watch.set_defaults(wait_seconds=5.0)
    watch.add_argument("--interval", type=_positive, help="評価の間隔(秒)。既定は設定の値か 30")
    past.add_argument("--hours", type=_positive, default=24.0, help="遡る時間")
    export = commands.add_parser("export", help="ほかの監視基盤の形で書き出す")
    formats = export.add_subparsers(required=True, metavar="FORMAT")
    _command(formats, "prometheus", _export_prometheus, "Prometheus のルールにする")
    return parser


def _command(
    group: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = group.add_parser(name, help=text, description=text)
    made.add_argument("config", help="alerts.yaml")
    made.set_defaults(run=run)
    return made


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1000000")
    return value


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port between 0 and 65535")
    return int(text)


def _check(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    print(f"OK: {len(config.rules)} rules, {len(config.receivers)} receivers")
    return OK


def _once(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    receivers = {settings["type"] for settings in config.receivers.values()}
    if config.interval is None and "alertmanager" in receivers:
        problem = "interval: missing; Alertmanager keeps an alert for three of them (interval: 10m)"
        raise AlertConfigError([problem])
    engine, notifier = _engine(options, _told_at_once(config))
    engine.evaluate()
    _finish(engine, notifier)
    for name, reason in engine.failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if "alert_state" in engine.failures:
        return CONFIG_ERROR
    if engine.failures:
        return SOURCE_ERROR
    return FIRING if engine.active() else OK


def _told_at_once(config: AlertConfig) -> AlertConfig:
    """1 回だけ評価するときの設定。評価の失敗を、次の回(早くても 1 分後)まで待たずに知らせる。"""
    if parse_duration(config.evaluation_failure_for) > CRON_STEP:
        return config
    return replace(config, evaluation_failure_for="0s")


def _watch(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    stop = _stop_on_signal()
    interval = parse_duration(config.interval or "30s")
    if options.interval:
        interval = timedelta(seconds=options.interval)
    engine, notifier = _engine(options, replace(config, interval=interval))
    engine.run_forever(interval.total_seconds(), stop=stop)
    _finish(engine, notifier)
    return FIRING if engine.active() else OK


def _stop_on_signal() -> threading.Event:
    stop = threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    return stop


def _engine(
    options: argparse.Namespace, config: AlertConfig
) -> tuple[AlertEngine, MultiChannelNotifier]:
    name = _experiment(options, config)
    notifier = notifier_from_config(config)
    notifier.wait_seconds = options.wait_seconds
    try:
        engine = setup_alerting(
            name, config, notifier, tracking_uri=options.tracking_uri, state_path=options.state
        )
    except MetricSourceError as error:
        # 監視できないことも知らせる。届いていなかった通知も送る
        told = _told_at_once(config)
        blind = AlertEngine(told, _Unreadable(error), notifier, state_path=options.state)
        blind.evaluate()
        _finish(blind, notifier)
        raise
    return engine, notifier


def _finish(engine: AlertEngine, notifier: MultiChannelNotifier) -> None:
    notifier.stop()
    engine.close()


class _Unreadable(RowSource):
    """接続できなかった、指標の出どころ。"""

    def __init__(self, error: MetricSourceError) -> None:
        self._error = error

    def numbers(self, window: timedelta, at: datetime) -> RowNumbers:
        raise self._error


def _experiment(options: argparse.Namespace, config: AlertConfig) -> str:
    name = options.experiment or config.experiment
    if not name:
        problem = "experiment: missing; write it in the file or pass --experiment"
        raise AlertConfigError([problem])
    return name


def _replay(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    search = TraceSearch(_experiment(options, config), options.tracking_uri)
    now = datetime.now(timezone.utc)
    rows = search.rows(to_ms(now - timedelta(hours=options.hours)), to_ms(now))
    if not rows:
        hours = f"{options.hours:g}"
        raise MetricSourceError(f"no traces in the last {hours} hours; raise --hours")
    print(replay(config, rows).table())
    return OK


def _serve_metrics(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    source = metric_source(_experiment(options, config), options.tracking_uri)
    stop = _stop_on_signal()
    try:
        collector = MetricsCollector(
            watched_series(config), source, offset=parse_duration(config.offset)
        )
        server = serve_metrics(collector, port=options.port, address=options.address)
    except ImportError as error:
        raise AlertConfigError([f"{error}; run: pip install prometheus-client"]) from error
    print(f"http://{options.address}:{options.port}/metrics", flush=True)
    stop.wait()
    server.shutdown()
    return OK


def _export_prometheus(options: argparse.Namespace) -> int:
    import yaml

    rules = to_prometheus_rules(load_config(options.config))
    print(yaml.safe_dump(rules, sort_keys=False, allow_unicode=True), end="")
    return OK


if __name__ == "__main__":
    sys.exit(main())
