"""8.4.4 アラートのコマンド: 検査、1 回の評価、見張り、再生、書き出し。"""

from collections.abc import Sequence
OK, FIRING, CONFIG_ERROR, SOURCE_ERROR = (0, 1, 2, 3)

def main(argv: Sequence[str] | None=None) -> int:
    """コマンドを実行し、終了コードを返す。引数がなければ、自分で試して見せる。"""
