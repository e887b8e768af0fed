"""8.4.5 ロールバック(リスト8.13)。"""

from collections.abc import Callable
from typing import Any
from .releases import AliasRollback, AliasTarget, Change

def quick_rollback(model_name: str, target_version: str | int | None=None, alias: str='champion', reason: str='', **options: Any) -> Change:
    """エイリアスを 1 行で戻す(リスト8.13)。バージョンを省略すると、記録にある一つ前に戻る。

    付け替えだけなら ``client.set_registered_model_alias(model_name, alias, "1")`` で済む。ここでは
    さらに、戻る先を確かめ、記録を残し、同時の変更を拒否する。

    Args:
        options: ``dry_run``、``force``、``expected``、``request_id``(``releases/switch.py``)。

    Raises:
        RollbackError: 拒否する理由ごとの子クラス(``releases/errors.py``)。
    """

class _Manager:
    """モデルとプロンプトに共通の操作。エイリアスごとに ``AliasRollback`` を用意する。"""
    default_alias: str

    def __init__(self, target: Callable[[str], AliasTarget], **options: Any) -> None:
        self._target = target
        self._options = options

    def for_alias(self, alias: str | None=None) -> AliasRollback:
        """一つのエイリアスの操作。"""

    def promote(self, version: str | int, alias: str | None=None, reason: str='', **options: Any) -> Change:
        """``alias`` を新しいバージョンに切り替える。"""

    def rollback(self, target_version: str | int | None=None, alias: str | None=None, reason: str | None=None, **options: Any) -> Change:
        """``alias`` を前の(または指定の)バージョンへ戻す。

        Raises:
            RollbackError: 拒否する理由ごとの子クラス(``releases/errors.py``)。
        """

    def undo_rollback(self, alias: str | None=None, reason: str='', **options: Any) -> Change:
        """直前のロールバックを取り消す。ほかの変更の後と二度目は ``NoHistoryError``。"""

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
        self.model_name = model_name

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
        self.prompt_name = prompt_name

def get_champion_version(model_name: str) -> str | None:
    """``champion`` の指すバージョン。"""

def main() -> None:
    """モデルを 1 行で戻す。プロンプトは、昇格し、戻し、再起動した後のように取り消す。"""
