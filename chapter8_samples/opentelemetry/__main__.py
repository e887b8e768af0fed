"""8.5.3 OTLP のコマンド: 送り先に届くかの確認と、見本のトレースの送信。

終了コードは 0(全部届いた)、1(届かなかった)、2(引数か設定の誤り)。
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from .export import (
    OtlpConfig,
    OtlpConfigError,
    OtlpSetupError,
    build_otlp_config,
    check_otlp_connection,
    disable_otlp_export,
    flush_all,
    preset,
)
from .export.config import PROTOCOLS
from .otlp_setup import send_three_requests, setup_otlp_export

SERVICE = "support-bot"


def main(argv: Sequence[str] | None = None) -> int:
    """コマンドを実行し、終了コードを返す。"""
    parser = _parser()
    chosen = parser.parse_args(argv)
    try:
        return int(chosen.run(chosen))
    except (OtlpConfigError, OtlpSetupError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser("check", help="1 スパンを送り、届いたかだけを答える")
    check.set_defaults(run=_check)
    send = commands.add_parser("send", help="見本のトレースを 3 件送り、届いた数を答える")
    send.set_defaults(run=_send)
    modes = "既定は、MLFLOW_TRACKING_URI があれば dual(MLflow にも残す)"
    send.add_argument("--mode", choices=("dual", "otlp_only"), help=modes)
    for command in (check, send):
        target = command.add_mutually_exclusive_group(required=True)
        target.add_argument("--endpoint", help="送り先の URL")
        target.add_argument("--preset", help="接続先の名前(datadog など。鍵は環境変数から読む)")
        command.add_argument("--protocol", choices=PROTOCOLS)
    return parser


def _config(chosen: argparse.Namespace, **options: Any) -> OtlpConfig:
    if chosen.protocol:
        options["protocol"] = chosen.protocol
    if chosen.preset:
        return preset(chosen.preset, SERVICE, **options)
    return build_otlp_config(chosen.endpoint, SERVICE, **options)


def _check(chosen: argparse.Namespace) -> int:
    check = check_otlp_connection(_config(chosen), timeout_seconds=10)
    print(f"{check.reason}: {check.detail}")
    return 0 if check.ok else 1


def _send(chosen: argparse.Namespace) -> int:
    known = "dual" if os.environ.get("MLFLOW_TRACKING_URI") else "otlp_only"
    status = setup_otlp_export(_config(chosen, mode=chosen.mode or known))
    try:
        print(f"送信({status.mode}): {', '.join(status.processors)}")
        for warning in status.warnings:
            print(f"注意: {warning}")
        print(send_three_requests())
        return 0 if flush_all().complete else 1
    finally:
        disable_otlp_export()


if __name__ == "__main__":
    sys.exit(main())
