"""8.1.2 スパンの手書き・属性・エラー情報とストリーミング(リスト8.1-8.3)。"""

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar
from mlflow.entities import LiveSpan
logger = logging.getLogger(__name__)
T = TypeVar('T')
Join = Callable[[list[Any]], Any]

def _join_text(chunks: list[Any]) -> str:
    ...

@contextlib.contextmanager
def traced_step(name: str, *, span_type: str='UNKNOWN', inputs: Any=None, attributes: Mapping[str, Any] | None=None) -> Generator[LiveSpan, None, None]:
    """1 つの処理をスパンにする。例外は、種類と再試行できるかを属性に残してから送り直す。

    属性の名前は ``retrieval.top_k`` のように「対象.項目」にすると、後で探しやすい。
    """

def record_error(span: LiveSpan, error: BaseException, **details: Any) -> None:
    """エラーの種類と詳細を属性に残す(``status = 'ERROR'`` の検索から原因別に数えられる)。

    処理を続けるときに使うと、スパンは OK のまま、何が起きたかだけが残る。
    """

def traced_stream(name: str, chunks: Iterable[T], *, inputs: Any=None, join: Join=_join_text) -> Generator[T, None, None]:
    """断片をそのまま渡しながら、全体を 1 つのスパンに記録する。

    ``@mlflow.trace`` を付けたジェネレーターは、最後まで読まれないとトレースが失われ、メモリーにも
    残り続ける。これは途中で閉じられても必ず終わり、``stream.aborted`` を付ける。

    Args:
        join: 断片の一覧から出力を作る関数。既定は文字列としてつなぐ。例外なら断片の一覧を記録する。
    """

def atraced_stream(name: str, chunks: AsyncIterable[T], *, inputs: Any=None, join: Join=_join_text) -> AsyncGenerator[T, None]:
    """``traced_stream`` の非同期版。タスクのキャンセルも切断として記録する。"""

def main() -> None:
    """手書きのスパン、エラー、3 通りに終わるストリーミングを記録して読み返す。"""
