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
    state = root.add_mutually_exclusive_group()
    state.add_argument("--fresh", action="store_true", help="手元のデータを消してから始める")
    state.add_argument("--keep", action="store_true", help="前回と同じエクスペリメントに書き足す")
    _add_output(root)
    commands = root.add_subparsers(dest="command", metavar="{report,doctor,serve,ui}")
    _add_report(commands.add_parser("report", help="保存されたトレースからレポートを作る"))
    doctor = commands.add_parser("doctor", help="版、接続先、鍵、設定の食い違いを調べる")
    doctor.add_argument("--experiment", help="読み書きできるかを確かめるエクスペリメント")
    doctor.add_argument("--json", action="store_true", help="結果を JSON で出す")
    for name, text, port in (
        ("serve", "お客様窓口のチャット画面を開く", 8080),
        ("ui", "手元のデータベースで MLflow UI を開く", 5000),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--port", type=_port, default=port, help=f"既定は {port}")
    return root


def _add_output(command: argparse.ArgumentParser) -> None:
    # 既定値を置くと、report の前に書いた -o を、report の既定値が上書きしてしまう
    command.add_argument(
        *("-o", "--output"),
        type=Path,
        default=argparse.SUPPRESS,
        help=f"レポートのファイル(既定は {OUTPUT})",
    )


def _add_report(report: argparse.ArgumentParser) -> None:
    _add_output(report)
    report.add_argument("--experiment", help="エクスペリメントの名前。省略するとシナリオのもの")
    report.add_argument("--since", type=_since, help="30m、24h、7d か日時(既定は 24h)")
    report.add_argument("--tracking-uri", help="既定は MLFLOW_TRACKING_URI、なければ手元の SQLite")
    report.add_argument("--alerts", type=Path, help="しきい値にするルール(8.4 の YAML)")
    report.add_argument("--alert-state", type=Path, help="アラートの監視(watch)の状態ファイル")
    report.add_argument(
        "--model", action="append", default=[], help="ロールバックの記録を並べる登録済みモデル"
    )


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


def _misplaced(options: argparse.Namespace) -> str:
    """黙って無視されることになる引数の説明。なければ空。"""

    def given(*names: str) -> str:
        found = (name for name in names if getattr(options, name, None))
        return next((f"--{name.replace('_', '-')}" for name in found), "")

    if options.command == "report" and options.experiment is None:
        name = given("since", "tracking_uri", "alerts", "alert_state", "model")
        if name:
            return f"{name} には --experiment NAME が要ります"
    elsewhere = () if options.command == "report" else ("output",)
    name = given("fresh", "keep", *elsewhere) if options.command else ""
    return f"{name} は {options.command} では使えません" if name else ""


def main(arguments: list[str] | None = None) -> int:
    """選ばれたコマンドを実行し、終了ステータスを返す。Ctrl-C は 130、SIGTERM は 143。"""
    root = parser()
    options = root.parse_args(arguments)
    if mistake := _misplaced(options):
        root.error(mistake)
    from ._lab import go_offline
    from ._lab.doctor.setup_problems import explained, mlflow_problem, require
    from ._lab.stopping import STATUS, Terminated, terminable

    go_offline()  # mlflow を import する前に
    try:
        with terminable():
            if options.command == "doctor":  # MLflow が古くてもなくても動く
                from ._lab.doctor.run import run

                return run(experiment=options.experiment, as_json=options.json)
            require(mlflow_problem())
            with explained():
                return _run(options)
    except (KeyboardInterrupt, Terminated) as end:
        print("\n中断しました。起動していたものはすべて止めました。")
        return STATUS if isinstance(end, Terminated) else 130


def _run(options: argparse.Namespace) -> int:
    from ._lab import commands

    output: Path = getattr(options, "output", OUTPUT)
    if options.command == "report" and options.experiment is not None:
        return commands.experiment_report(output, options)
    if options.command == "report":
        return commands.report(output)
    if options.command == "serve":
        return commands.serve(options.port)
    if options.command == "ui":
        return commands.ui(options.port)
    return commands.story(output, fresh=options.fresh, keep=options.keep)


if __name__ == "__main__":
    sys.exit(main())
