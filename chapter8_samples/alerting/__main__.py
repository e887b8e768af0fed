"""8.4.4 アラートのコマンド: 検査、1 回の評価、見張り、再生、書き出し。

cron やジョブからは ``once`` を、常駐させるなら ``watch`` を使う。終了コードは 0(正常)、1(発報中)、
2(設定の誤り、ファイルを読み書きできない)、3(指標を読めない)。

Databricks では ``once`` を定期ジョブにし、状態ファイルを Volume に置く。
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

OK, FIRING, CONFIG_ERROR, SOURCE_ERROR = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """コマンドを実行し、終了コードを返す。引数がなければ、自分で試して見せる。"""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        from chapter8_samples import _lab

        return _demo(_lab)
    options = _parser().parse_args(arguments)
    rules, delivery = _sibling("alert_rules"), _sibling("alert_delivery")
    source_error = _sibling("trace_metrics").MetricSourceError
    try:
        return options.run(options)
    except (rules.AlertConfigError, delivery.NotificationConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return CONFIG_ERROR
    except source_error as error:
        print(error, file=sys.stderr)
        return SOURCE_ERROR


def _sibling(name: str) -> Any:
    return import_module(f".{name}", __package__) if __package__ else import_module(name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alert_config", description="LLM アプリのアラート")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> Any:
        made = commands.add_parser(name, help=text)
        made.add_argument("config", help="alerts.yaml")
        made.set_defaults(run=run)
        return made

    command("check", _check, "設定を検査する")
    once = command("once", _once, "1 回だけ評価して通知する")
    watch = command("watch", _watch, "評価し続ける")
    replay = command("replay", _replay, "過去のトレースで試す")
    for made in (once, watch, replay):
        made.add_argument("--experiment", help="設定の experiment の代わりに使う")
        made.add_argument("--tracking-uri")
    for made in (once, watch):
        made.add_argument("--state", default="alert_state.json", help="状態ファイル")
        made.add_argument("--dry-run", action="store_true", help="送らずに標準出力へ書く")
        made.add_argument(
            "--heartbeat-url-env", metavar="NAME", help="評価のたびに呼び出す URL を入れた環境変数"
        )
    watch.add_argument("--interval", type=_positive, default=30.0, help="評価の間隔(秒)")
    watch.add_argument("--heartbeat", help="評価のたびに時刻を書くファイル")
    replay.add_argument("--hours", type=_positive, default=24.0)
    replay.add_argument("--svg", type=Path, help="図の書き出し先")
    command("export-prometheus", _export_prometheus, "Prometheus のルールにする")
    made = command("export-alertmanager", _export_alertmanager, "Alertmanager の設定にする")
    made.add_argument("--url", action="append", default=[], metavar="RECEIVER=URL")
    return parser


def _positive(text: str) -> float:
    if not 0 < (value := float(text)) < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1000000")
    return value


def _load(options: argparse.Namespace) -> Any:
    return _sibling("alert_config").load_config(options.config)


def _check(options: argparse.Namespace) -> int:
    config = _load(options)
    print(f"OK: {len(config.rules)} rules, {len(config.receivers)} receivers")
    return OK


def _engine(options: argparse.Namespace) -> Any:
    config = _load(options)
    return _sibling("alert_config").setup_alerting(
        _experiment(options, config),
        config,
        _notifier(options, config),
        tracking_uri=options.tracking_uri,
        # 試した発報を、本番の状態ファイルに「知らせた」と残さない
        state_path=f"{options.state}.dry-run" if options.dry_run else options.state,
    )


def _notifier(options: argparse.Namespace, config: Any) -> Any:
    if not options.dry_run:
        return _sibling("notification_channels").notifier_from_config(config)
    handlers = _sibling("notification_handlers")
    console = handlers.ConsoleNotificationHandler()
    return handlers.MultiChannelNotifier().add_handler("console", console)


def _experiment(options: argparse.Namespace, config: Any) -> str:
    name = options.experiment or config.experiment
    if not name:
        problem = "experiment: missing; write it in the file or pass --experiment"
        raise _sibling("alert_rules").AlertConfigError([problem])
    return name


def _push(options: argparse.Namespace) -> Any:
    name = options.heartbeat_url_env
    return _sibling("heartbeat_push").heartbeat_from_env(name, os.environ) if name else None


def _once(options: argparse.Namespace) -> int:
    push, engine = _push(options), _engine(options)
    engine.evaluate()
    if push:
        push()
        push.wait()
    for name, reason in engine.failures.items():
        print(f"{name}: {reason}", file=sys.stderr)
    if engine.failures:
        return SOURCE_ERROR
    return FIRING if engine.active() else OK


def _watch(options: argparse.Namespace) -> int:
    push, engine, stop = _push(options), _engine(options), threading.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: stop.set())
    beat = Path(options.heartbeat) if options.heartbeat else None

    def heartbeat() -> None:
        if beat:
            beat.write_text(datetime.now(timezone.utc).isoformat(), encoding="utf-8")
        if push:
            push()

    engine.run_forever(options.interval, stop=stop, heartbeat=heartbeat)
    return FIRING if engine.active() else OK


def _replay(options: argparse.Namespace) -> int:
    config, reader = _load(options), _sibling("metric_source")
    search = reader.TraceSearch(_experiment(options, config), options.tracking_uri)
    now = datetime.now(timezone.utc)
    rows = search.rows(reader.to_ms(now - timedelta(hours=options.hours)), reader.to_ms(now))
    if not rows:
        hours = f"{options.hours:g}"
        raise reader.MetricSourceError(f"no traces in the last {hours} hours; raise --hours")
    result = _sibling("alert_replay").replay(config, rows)
    print(result.table())
    if options.svg:
        options.svg.write_text(result.svg(), encoding="utf-8")
    return OK


def _export_prometheus(options: argparse.Namespace) -> int:
    return _print_yaml(_sibling("alert_exports").to_prometheus_rules(_load(options)))


def _export_alertmanager(options: argparse.Namespace) -> int:
    config = _load(options)
    pairs = (item.partition("=") for item in options.url)
    urls = {name: url for name, _, url in pairs}
    return _print_yaml(_sibling("alert_exports").to_alertmanager_config(config, urls))


def _print_yaml(data: Any) -> int:
    import yaml

    print(yaml.safe_dump(data, sort_keys=False, allow_unicode=True), end="")
    return OK


def _demo(_lab: Any) -> int:
    """設定を検査し、失敗したトレースのあるエクスペリメントを 1 回評価する。"""
    import mlflow

    from .__main__ import main as run

    logging.getLogger("chapter8_samples").setLevel(logging.ERROR)
    with _lab.sample("ch8-alert-cli", fresh_store=True) as lab:
        path = lab.home / "alerts.yaml"
        rule = "name: errors, metric: error_rate, window: 5m, threshold: 0.5, severity: critical"
        path.write_text(f"offset: 0s\nrules:\n  - {{{rule}}}\n", encoding="utf-8")
        with mlflow.start_span("answer") as span:
            span.set_status("ERROR")
        mlflow.flush_trace_async_logging()
        state = lab.home / "alert_cli_state.json"
        state.unlink(missing_ok=True)
        for arguments in (
            ["check", str(path)],
            ["once", str(path), "--experiment", "ch8-alert-cli", "--state", str(state)],
            ["once", str(path), "--experiment", "ch8-alert-cli", "--state", str(state)],
            ["export-prometheus", str(path)],
        ):
            print(f"$ alert_config {arguments[0]}")
            print("終了コード", run(arguments))
    return OK


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # インストールなしでも動くように
    sys.exit(main())
