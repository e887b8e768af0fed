"""8.4.5 登録済みモデルとプロンプトのエイリアスとタグ。

モデルとプロンプトでは、クライアントのメソッドの名前も、版の型(文字列と整数)も、ないときの例外も違う。
違いをここに閉じ込めて、記録とロールバックの側では一つの形(``AliasTarget``)だけを見る。

Databricks でも同じクライアントで動く。mlflow 本体が要る(mlflow-tracing にレジストリはない)。
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .journal import ConcurrentChangeError, UnknownVersionError


class _RegistryAlias:
    """モデルとプロンプトに共通の部分。"""

    def __init__(self, client: Any, name: str, alias: str) -> None:
        self.client, self.name, self.alias = client, name, alias

    def put_tag(self, key: str, value: str) -> None:
        """タグを書く。同時に初めて書いた相手に負けたら ``ConcurrentChangeError``。"""
        from mlflow.exceptions import MlflowException

        try:
            self._set_tag(key, value)
        except MlflowException as error:
            lost = ("UNIQUE", "IntegrityError", "expected to update")  # 読んだ行が、書く前に消えた
            if any(sign in str(error) for sign in lost):
                raise ConcurrentChangeError(f"lost the race to write {key}") from error
            raise

    def _set_tag(self, key: str, value: str) -> None:
        raise NotImplementedError

    def _existing(self, call: Callable[[], Any], what: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            found = call()
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            found = None
        if found is None:
            raise UnknownVersionError(f"{self.name} {what}")
        return found

    def _exact(self, call: Callable[[], Any], version: str) -> Any:
        """``latest`` や ``02`` のような別名を断る。記録と付け替えには、版の番号そのものが要る。"""
        found = self._existing(call, f"has no version {version}")
        if str(found.version) != version:
            raise UnknownVersionError(
                f"{self.name} has no version {version}; write the number {found.version}"
            )
        return found


class ModelAlias(_RegistryAlias):
    """登録済みモデルのエイリアス。

    >>> target = ModelAlias(None, "support-agent", "champion")
    >>> target.uri(), target.uri("2")
    ('models:/support-agent@champion', 'models:/support-agent/2')
    """

    def current(self) -> str | None:
        """エイリアスの指すバージョン。"""
        version = self._model().aliases.get(self.alias)
        return None if version is None else str(version)

    def _model(self) -> Any:
        return self._existing(
            lambda: self.client.get_registered_model(self.name), "is not a registered model"
        )

    def check(self, version: str) -> None:
        """READY のバージョンでなければ ``UnknownVersionError``。"""
        found = self._exact(lambda: self.client.get_model_version(self.name, version), version)
        if found.status != "READY":
            raise UnknownVersionError(f"{self.name} version {version} is {found.status}, not READY")

    def point(self, version: str | None) -> None:
        """付け替える。"""
        if version is None:
            self.client.delete_registered_model_alias(self.name, self.alias)
        else:
            self.client.set_registered_model_alias(self.name, self.alias, version)

    def tags(self) -> Mapping[str, str]:
        """タグ。"""
        return self._model().tags or {}

    def _set_tag(self, key: str, value: str) -> None:
        self.client.set_registered_model_tag(self.name, key, value)

    def drop_tag(self, key: str) -> None:
        """タグを消す。"""
        self.client.delete_registered_model_tag(self.name, key)

    def uri(self, version: str | None = None) -> str:
        """``models:/`` の URI。"""
        return f"models:/{self.name}" + (f"/{version}" if version else f"@{self.alias}")


class PromptAlias(_RegistryAlias):
    """プロンプトのエイリアス。

    >>> target = PromptAlias(None, "support-answer", "production")
    >>> target.uri(), target.uri("2")
    ('prompts:/support-answer@production', 'prompts:/support-answer/2')
    """

    def current(self) -> str | None:
        """エイリアスの指すバージョン。"""
        try:
            found = self._existing(
                lambda: self.client.get_prompt_version_by_alias(self.name, self.alias),
                "has no alias",
            )
        except UnknownVersionError:
            return None
        return str(found.version)

    def check(self, version: str) -> None:
        """なければ ``UnknownVersionError``。"""
        self._exact(lambda: self.client.get_prompt_version(self.name, version), version)

    def point(self, version: str | None) -> None:
        """付け替える。"""
        if version is None:
            self.client.delete_prompt_alias(self.name, self.alias)
        else:
            self.client.set_prompt_alias(self.name, self.alias, int(version))

    def tags(self) -> Mapping[str, str]:
        """タグ。"""
        found = self._existing(
            lambda: self.client.get_prompt(self.name), "is not a registered prompt"
        )
        return found.tags or {}

    def _set_tag(self, key: str, value: str) -> None:
        self.client.set_prompt_tag(self.name, key, value)

    def drop_tag(self, key: str) -> None:
        """タグを消す。"""
        self.client.delete_prompt_tag(self.name, key)

    def uri(self, version: str | None = None) -> str:
        """``prompts:/`` の URI。"""
        return f"prompts:/{self.name}" + (f"/{version}" if version else f"@{self.alias}")
