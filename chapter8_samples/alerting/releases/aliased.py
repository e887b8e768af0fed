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

from ..processes import renew_after_fork

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
        self.name = name
        self.alias = alias
        self._ttl_seconds = ttl_seconds
        self._tracking_uri = tracking_uri
        self._clock = clock
        self._renew()
        renew_after_fork(self._renew)
        self._loaded: Loaded[T] | None = None
        self._expires_at = 0.0

    def _renew(self) -> None:
        self._lock = threading.Lock()

    def read(self, before: Loaded[T] | None) -> Loaded[T]:
        """エイリアスの指すものを読む。版が ``before`` と同じなら、読み込み直さなくてよい。"""
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
        before = self._loaded
        if before and self._clock() < self._expires_at:
            return before  # 待つ間に、ほかのスレッドが読んだ
        try:
            loaded = self.read(before)
        except Exception as error:  # 何が起きても、最後に読めた版で動き続ける
            problem = f"{self.name}@{self.alias}: {type(error).__name__}: {error}"
            if before is None:
                raise AliasUnavailableError(f"cannot load {problem}") from error
            logger.warning("keeping version %s of %s", before.version, problem)
            loaded = before
        if before is None or loaded.version != before.version:
            logger.info("%s@%s is now version %s", self.name, self.alias, loaded.version)
        self._loaded = loaded
        self._expires_at = self._clock() + self._ttl_seconds
        return loaded

    def _over_rest(self, uri: str) -> dict[str, Any]:
        """エイリアスの指すバージョン。mlflow-tracing だけで聞け、落ちたサーバーを長く待たない。"""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request_safe

        answer = http_request_safe(
            get_default_host_creds(uri),
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

    def read(self, before: Loaded[Template] | None) -> Loaded[Template]:
        """エイリアスの指すバージョンと本文(一度に届く)。"""
        import mlflow

        uri = self._tracking_uri or mlflow.get_tracking_uri()
        if uri.startswith(("http://", "https://")):
            found = self._over_rest(uri)
            tags = {tag["key"]: tag["value"] for tag in found.get("tags", [])}
            text = tags["mlflow.prompt.text"]
            chat = tags.get("_mlflow_prompt_type") == "chat"
            return Loaded(str(found["version"]), json.loads(text) if chat else text)
        # Databricks のプロンプトは、トレースと別の URI(Unity Catalog)にある。MLflow に選ばせる
        registry = None if uri.startswith("databricks") else uri
        client: Any = mlflow.MlflowClient(tracking_uri=uri, registry_uri=registry)
        prompt = client.get_prompt_version_by_alias(self.name, self.alias)
        return Loaded(str(prompt.version), prompt.template)


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
        self._failed, self._pause, self._again_at = "", 0.0, 0.0

    def read(self, before: Loaded[Any] | None) -> Loaded[Any]:
        """エイリアスの指すバージョン。版が替わったときだけ読み込む。"""
        version = self._resolve()
        if before and before.version == version:
            return before
        if before and version == self._failed and self._clock() < self._again_at:
            raise RuntimeError(f"version {version} did not load; it is tried less and less often")
        uri = f"models:/{self.name}/{version}"
        try:
            return Loaded(version, self._loader(uri) if self._loader else self._load(uri))
        except Exception:  # 読み込みかけのファイルがディスクに溜まらないように、間を延ばしていく
            pause = min(2 * self._pause, 600) if version == self._failed else 0.0
            self._pause = max(pause, self._ttl_seconds)
            self._failed, self._again_at = version, self._clock() + self._pause
            raise

    def _resolve(self) -> str:
        import mlflow

        whole = hasattr(mlflow, "MlflowClient")  # mlflow-tracing だけの環境にはない
        registry = mlflow.get_registry_uri if whole else mlflow.get_tracking_uri
        uri = self._tracking_uri or registry()
        if not whole or uri.startswith(("http://", "https://")):
            return str(self._over_rest(uri)["version"])
        client: Any = mlflow.MlflowClient(tracking_uri=self._tracking_uri)
        return str(client.get_model_version_by_alias(self.name, self.alias).version)

    def _load(self, uri: str) -> Any:
        import mlflow.pyfunc

        registry = mlflow.get_registry_uri()
        if self._tracking_uri and self._tracking_uri.rstrip("/") != registry.rstrip("/"):
            raise ValueError(  # load_model には接続先を渡せない: 同じ名前の別のモデルを読んでしまう
                "tracking_uri is not the registry that mlflow.pyfunc.load_model reads; "
                "call mlflow.set_registry_uri(tracking_uri), or pass loader"
            )
        return mlflow.pyfunc.load_model(uri)
