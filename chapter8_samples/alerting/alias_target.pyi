"""8.4.5 登録済みモデルとプロンプトのエイリアスとタグ。"""

from collections.abc import Callable, Mapping
from typing import Any

class _RegistryAlias:
    """モデルとプロンプトに共通の部分。"""

    def __init__(self, client: Any, name: str, alias: str) -> None:
        self.client, self.name, self.alias = (client, name, alias)

    def put_tag(self, key: str, value: str) -> None:
        """タグを書く。同時に初めて書いた相手に負けたら ``ConcurrentChangeError``。"""

    def _set_tag(self, key: str, value: str) -> None:
        ...

    def _existing(self, call: Callable[[], Any], what: str) -> Any:
        ...

    def _exact(self, call: Callable[[], Any], version: str) -> Any:
        """``latest`` や ``02`` のような別名を断る。記録と付け替えには、版の番号そのものが要る。"""

class ModelAlias(_RegistryAlias):
    """登録済みモデルのエイリアス。"""

    def current(self) -> str | None:
        """エイリアスの指すバージョン。"""

    def _model(self) -> Any:
        ...

    def check(self, version: str) -> None:
        """READY のバージョンでなければ ``UnknownVersionError``。"""

    def point(self, version: str | None) -> None:
        """付け替える。"""

    def tags(self) -> Mapping[str, str]:
        """タグ。"""

    def _set_tag(self, key: str, value: str) -> None:
        ...

    def drop_tag(self, key: str) -> None:
        """タグを消す。"""

    def uri(self, version: str | None=None) -> str:
        """``models:/`` の URI。"""

class PromptAlias(_RegistryAlias):
    """プロンプトのエイリアス。"""

    def current(self) -> str | None:
        """エイリアスの指すバージョン。"""

    def check(self, version: str) -> None:
        """なければ ``UnknownVersionError``。"""

    def point(self, version: str | None) -> None:
        """付け替える。"""

    def tags(self) -> Mapping[str, str]:
        """タグ。"""

    def _set_tag(self, key: str, value: str) -> None:
        ...

    def drop_tag(self, key: str) -> None:
        """タグを消す。"""

    def uri(self, version: str | None=None) -> str:
        """``prompts:/`` の URI。"""

def main() -> None:
    """モデルとプロンプトに、同じ操作をする。"""
