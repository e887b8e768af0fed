"""8.4.4 アラートのコマンド: 検査、1 回の評価、見張り、再生、書き出し。

    python -m chapter8_samples.alerting check alerts.yaml

cron やジョブからは ``once`` を、常駐させるなら ``watch`` を使う。終了コードは 0(正常)、1(発報中)、
2(設定の誤り、ファイルを読み書きできない)、3(指標を読めない)。

Databricks では ``once`` を定期ジョブにし、状態ファイルを Volume に置く。
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from . import (
    AlertConfig,
    AlertConfigError,
    AlertEngine,
    ConsoleNotificationHandler,
    MetricSourceError,
    MultiChannelNotifier,
    NotificationConfigError,
    load_config,
    notifier_from_config,
    replay,
    setup_alerting,
    to_alertmanager_config,
    to_prometheus_rules,
)
from .metrics import TraceSearch, to_ms

OK, FIRING, CONFIG_ERROR, SOURCE_ERROR = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """コマンドを実行し、終了コードを返す。"""
    options = _parser().parse_args(argv)
    try:
        return options.run(options)
    except (AlertConfigError, NotificationConfigError, OSError) as error:
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

    def command(
        group: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(name, help=text, description=text)
        made.add_argument("config", help="alerts.yaml")
        made.set_defaults(run=run)
        return made

    command(commands, "check", _check, "設定を検査する")
    once = command(commands, "once", _once, "1 回だけ評価して通知する")
    watch = command(commands, "watch", _watch, "評価し続ける")
    past = command(commands, "replay", _replay, "過去のトレースで試す")
    for made in (once, watch, past):
        made.add_argument("--experiment", help="設定の experiment の代わりに使う")
        made.add_argument("--tracking-uri")
    for made in (once, watch):
        made.add_argument("--state", default="alert_state.json", help="状態ファイル")
        made.add_argument("--dry-run", action="store_true", help="送らずに標準出力へ書く")
    # すぐに終わる once は、送り終えるまで待つ。途中で終わると、次の回が同じものを送り直す
    once.set_defaults(wait_seconds=120.0)
    watch.set_defaults(wait_seconds=5.0)
    watch.add_argument("--interval", type=_positive, default=30.0, help="評価の間隔(秒)")
    watch.add_argument("--heartbeat", type=Path, help="評価のたびに時刻を書くファイル")
    past.add_argument("--hours", type=_positive, default=24.0, help="遡る時間")
    past.add_argument("--svg", type=Path, help="図の書き出し先")
    export = commands.add_parser("export", help="ほかの監視基盤の形で書き出す")
    formats = export.add_subparsers(required=True, metavar="FORMAT")
    command(formats, "prometheus", _export_prometheus, "Prometheus のルールにする")
    made = command(formats, "alertmanager", _export_alertmanager, "Alertmanager の設定にする")
    made.add_argument("--url", action="append", default=[], metavar="RECEIVER=URL")
    return parser


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1000000")
    return value


def _check(options: argparse.Namespace) -> int:
    config = load_config(options.config)
    print(f"OK: {len(config.rules)} rules, {len(config.receivers)} receivers")
    return OK


def _once(options: argparse.Namespace) -> int:
    engine = _engine(options)
    engine.evaluate()
    for name, reason in engine.failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if engine.failures:
        return SOURCE_ERROR
    return FIRING if engine.active() else OK


def _watch(options: argparse.Namespace) -> int:
    engine, stop = _engine(options), threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())

    def heartbeat() -> None:
        now = datetime.now(timezone.utc)
        options.heartbeat.write_text(now.isoformat(), encoding="utf-8")

    beat = heartbeat if options.heartbeat else None
    engine.run_forever(options.interval, stop=stop, heartbeat=beat)
    return FIRING if engine.active() else OK


def _engine(options: argparse.Namespace) -> AlertEngine:
    config = load_config(options.config)
    notifier = (
        MultiChannelNotifier().add_handler("console", ConsoleNotificationHandler())
        if options.dry_run
        else notifier_from_config(config)
    )
    notifier.wait_seconds = options.wait_seconds
    return setup_alerting(
        _experiment(options, config),
        config,
        notifier,
        tracking_uri=options.tracking_uri,
        # 試した発報を、本番の状態ファイルに「知らせた」と残さない
        state_path=f"{options.state}.dry-run" if options.dry_run else options.state,
    )


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
    result = replay(config, rows)
    print(result.table())
    if options.svg:
        options.svg.write_text(result.svg(), encoding="utf-8")
    return OK


def _export_prometheus(options: argparse.Namespace) -> int:
    return _print_yaml(to_prometheus_rules(load_config(options.config)))


def _export_alertmanager(options: argparse.Namespace) -> int:
    urls = {name: url for name, _, url in (item.partition("=") for item in options.url)}
    return _print_yaml(to_alertmanager_config(load_config(options.config), urls))


def _print_yaml(data: Any) -> int:
    import yaml

    print(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), end="")
    return OK


if __name__ == "__main__":
    sys.exit(main())
