"""8.4.5 ロールバック(リスト8.13)。"""

import logging
from collections.abc import Callable
from typing import Any
from .releases import AliasTarget, Change, Journal, Options
logger = logging.getLogger(__name__)
SmokeCheck = Callable[[str], object]
Gate = Callable[[str], object]
Pick = Callable[[list[Change]], tuple[str, str | None]]

class AliasRollback:
    """一つのエイリアスの、昇格、ロールバック、取り消し。モデルとプロンプトで同じ。

    Args:
        gate: 昇格の前にだけ呼ぶ。最初の版と、戻すとき、取り消すときは呼ばない。
        cooldown_seconds: 前のロールバックから、次のロールバックまでの最短の秒数。
        journal: ``Journal`` の引数(``settle_seconds`` など)。
    """

    def __init__(self, target: AliasTarget, *, smoke_check: SmokeCheck | None=None, gate: Gate | None=None, cooldown_seconds: float=600.0, **journal: Any) -> None:
        self.journal: Journal

    def history(self) -> list[Change]:
        """残っている記録を、古い順に。"""

    def promote(self, version: str | int, reason: str='', **options: Any) -> Change:
        """新しいバージョンに切り替える。``gate`` が認めなければ ``GateRefusedError``。"""

    def rollback(self, target_version: str | int | None=None, reason: str='', **options: Any) -> Change:
        """戻す。省略すると、記録にある一つ前の、退けられていないバージョンへ戻る。"""

    def undo(self, reason: str='', **options: Any) -> Change:
        """最後のロールバックを取り消す。プロセスを再起動した後でもできる。"""

    def previous(self, history: list[Change] | None=None) -> str:
        """いまのバージョンの一つ前。なければ ``NoHistoryError``。"""

    def recover(self) -> Change | None:
        """途中で落ちた変更があれば、結果を確かめて記録を閉じる。なければ ``None``。"""

    def _to_undo(self, history: list[Change]) -> tuple[str, str | None]:
        ...

    def _ask_gate(self, gate: Gate, version: str, options: Options) -> str | int | None:
        """検査し、比べたバージョンを返す(検査の間に変わったら、切り替えない)。"""

    def _change(self, action: str, pick: Pick, reason: str, options: Options) -> Change:
        ...

    def _plan(self, action: str, pick: Pick, reason: str, options: Options, history: list[Change]) -> Change:
        ...

    def _refuse(self, action: str, version: str, history: list[Change]) -> None:
        ...

    def _switch(self, change: Change) -> Change:
        ...

    def _verify(self, change: Change) -> None:
        ...

    def _restore(self, change: Change) -> bool:
        ...

    def _moved_by_someone_else(self, change: Change) -> bool:
        ...

    def _smoke(self, version: str) -> None:
        ...

    def _recover(self, history: list[Change]) -> Change | None:
        ...

class _Manager:
    """本の API。エイリアスごとに ``AliasRollback`` を用意する。"""
    default_alias: str

    def __init__(self, target: Callable[[str], AliasTarget], **options: Any) -> None:
        ...

    def for_alias(self, alias: str | None=None) -> AliasRollback:
        """一つのエイリアスの操作。"""

    def promote(self, version: str | int, alias: str | None=None, reason: str='', **options: Any) -> Change:
        """``alias`` を新しいバージョンに切り替える。"""

    def rollback(self, target_version: str | int | None=None, alias: str | None=None, reason: str | None=None, **options: Any) -> Change:
        """``alias`` を前の(または指定の)バージョンへ戻す。

        Raises:
            RollbackError: 断る理由ごとの子クラス(``alerting/releases/journal.py``)。
        """

    def undo_rollback(self, alias: str | None=None, reason: str='', **options: Any) -> Change:
        """最後のロールバックを取り消す。二度目は ``NoHistoryError``。"""

    def recover(self, alias: str | None=None) -> Change | None:
        """途中で落ちた変更を片付ける。"""

    def get_rollback_history(self, alias: str | None=None) -> list[Change]:
        """変更の記録(古い順、直近 8 件)。"""

    def current_version(self, alias: str | None=None) -> str | None:
        """エイリアスの指すバージョン。なければ ``None``。"""

class ModelRollbackManager(_Manager):
    """登録済みモデルのロールバック。mlflow 本体が要る(mlflow-tracing だけでは動かない)。

    ``options`` は ``AliasRollback`` の引数(``smoke_check``、``cooldown_seconds`` など)。
    """
    default_alias = 'champion'

    def __init__(self, model_name: str, client: Any=None, **options: Any) -> None:
        ...

    def get_model_versions(self) -> list[Any]:
        """登録済みのバージョン(新しい順)。"""

    def get_alias_info(self, alias: str='champion') -> Any:
        """エイリアスの指すバージョン(MLflow の ``ModelVersion``)。なければ ``None``。"""

    def list_aliases(self) -> dict[str, str]:
        """エイリアス -> バージョン。"""

class PromptRollbackManager(_Manager):
    """プロンプトのロールバック。mlflow 本体が要る(mlflow-tracing だけでは動かない)。"""
    default_alias = 'production'

    def __init__(self, prompt_name: str, client: Any=None, **options: Any) -> None:
        ...

def quick_rollback(model_name: str, target_version: str | int | None=None, alias: str='champion', reason: str='', **options: Any) -> Change:
    """一行で戻す。``options`` は ``Options`` の項目。"""

def get_champion_version(model_name: str) -> str | None:
    """``champion`` の指すバージョン。"""

def main() -> None:
    """プロンプトを昇格し、戻し、プロセスを替えて取り消す。壊れた版は自動で元に戻る。"""
