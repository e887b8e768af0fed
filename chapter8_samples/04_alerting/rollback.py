"""8.4.5 ロールバック(リスト8.13)。

エイリアスの付け替えは 1 行で書けるが、本番では「戻る先は正しいか」「同時に誰かが動かしていないか」
「途中で落ちたら」「やはり取り消したい」に答える必要がある。順序は、検査、記録(prepared)、付け替え、確認、
記録(done)。記録はレジストリのタグに残り、同時の変更も防ぐ(部品の ``releases/switch.py``)。

実行::

    $ python chapter8_samples/04_alerting/rollback.py
    リスト8.13: champion 2 -> 1 (done)
    昇格: None -> 1 (done)
    昇格: 1 -> 2 (done)
    戻す: 2 -> 1 (done)
    再起動後に取り消す: 1 -> 2 (done)
    二度目の取り消し: NoHistoryError: no rollback to undo for prompts:/support-answer@production
    検査に失敗: VerificationError: version 3 failed the smoke check before the switch: no answer
    いまの production: バージョン 2

Databricks では、名前を ``カタログ.スキーマ.名前`` にするだけでよい(``mlflow`` 本体が要る)。
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from chapter8_samples.alerting.releases import (
    AliasRollback,
    AliasTarget,
    Change,
    ModelAlias,
    PromptAlias,
    RollbackError,
)


def quick_rollback(
    model_name: str,
    target_version: str | int | None = None,
    alias: str = "champion",
    reason: str = "",
    **options: Any,
) -> Change:
    """エイリアスを 1 行で戻す(リスト8.13)。バージョンを省略すると、記録にある一つ前に戻る。

    付け替えだけなら ``client.set_registered_model_alias(model_name, alias, "1")`` で済む。ここでは
    さらに、戻る先を確かめ、記録を残し、同時の変更を拒否する。

    Args:
        options: ``dry_run``、``force``、``expected``、``request_id``(``releases/switch.py``)。

    Raises:
        RollbackError: 拒否する理由ごとの子クラス(``releases/errors.py``)。
    """
    return ModelRollbackManager(model_name).rollback(target_version, alias, reason, **options)


class _Manager:
    """モデルとプロンプトに共通の操作。エイリアスごとに ``AliasRollback`` を用意する。"""

    default_alias: str

    def __init__(self, target: Callable[[str], AliasTarget], **options: Any) -> None:
        self._target = target
        self._options = options

    def for_alias(self, alias: str | None = None) -> AliasRollback:
        """一つのエイリアスの操作。"""
        return AliasRollback(self._target(alias or self.default_alias), **self._options)

    def promote(
        self, version: str | int, alias: str | None = None, reason: str = "", **options: Any
    ) -> Change:
        """``alias`` を新しいバージョンに切り替える。"""
        return self.for_alias(alias).promote(version, reason, **options)

    def rollback(
        self,
        target_version: str | int | None = None,
        alias: str | None = None,
        reason: str | None = None,
        **options: Any,
    ) -> Change:
        """``alias`` を前の(または指定の)バージョンへ戻す。

        Raises:
            RollbackError: 拒否する理由ごとの子クラス(``releases/errors.py``)。
        """
        return self.for_alias(alias).rollback(target_version, reason or "", **options)

    def undo_rollback(self, alias: str | None = None, reason: str = "", **options: Any) -> Change:
        """直前のロールバックを取り消す。ほかの変更の後と二度目は ``NoHistoryError``。"""
        return self.for_alias(alias).undo(reason, **options)

    def recover(self, alias: str | None = None) -> Change | None:
        """途中で落ちた変更を片付ける。"""
        return self.for_alias(alias).recover()

    def get_rollback_history(self, alias: str | None = None) -> list[Change]:
        """変更の記録(古い順、直近 8 件)。"""
        return self.for_alias(alias).history()

    def current_version(self, alias: str | None = None) -> str | None:
        """エイリアスの指すバージョン。なければ ``None``。"""
        return self.for_alias(alias).target.current()


class ModelRollbackManager(_Manager):
    """登録済みモデルのロールバック。mlflow 本体が要る(mlflow-tracing だけでは動かない)。

    ``options`` は ``AliasRollback`` の引数(``smoke_check``、``cooldown_seconds`` など)。
    """

    default_alias = "champion"

    def __init__(self, model_name: str, client: Any = None, **options: Any) -> None:
        self.model_name = model_name
        self.client = client or _client()
        super().__init__(lambda alias: ModelAlias(self.client, model_name, alias), **options)

    def get_model_versions(self) -> list[Any]:
        """登録済みのバージョン(新しい順)。"""
        found = self.client.search_model_versions(f"name = '{self.model_name}'")
        return sorted(found, key=lambda version: int(version.version), reverse=True)

    def get_alias_info(self, alias: str = "champion") -> Any:
        """エイリアスの指すバージョン(MLflow の ``ModelVersion``)。なければ ``None``。"""
        version = self.current_version(alias)
        if version is None:
            return None
        return self.client.get_model_version(self.model_name, version)

    def list_aliases(self) -> dict[str, str]:
        """エイリアス -> バージョン。"""
        aliases = self.client.get_registered_model(self.model_name).aliases
        return {alias: str(version) for alias, version in aliases.items()}


class PromptRollbackManager(_Manager):
    """プロンプトのロールバック。mlflow 本体が要る(mlflow-tracing だけでは動かない)。"""

    default_alias = "production"

    def __init__(self, prompt_name: str, client: Any = None, **options: Any) -> None:
        self.prompt_name = prompt_name
        self.client = client or _client()
        super().__init__(lambda alias: PromptAlias(self.client, prompt_name, alias), **options)


def _client() -> Any:
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise RollbackError(
            "rollback needs the registry client, which mlflow-tracing does not have; "
            "pip install 'mlflow>=3'"
        ) from error
    return MlflowClient()


def get_champion_version(model_name: str) -> str | None:
    """``champion`` の指すバージョン。"""
    return ModelRollbackManager(model_name).current_version("champion")


def main() -> None:
    """モデルを 1 行で戻す。プロンプトは、昇格し、戻し、再起動した後のように取り消す。"""
    import mlflow
    import mlflow.genai

    from chapter8_samples import _lab

    def smoke_check(uri: str) -> None:
        if "壊れた" in str(mlflow.genai.load_prompt(uri, cache_ttl_seconds=0).template):
            raise ValueError("no answer")

    def show(title: str, change: Change) -> None:
        print(f"{title} {change.from_version} -> {change.to_version} ({change.state})")

    with _lab.sample(fresh_store=True):
        client = mlflow.MlflowClient()
        client.create_registered_model("support-agent")
        for _ in range(2):
            client.create_model_version("support-agent", source="file:///models/support-agent")
        client.set_registered_model_alias("support-agent", "champion", "2")
        show("リスト8.13: champion", quick_rollback("support-agent", 1))

        for text in ("版 1 {{q}}", "版 2 {{q}}", "版 3 壊れた {{q}}"):
            mlflow.genai.register_prompt("support-answer", text)
        manager = PromptRollbackManager("support-answer", smoke_check=smoke_check)
        show("昇格:", manager.promote(1, reason="初版"))
        show("昇格:", manager.promote(2, reason="新しい言い回し"))
        show("戻す:", manager.rollback(reason="品質低下"))
        # 再起動の後と同じように、レジストリのタグに残る記録だけを使う
        restarted = PromptRollbackManager("support-answer", smoke_check=smoke_check)
        show("再起動後に取り消す:", restarted.undo_rollback(reason="誤報だった"))
        refused: dict[str, Callable[[], Change]] = {
            "二度目の取り消し": restarted.undo_rollback,
            "検査に失敗": lambda: restarted.promote(3),
        }
        for title, call in refused.items():
            try:
                call()
            except RollbackError as error:
                print(f"{title}: {type(error).__name__}: {error}")
        print("いまの production: バージョン", restarted.current_version())


if __name__ == "__main__":
    main()
