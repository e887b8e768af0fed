"""8.4.5 付け替えたエイリアスを、動いているアプリに届ける。"""

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
logger = logging.getLogger(__name__)
T = TypeVar('T')
ALIAS_ENDPOINT = '/api/2.0/mlflow/registered-models/alias'
TEXT_TAG, TYPE_TAG = ('mlflow.prompt.text', '_mlflow_prompt_type')

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

    def __init__(self, name: str, alias: str, *, ttl_seconds: float=30.0, clock: Callable[[], float]=time.monotonic) -> None:
        self.name, self.alias, self.ttl_seconds = (name, alias, ttl_seconds)
        self._clock, self._lock = (clock, threading.Lock())
        self._loaded: Loaded[T] | None = None
        self._expires_at = 0.0
        self.failures = 0
        self.last_error = ''

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

    @property
    def version(self) -> str:
        """今の版の番号(トレースのタグに付ける)。"""

    def _refresh(self) -> None:
        ...
Template = str | list[dict[str, Any]]

class AliasedPrompt(Aliased[Template]):
    """プロンプトレジストリのエイリアスを読み続ける。

    サーバーには REST で聞くので mlflow-tracing だけで動く。SQLite を読むには mlflow 本体が要る。

    Args:
        tracking_uri: レジストリの URI。省略すると、環境の設定に従う。
    """

    def __init__(self, name: str, alias: str='production', *, ttl_seconds: float=30.0, tracking_uri: str | None=None, clock: Callable[[], float]=time.monotonic) -> None:
        self._tracking_uri = tracking_uri
        self._fetched: tuple[str, Template] = ('', '')

    @property
    def template(self) -> Template:
        """今の版のテンプレート。チャット形式ではメッセージのリスト。"""

    def format(self, **variables: object) -> str:
        """``{{name}}`` を置き換える。足りない変数は ``KeyError``。"""

    def resolve(self) -> str:
        """エイリアスの指すバージョン(本文も一度に届く)。"""

    def load(self, version: str) -> Template:
        """``resolve`` と同じ応答にあった本文。"""

    def _over_rest(self, uri: str) -> tuple[str, Template]:
        ...

    def _in_process(self, uri: str) -> tuple[str, Template]:
        ...

class AliasedModel(Aliased[Any]):
    """登録済みモデルのエイリアスを読み続け、替わったら読み込み直す。

    ``loader`` を渡せば、mlflow-tracing だけで動く(サーバーには REST で聞く)。

    Args:
        loader: ``models:/名前/版`` から読み込む関数。省略すると ``mlflow.pyfunc.load_model``
            (mlflow 本体が要る)。
        tracking_uri: レジストリの URI。省略すると、環境の設定に従う。``loader`` を渡さないなら、
            ``mlflow.set_registry_uri`` と同じものにする。
    """

    def __init__(self, name: str, alias: str='champion', *, loader: Callable[[str], Any] | None=None, ttl_seconds: float=30.0, tracking_uri: str | None=None, clock: Callable[[], float]=time.monotonic) -> None:
        self._loader, self._tracking_uri = (loader, tracking_uri)

    def resolve(self) -> str:
        """エイリアスの指すバージョン。"""

    def load(self, version: str) -> Any:
        """そのバージョンを読み込む。"""

def main() -> None:
    """動いているアプリに、ロールバックが再起動なしで届くことを見る。"""
