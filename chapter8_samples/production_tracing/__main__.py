"""8.1 のコマンド: ``python -m chapter8_samples.production_tracing replay DIR``。"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .delivery.spool import replay


def main(arguments: Sequence[str] | None = None) -> int:
    """コマンドを実行し、終了コードを返す(送り残しがあれば 1)。"""
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}",
        description="TraceSpool のディスクに残ったトレースを、いまのトラッキング URI に送る。",
    )
    parser.add_argument("command", choices=["replay"], help="残ったトレースを送る")
    parser.add_argument("directory", metavar="DIR", help="TraceSpool に渡したディレクトリー")
    try:
        stats = replay(parser.parse_args(arguments).directory)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"delivered={stats.delivered} pending={stats.pending} dead={stats.dead}")
    return 1 if stats.pending else 0


if __name__ == "__main__":
    sys.exit(main())
