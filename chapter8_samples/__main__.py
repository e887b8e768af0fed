"""章の全体を動かす: ``python -m chapter8_samples``。

引数なしでシナリオを実行する。ほかに ``report``(レポートを作る)、``doctor``(設定を確認する)、
``serve``(チャット画面)、``ui``(手元のデータベースで MLflow UI を開く)がある。
"""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from pathlib import Path

OUTPUT = Path("health_report.html")


def parser() -> argparse.ArgumentParser:
    """コマンドラインの定義。"""
    root = argparse.ArgumentParser(
        prog="python -m chapter8_samples", description="第8章「監視と運用」を手元で動かします。"
    )
    root.add_argument("--fresh", action="store_true", help="手元のデータを消してから始める")
    commands = root.add_subparsers(dest="command", metavar="{report,doctor,serve,ui}")
    report = commands.add_parser("report", help="保存されたトレースからレポートを作る")
    report.add_argument("--experiment", help="エクスペリメントの名前。省略するとシナリオのもの")
    report.add_argument("--since", type=_since, help="30m、24h、7d か日時(既定は 24h)")
    report.add_argument("--alerts", type=Path, help="しきい値にするルール(8.4 の YAML)")
    report.add_argument(
        *("-o", "--output"),
        type=Path,
        default=OUTPUT,
        help=f"レポートのファイル(既定は {OUTPUT})",
    )
    doctor = commands.add_parser("doctor", help="版、接続先、鍵、設定の食い違いを調べる")
    doctor.add_argument("--json", action="store_true", help="結果を JSON で出す")
    for name, text, port in (
        ("serve", "お客様窓口のチャット画面を開く", 8080),
        ("ui", "手元のデータベースで MLflow UI を開く", 5000),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--port", type=_port, default=port, help=f"既定は {port}")
    return root


def _since(text: str) -> datetime:
    from ._lab.report.periods import since

    try:
        return since(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _port(text: str) -> int:
    if text.isdecimal() and 1 <= int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} は 1 から 65535 の番号ではありません")


def main(arguments: list[str] | None = None) -> int:
    """選ばれたコマンドを実行し、終了ステータスを返す。Ctrl-C は 130、SIGTERM は 143。"""
    root = parser()
    options = root.parse_args(arguments)
    if options.command and options.fresh:
        root.error(f"--fresh は {options.command} では使えません")
    from ._lab import go_offline
    from ._lab.doctor.setup_problems import explained
    from ._lab.stopping import STATUS, Terminated, terminable

    go_offline()  # mlflow を import する前に
    try:
        with terminable(), explained():
            return _run(options)
    except (KeyboardInterrupt, Terminated) as end:
        print("\n中断しました。起動していたものはすべて止めました。")
        return STATUS if isinstance(end, Terminated) else 130


def _run(options: argparse.Namespace) -> int:
    if options.command == "doctor":  # MLflow が古くても動く
        from ._lab.doctor.run import run

        return run(as_json=options.json)
    from ._lab.doctor.setup_problems import mlflow_problem, require

    require(mlflow_problem())
    from ._lab import commands

    if options.command == "report":
        return commands.report(options)
    if options.command == "serve":
        return commands.serve(options.port)
    if options.command == "ui":
        return commands.ui(options.port)
    return commands.story(OUTPUT, fresh=options.fresh)


if __name__ == "__main__":
    sys.exit(main())
