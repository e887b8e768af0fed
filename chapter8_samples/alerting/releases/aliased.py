"""8.4.5 付け替えたエイリアスを、動いているアプリに届ける。

``load_prompt`` は 60 秒、``load_model`` は終わるまで、読んだ版を使い続ける。ここでは数秒ごとに
エイリアスを読み直し、読めない間は最後に読めた版で動き続ける。

Databricks では、プロンプトの名前を ``カタログ.スキーマ.名前`` にし、``mlflow`` 本体で使う。
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
ALIAS_ENDPOINT = "/api/2.0/mlflow/registered-models/alias"
TEXT_TAG, TYPE_TAG = "mlflow.prompt.text", "_mlflow_prompt_type"
_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


class AliasUnavailableError(RuntimeError):
    """一度も読めていないうちに、エイリアスを読めなかった。"""


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """読み込んだもの。"""

    version: str
    value: T


class Aliased(ABC, Generic[T]):
    """エイリアスの指すものを、期限付きで持つ。

    期限が切れたら一つのスレッドだけが読み直し、ほかのスレッドは待たずに今の版を使う。

    Args:
        ttl_seconds: 読み直す間隔。付け替えは、長くてもこの秒数で届く。
    """

    def __init__(
        self,
        name: str,
        alias: str,
        *,
        ttl_seconds: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.alias, self.ttl_seconds = name, alias, ttl_seconds
        self._clock, self._lock = clock, threading.Lock()
        self._loaded: Loaded[T] | None = None
        self._expires_at = 0.0
        self.failures = 0
        """読み直しに失敗した回数。"""
        self.last_error = ""

    @abstractmethod
    def resolve(self) -> str:
        """エイリアスの指すバージョン。"""

    @abstractmethod
    def load(self, version: str) -> T:
        """そのバージョンを読み込む。"""

    def get(self) -> Loaded[T]:
        """今の版。

        Raises:
            AliasUnavailableError: 一度も読めていない。
        """
        loaded = self._loaded
        if loaded is not None and self._clock() < self._expires_at:
            return loaded
        if not self._lock.acquire(blocking=loaded is None):
            assert loaded is not None  # ほかのスレッドが読み直している
            return loaded
        try:
            if self._loaded is None or self._clock() >= self._expires_at:
                self._refresh()
            assert self._loaded is not None
            return self._loaded
        finally:
            self._lock.release()

    @property
    def version(self) -> str:
        """今の版の番号(トレースのタグに付ける)。"""
        return self.get().version

    def _refresh(self) -> None:
        try:
            version = self.resolve()
            if self._loaded is None or version != self._loaded.version:
                self._loaded = Loaded(version, self.load(version))
                logger.info("%s@%s is now version %s", self.name, self.alias, version)
            self.last_error = ""
        except Exception as error:  # 何が起きても、最後に読めた版で動き続ける
            self.failures += 1
            self.last_error = f"{type(error).__name__}: {error}"
            if self._loaded is None:
                raise AliasUnavailableError(
                    f"cannot load {self.name}@{self.alias}: {self.last_error}"
                ) from error
            logger.warning(
                "keeping version %s of %s: %s", self._loaded.version, self.name, self.last_error
            )
        self._expires_at = self._clock() + self.ttl_seconds


Template = str | list[dict[str, Any]]


class AliasedPrompt(Aliased[Template]):
    """プロンプトレジストリのエイリアスを読み続ける。

    サーバーには REST で聞くので mlflow-tracing だけで動く。SQLite を読むには mlflow 本体が要る。

    Args:
        tracking_uri: レジストリの URI。省略すると、環境の設定に従う。
    """

    def __init__(
        self,
        name: str,
        alias: str = "production",
        *,
        ttl_seconds: float = 30.0,
        tracking_uri: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name, alias, ttl_seconds=ttl_seconds, clock=clock)
        self._tracking_uri = tracking_uri
        self._fetched: tuple[str, Template] = ("", "")

    @property
    def template(self) -> Template:
        """今の版のテンプレート。チャット形式ではメッセージのリスト。"""
        return self.get().value

    def format(self, **variables: object) -> str:
        """``{{name}}`` を置き換える。足りない変数は ``KeyError``。"""
        template = self.template
        if not isinstance(template, str):
            raise TypeError(f"{self.name} is a chat prompt; use .template")
        return _VARIABLE.sub(lambda found: str(variables[found[1]]), template)

    def resolve(self) -> str:
        """エイリアスの指すバージョン(本文も一度に届く)。"""
        import mlflow

        uri = self._tracking_uri or mlflow.get_tracking_uri()
        remote = uri.startswith(("http://", "https://"))
        self._fetched = (self._over_rest if remote else self._in_process)(uri)
        return self._fetched[0]

    def load(self, version: str) -> Template:
        """``resolve`` と同じ応答にあった本文。"""
        return self._fetched[1]

    def _over_rest(self, uri: str) -> tuple[str, Template]:
        version = _over_rest(uri, self.name, self.alias)
        tags = {tag["key"]: tag["value"] for tag in version.get("tags", [])}
        return str(version["version"]), _template(tags)

    def _in_process(self, uri: str) -> tuple[str, Template]:
        from mlflow import MlflowClient

        client: Any = MlflowClient(tracking_uri=uri, registry_uri=uri)
        prompt = client.get_prompt_version_by_alias(self.name, self.alias)
        return str(prompt.version), prompt.template


def _over_rest(uri: str, name: str, alias: str) -> dict[str, Any]:
    """エイリアスの指すバージョン。mlflow-tracing だけで聞ける。"""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request_safe

    answer = http_request_safe(
        get_default_host_creds(uri),
        ALIAS_ENDPOINT,
        "GET",
        params={"name": name, "alias": alias},
        timeout=10,
        max_retries=1,
    )
    return answer.json()["model_version"]


def _template(tags: dict[str, str]) -> Template:
    text = tags[TEXT_TAG]
    return json.loads(text) if tags.get(TYPE_TAG) == "chat" else text


class AliasedModel(Aliased[Any]):
    """登録済みモデルのエイリアスを読み続け、替わったら読み込み直す。

    ``loader`` を渡せば、mlflow-tracing だけで動く(サーバーには REST で聞く)。

    Args:
        loader: ``models:/名前/版`` から読み込む関数。省略すると ``mlflow.pyfunc.load_model``
            (mlflow 本体が要る)。
        tracking_uri: レジストリの URI。省略すると、環境の設定に従う。``loader`` を渡さないなら、
            ``mlflow.set_registry_uri`` と同じものにする。
    """

    def __init__(
        self,
        name: str,
        alias: str = "champion",
        *,
        loader: Callable[[str], Any] | None = None,
        ttl_seconds: float = 30.0,
        tracking_uri: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name, alias, ttl_seconds=ttl_seconds, clock=clock)
        self._loader, self._tracking_uri = loader, tracking_uri

    def resolve(self) -> str:
        """エイリアスの指すバージョン。"""
        import mlflow

        try:
            from mlflow import MlflowClient
        except ImportError:  # mlflow-tracing だけの環境
            uri = self._tracking_uri or mlflow.get_tracking_uri()
            return str(_over_rest(uri, self.name, self.alias)["version"])
        client: Any = MlflowClient(tracking_uri=self._tracking_uri)
        return str(client.get_model_version_by_alias(self.name, self.alias).version)

    def load(self, version: str) -> Any:
        """そのバージョンを読み込む。"""
        uri = f"models:/{self.name}/{version}"
        if self._loader:
            return self._loader(uri)
        import mlflow.pyfunc

        wanted = self._tracking_uri or mlflow.get_registry_uri()
        if wanted.rstrip("/") != mlflow.get_registry_uri().rstrip("/"):
            raise ValueError(  # load_model には接続先を渡せない: 同じ名前の別のモデルを読んでしまう
                "tracking_uri is not the registry that mlflow.pyfunc.load_model reads; "
                "call mlflow.set_registry_uri(tracking_uri), or pass loader"
            )
        return mlflow.pyfunc.load_model(uri)
