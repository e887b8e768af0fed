"""8.1.2 スパンの手書き・属性・エラー情報とストリーミング(リスト8.1-8.3)。

自動トレースがないところは自分でスパンを作り、後で探せる属性と、原因の分かるエラー情報を残す。
ストリーミングでは、ユーザーが途中で切断しても、トレースを失わず、メモリーにも残さない。

Databricks でも同じ。ストリーミングのトレースは、最後の断片を送り終えるか、切断されたときに残る。
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Mapping
from typing import Any, TypeVar, cast
from weakref import WeakValueDictionary

import mlflow
from mlflow.entities import LiveSpan, SpanEvent
from opentelemetry.trace import INVALID_SPAN

from . import _internals
from .delivery.text import as_utf8

logger = logging.getLogger(__name__)

T = TypeVar("T")
Join = Callable[[list[Any]], Any]

TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"  # スパンの属性(秒)
TIME_TO_FIRST_CHUNK_MS = "stream.time_to_first_chunk_ms"  # トレースのメタデータ。OTLP では届かない


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


def _join_text(chunks: list[Any]) -> Any:
    """つないだ文字列。断片の境目で分かれた絵文字は戻し、片割れだけのものは U+FFFD に替える。"""
    if all(isinstance(chunk, bytes) for chunk in chunks):
        return b"".join(chunks).decode("utf-8", "replace")
    if not all(isinstance(chunk, str) for chunk in chunks):
        return chunks  # OpenAI の断片など。文字列にすると、分かれた個人情報を隠せない
    return "".join(chunks).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def traced_stream(
    name: str, chunks: Iterable[T], *, inputs: Any = None, join: Join = _join_text
) -> Generator[T, None, None]:
    """断片をそのまま渡しながら、全体を 1 つのスパンに記録する(最初の断片までの時間も)。

    ``@mlflow.trace`` を付けたジェネレーターは、最後まで読まれないとトレースが失われ、メモリーにも
    残り続ける。これは途中で閉じられても必ず終わり、``stream.aborted`` を付ける。``chunks`` の中の
    LLM の呼び出しは、どのスレッドやタスクから読まれても、このスパンの子になる。

    ``join`` は、断片の一覧から出力を作る関数(既定は、文字列ならつなぎ、ほかは一覧のまま)。例外の
    ときも、断片の一覧を記録する。
    """
    return _read(_Stream(name, inputs, join), chunks)


def atraced_stream(
    name: str, chunks: AsyncIterable[T], *, inputs: Any = None, join: Join = _join_text
) -> AsyncGenerator[T, None]:
    """``traced_stream`` の非同期版。タスクのキャンセルも切断として記録する。

    利用者に返すトレース ID は、``chunks`` の中で ``mlflow.get_active_trace_id()`` から得る。
    """
    return _aread(_Stream(name, inputs, join), chunks)


def _read(stream: _Stream, chunks: Iterable[T]) -> Generator[T, None, None]:
    with stream.recorded():
        with stream.running():
            iterator = iter(chunks)
        try:
            while True:
                with stream.running():
                    chunk = next(iterator)
                stream.add(chunk)
                yield chunk
        except StopIteration:
            return
        finally:
            with stream.running():
                getattr(iterator, "close", lambda: None)()


async def _aread(stream: _Stream, chunks: AsyncIterable[T]) -> AsyncGenerator[T, None]:
    with stream.recorded():
        with stream.running():
            iterator = aiter(chunks)
        try:
            while True:
                with stream.running():
                    chunk = await anext(iterator)
                stream.add(chunk)
                yield chunk
        except StopAsyncIteration:
            return
        finally:
            if aclose := getattr(iterator, "aclose", None):
                with stream.running():
                    await aclose()


# 読まれている途中のストリーム(スパンの ID ごと)。外側が切断されると、内側も一緒に終える
_OPEN: WeakValueDictionary[str, _Stream] = WeakValueDictionary()


class _Stream:
    """ストリーミング 1 回分のスパン。"""

    def __init__(self, name: str, inputs: Any, join: Join) -> None:
        self._name = name
        self._inputs = as_utf8(inputs)
        self._join = join
        self._chunks: list[Any] = []
        # 本体は、リクエストの文脈が片付いた後に、別のスレッドから読まれることがある
        self._made_in = contextvars.copy_context()

    @contextlib.contextmanager
    def recorded(self) -> Generator[None, None, None]:
        """最初の断片を求められたときに始め、どう終わっても、スパンを終える。"""
        in_trace = _internals.current_span().is_recording()
        self._span = self._start_span() if in_trace else self._made_in.run(self._start_span)
        above = _internals.span_ids_above(self._span)
        self._is_inner = any(span_id in _OPEN for span_id in above)
        _OPEN[self._span.span_id] = self
        self._inside = INVALID_SPAN  # 中で開いたままのスパンは、次の断片のときも開いている
        self._started = time.perf_counter()
        try:
            yield
        except BaseException as error:
            self._end(error)
            raise
        self._end(None)

    def _start_span(self) -> LiveSpan:
        """いまのスパンの子として始める。その親がもう終わっていれば、新しいトレースとして始める。"""
        ended = getattr(_internals.current_span(), "end_time", None) is not None
        root = _internals.otel_span_is_current(INVALID_SPAN) if ended else contextlib.nullcontext()
        with root:
            parent = mlflow.get_current_active_span()
            return mlflow.start_span_no_context(self._name, inputs=self._inputs, parent_span=parent)

    @contextlib.contextmanager
    def running(self) -> Generator[None, None, None]:
        """中身が動いている間だけ、スパンを有効にする(断片を受け取る側には漏らさない)。"""
        with _internals.span_is_current(self._span, self._inside):
            yield
            self._inside = _internals.current_span()

    def add(self, chunk: Any) -> None:
        self._chunks.append(chunk)
        if len(self._chunks) > 1:
            return
        seconds = time.perf_counter() - self._started
        self._span.set_attribute(TIME_TO_FIRST_CHUNK, round(seconds, 6))
        with _internals.open_trace_info(self._span.trace_id) as info:
            if info is not None and not self._is_inner:
                info.trace_metadata.setdefault(TIME_TO_FIRST_CHUNK_MS, f"{seconds * 1000:.0f}")

    def _end(self, error: BaseException | None) -> None:
        span: Any = self._span
        if span.end_time_ns is not None:  # 外のストリームが切断され、一緒に終えた
            return
        for child in _internals.open_spans_below(span):
            # 読みかけの LLM のスパンは、自分では終わらない。残すと、MLflow はトレースを送らない
            if inner := _OPEN.get(child.span_id):
                inner._end(GeneratorExit())
            elif error is not None or _internals.is_half_read_stream(child):
                child.set_attribute("stream.aborted", True)
                child.end()
        is_cut = isinstance(error, GeneratorExit | asyncio.CancelledError)
        if is_cut:
            span.set_attribute("stream.aborted", True)
        elif error is not None:
            record_error(span, error)
            span.add_event(SpanEvent.from_exception(cast("Exception", error)))
        span.set_attribute("stream.chunks", len(self._chunks))
        span.set_outputs(as_utf8(self._output()))
        span.set_outputs(as_utf8(span.outputs))  # 断片がオブジェクトでも、ここでは文字列か辞書
        span.end(status="OK" if is_cut or error is None else "ERROR")

    def _output(self) -> Any:
        try:
            return self._join(self._chunks)
        except Exception as error:  # 記録の都合で、応答もトレースも失わない
            kind = type(error).__name__
            logger.warning("join of %r failed (%s); its chunks are kept", self._name, kind)
            return self._chunks
