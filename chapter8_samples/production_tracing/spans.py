"""8.1.2 スパンの手書き・属性・エラー情報とストリーミング(リスト8.1-8.3)。

自動トレースがないところは自分でスパンを作り、後で探せる属性と、原因の分かるエラー情報を残す。
ストリーミングでは、ユーザーが途中で切断しても、トレースを失わず、メモリーにも残さない。

Databricks でも同じ。ストリーミングのトレースは、最後の断片を送り終えるか、切断されたときに残る。
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import mlflow
from mlflow.entities import SpanEvent

if TYPE_CHECKING:
    from mlflow.entities import LiveSpan

logger = logging.getLogger(__name__)

T = TypeVar("T")
Join = Callable[[list[Any]], Any]


def _join_text(chunks: list[Any]) -> str:
    return "".join(str(chunk) for chunk in chunks)


@contextlib.contextmanager
def traced_step(
    name: str,
    *,
    span_type: str = "UNKNOWN",
    inputs: Any = None,
    attributes: Mapping[str, Any] | None = None,
) -> Generator[LiveSpan, None, None]:
    """1 つの処理をスパンにする。例外は、種類と再試行できるかを属性に残してから送り直す。

    属性の名前は ``retrieval.top_k`` のように「対象.項目」にすると、後で探しやすい。
    """
    with mlflow.start_span(name, span_type=span_type, attributes=dict(attributes or {})) as span:
        if inputs is not None:
            span.set_inputs(inputs)
        try:
            yield span
        except Exception as error:
            record_error(span, error)
            raise


def record_error(span: LiveSpan, error: BaseException, **details: Any) -> None:
    """エラーの種類と詳細を属性に残す(``status = 'ERROR'`` の検索から原因別に数えられる)。

    処理を続けるときに使うと、スパンは OK のまま、何が起きたかだけが残る。
    """
    retryable = isinstance(error, TimeoutError | ConnectionError)
    values = {"error.type": type(error).__name__, "error.retryable": retryable}
    extra = {f"error.{key}": value for key, value in details.items()}
    span.set_attributes({**values, **extra})


class _StreamSpan:
    """ストリーミング 1 回分のスパン。必ず 1 度だけ終わる。"""

    def __init__(self, name: str, inputs: Any, join: Join) -> None:
        parent = mlflow.get_current_active_span()
        self._span = mlflow.start_span_no_context(name, inputs=inputs, parent_span=parent)
        self._join = join
        self._chunks: list[Any] = []
        self._status = "OK"

    def add(self, chunk: Any) -> None:
        self._chunks.append(chunk)

    def aborted(self) -> None:
        self._span.set_attribute("stream.aborted", True)

    def failed(self, error: BaseException) -> None:
        self._status = "ERROR"
        record_error(self._span, error)
        if isinstance(error, Exception):
            self._span.add_event(SpanEvent.from_exception(error))

    def end(self) -> None:
        self._span.set_attribute("stream.chunks", len(self._chunks))
        self._span.end(outputs=self._output(), status=self._status)

    def _output(self) -> Any:
        try:
            return self._join(self._chunks)
        except Exception as error:  # 記録の都合で、応答もトレースも失わない
            kind = type(error).__name__
            logger.warning("join of %r failed (%s); its chunks are kept", self._span.name, kind)
            return self._chunks


def traced_stream(
    name: str, chunks: Iterable[T], *, inputs: Any = None, join: Join = _join_text
) -> Generator[T, None, None]:
    """断片をそのまま渡しながら、全体を 1 つのスパンに記録する。

    ``@mlflow.trace`` を付けたジェネレーターは、最後まで読まれないとトレースが失われ、メモリーにも
    残り続ける。これは途中で閉じられても必ず終わり、``stream.aborted`` を付ける。

    Args:
        join: 断片の一覧から出力を作る関数。既定は文字列としてつなぐ。例外なら断片の一覧を記録する。
    """
    span = _StreamSpan(name, inputs, join)
    try:
        for chunk in chunks:
            span.add(chunk)
            yield chunk
    except GeneratorExit:
        span.aborted()
        raise
    except BaseException as error:
        span.failed(error)
        raise
    finally:
        span.end()


async def atraced_stream(
    name: str, chunks: AsyncIterable[T], *, inputs: Any = None, join: Join = _join_text
) -> AsyncGenerator[T, None]:
    """``traced_stream`` の非同期版。タスクのキャンセルも切断として記録する。"""
    import asyncio

    span = _StreamSpan(name, inputs, join)
    try:
        async for chunk in chunks:
            span.add(chunk)
            yield chunk
    except (GeneratorExit, asyncio.CancelledError):
        span.aborted()
        raise
    except BaseException as error:
        span.failed(error)
        raise
    finally:
        span.end()
