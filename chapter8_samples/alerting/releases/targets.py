"""8.4.5 登録済みモデルとプロンプトのエイリアスとタグ。

違い(クライアントのメソッドの名前、版の型、ないときの例外)をここに閉じ込めて、記録とロールバックの側では
一つの形(``AliasTarget``)だけを見る。

Databricks でも同じクライアントで動く。mlflow 本体が要る(mlflow-tracing にレジストリはない)。
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .errors import ConcurrentChangeError, UnknownVersionError

LOST_RACE = ("UNIQUE", "IntegrityError")
"""同じタグを初めて書く競争に負けたときの、SQLAlchemy の文面。"""


class AliasTarget:
    """一つのエイリアスと、それが属するモデル(プロンプト)のタグ。"""

    scheme: str
    noun: str
    """``MlflowClient`` のメソッドの名前に入る語(``set_<noun>_alias``)。"""
    number: Callable[[str], str | int]

    def __init__(self, client: Any, name: str, alias: str) -> None:
        self.client = client
        self.name = name
        self.alias = alias

    def uri(self, version: str | None = None) -> str:
        """確認に使う URI。省略するとエイリアスの URI。"""
        return f"{self.scheme}:/{self.name}" + (f"/{version}" if version else f"@{self.alias}")

    def current(self) -> str | None:
        """エイリアスの指すバージョン。なければ ``None``。"""
        raise NotImplementedError

    def check(self, version: str) -> None:
        """使えるバージョンでなければ ``UnknownVersionError``。``latest`` や ``02`` も拒否する。"""
        noun = self.noun.removeprefix("registered_")
        found = self._existing(f"get_{noun}_version", f"has no version {version}", version)
        if str(found.version) != version:
            raise UnknownVersionError(
                f"{self.name} has no version {version}; write the number {found.version}"
            )
        if (status := getattr(found, "status", "READY")) != "READY":
            raise UnknownVersionError(f"{self.name} version {version} is {status}, not READY")

    def point(self, version: str | None) -> None:
        """エイリアスを付け替える。``None`` は外す。"""
        if version is None:
            getattr(self.client, f"delete_{self.noun}_alias")(self.name, self.alias)
        else:
            number = self.number(version)
            getattr(self.client, f"set_{self.noun}_alias")(self.name, self.alias, number)

    def tags(self) -> Mapping[str, str]:
        """登録済みモデル(プロンプト)のタグ。"""
        return self._entity().tags or {}

    def put_tag(self, key: str, value: str) -> None:
        """タグを書く。同時に初めて書いた相手に負けたら ``ConcurrentChangeError``。"""
        from mlflow.exceptions import MlflowException

        try:
            getattr(self.client, f"set_{self.noun}_tag")(self.name, key, value)
        except MlflowException as error:
            if any(sign in str(error) for sign in LOST_RACE):
                raise ConcurrentChangeError(f"lost the race to write {key}") from error
            raise

    def _entity(self) -> Any:
        kind = self.noun.removeprefix("registered_")
        return self._existing(f"get_{self.noun}", f"is not a registered {kind}")

    def _existing(self, method: str, problem: str, *arguments: str) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            found = getattr(self.client, method)(self.name, *arguments)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            found = None
        if found is None:
            raise UnknownVersionError(f"{self.name} {problem}")
        return found


class ModelAlias(AliasTarget):
    """登録済みモデルのエイリアス。

    >>> target = ModelAlias(None, "support-agent", "champion")
    >>> target.uri(), target.uri("2")
    ('models:/support-agent@champion', 'models:/support-agent/2')
    """

    scheme = "models"
    noun = "registered_model"
    number = str

    def current(self) -> str | None:
        """エイリアスの指すバージョン。"""
        version = self._entity().aliases.get(self.alias)
        return None if version is None else str(version)


class PromptAlias(AliasTarget):
    """プロンプトのエイリアス。

    >>> PromptAlias(None, "support-answer", "production").uri()
    'prompts:/support-answer@production'
    """

    scheme = "prompts"
    noun = "prompt"
    number = int

    def current(self) -> str | None:
        """エイリアスの指すバージョン。"""
        try:
            found = self._existing("get_prompt_version_by_alias", "has no alias", self.alias)
        except UnknownVersionError:
            return None
        return str(found.version)
