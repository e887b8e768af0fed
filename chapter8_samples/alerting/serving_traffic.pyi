"""8.4.5 Databricks のモデルサービングで、トラフィックを前の版に戻す。"""

from typing import Any
from databricks.sdk import WorkspaceClient
Shares = dict[str, int]

class ServingTrafficError(RuntimeError):
    """トラフィックを切り替えられない(相手がない、準備ができていない、更新中、更新に失敗)。"""

def shift_serving_traffic(endpoint: str, to_entity: str, *, workspace: WorkspaceClient | None=None, wait: bool=True, timeout_seconds: float=1200.0) -> dict[str, Any]:
    """すべてのトラフィックを、すでに配信中の ``to_entity`` に向ける。

    Args:
        to_entity: 配信中のエンティティの名前(モデルの名前ではなく、エンドポイントの中での名前)。
        wait: 切り替えが終わるまで待ち、結果を確かめる。``False`` なら頼むだけで戻る。

    Returns:
        ``endpoint``、``changed``、``before``、``after``(名前 -> 割合)。
        すでに 100% なら、何も送らず ``changed`` が ``False`` になる。

    Raises:
        ServingTrafficError: 断る理由、または Databricks の答え。
    """

def main() -> None:
    """手元の偽ワークスペースに、本物の SDK で切り替えを頼む。"""
