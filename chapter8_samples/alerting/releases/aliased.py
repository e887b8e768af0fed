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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
_VARIABLE = re.compile(r"\{\{\s*([A-Za-z_]\w*)\s*\}\}")


class AliasUnavailableError(RuntimeError):
    """一度も読めていないうちに、エイリアスを読めなかった。"""


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """読み込んだもの。"""

    version: str
    value: T


class Aliased(Generic[T]):
    """エイリアスの指すものを、期限付きで持つ。

    期限が切れたら一つのスレッドだけが読み直し、ほかのスレッドは待たずに今の版を使う。

    Args:
        ttl_seconds: 読み直す間隔。付け替えは、長くてもこの秒数で届く。
        tracking_uri: レジストリの URI。省略すると、環境の設定に従う。
    """

    def __init__(
        self,
        name: str,
        alias: str,
        *,
        ttl_seconds: float = 30.0,
        tracking_uri: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.alias, self.ttl_seconds = name, alias, ttl_seconds
        self._tracking_uri, self._clock, self._lock = tracking_uri, clock, threading.Lock()
        self._loaded: Loaded[T] | None = None
        self._expires_at = 0.0
        self.failures = 0
        """読み直しに失敗した回数。"""
        self.last_error = ""

    def resolve(self) -> str:
        """エイリアスの指すバージョン。"""
        raise NotImplementedError

    def load(self, version: str) -> T:
        """そのバージョンを読み込む。"""
        raise NotImplementedError

    def get(self) -> Loaded[T]:
        """今の版。一度も読めていなければ ``AliasUnavailableError``。"""
        loaded = self._loaded
        if loaded and self._clock() < self._expires_at:
            return loaded
        if not self._lock.acquire(blocking=loaded is None):
            assert loaded is not None  # ほかのスレッドが読み直している
            return loaded
        try:
            return self._fresh()
        finally:
            self._lock.release()

    @property
    def version(self) -> str:
        """今の版の番号(トレースのタグに付ける)。"""
        return self.get().version

    def _fresh(self) -> Loaded[T]:
        loaded = self._loaded
        if loaded and self._clock() < self._expires_at:
            return loaded  # 待つ間に、ほかのスレッドが読んだ
        try:
            version = self.resolve()
            if loaded is None or version != loaded.version:
                loaded = self._loaded = Loaded(version, self.load(version))
                logger.info("%s@%s is now version %s", self.name, self.alias, version)
            self.last_error = ""
        except Exception as error:  # 何が起きても、最後に読めた版で動き続ける
            self.failures += 1
            self.last_error = f"{type(error).__name__}: {error}"
            if loaded is None:
                problem = f"cannot load {self.name}@{self.alias}: {self.last_error}"
                raise AliasUnavailableError(problem) from error
            logger.warning("keeping %s of %s: %s", loaded.version, self.name, self.last_error)
        self._expires_at = self._clock() + self.ttl_seconds
        return loaded

    def _uri(self) -> str:
        import mlflow

        return self._tracking_uri or mlflow.get_tracking_uri()

    def _over_rest(self) -> dict[str, Any]:
        """エイリアスの指すバージョン。mlflow-tracing だけで聞ける。"""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request_safe

        answer = http_request_safe(
            get_default_host_creds(self._uri()),
            "/api/2.0/mlflow/registered-models/alias",
            "GET",
            params={"name": self.name, "alias": self.alias},
            timeout=10,
            max_retries=1,
        )
        return answer.json()["model_version"]


Template = str | list[dict[str, Any]]


class AliasedPrompt(Aliased[Template]):
    """プロンプトレジストリのエイリアスを読み続ける。

    サーバーには REST で聞くので mlflow-tracing だけで動く。SQLite を読むには mlflow 本体が要る。
    """

    def __init__(self, name: str, alias: str = "production", **options: Any) -> None:
        super().__init__(name, alias, **options)
        self._fetched: Template = ""

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
        if self._uri().startswith(("http://", "https://")):
            found = self._over_rest()
            tags = {tag["key"]: tag["value"] for tag in found.get("tags", [])}
            text, chat = tags["mlflow.prompt.text"], tags.get("_mlflow_prompt_type") == "chat"
            self._fetched = json.loads(text) if chat else text
            return str(found["version"])
        from mlflow import MlflowClient

        client: Any = MlflowClient(tracking_uri=self._uri(), registry_uri=self._uri())
        prompt = client.get_prompt_version_by_alias(self.name, self.alias)
        self._fetched = prompt.template
        return str(prompt.version)

    def load(self, version: str) -> Template:
        """``resolve`` と同じ応答にあった本文。"""
        return self._fetched


class AliasedModel(Aliased[Any]):
    """登録済みモデルのエイリアスを読み続け、替わったら読み込み直す。

    Args:
        loader: ``models:/名前/版`` から読み込む関数。渡せば mlflow-tracing だけで動く。省略すると
            ``mlflow.pyfunc.load_model``(``set_registry_uri`` で決めた所から読む)。
    """

    def __init__(
        self,
        name: str,
        alias: str = "champion",
        *,
        loader: Callable[[str], Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, alias, **options)
        self._loader = loader

    def resolve(self) -> str:
        """エイリアスの指すバージョン。"""
        try:
            from mlflow import MlflowClient
        except ImportError:  # mlflow-tracing だけの環境
            return str(self._over_rest()["version"])
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
