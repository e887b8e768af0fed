"""8.5 軽いスパン: MLflow を読み込まず、OpenTelemetry の SDK だけで作り、MLflow で見る。

MLflow で見えて検索できるもの: プレビュー、状態、種類、会話、ユーザー、トークン数、コスト。届かない
もの: 送り手と Git のメタデータ、run への紐付け、MLflow の SDK のスパンとの親子。fork した子では、
SDK が送信待ちを空にする(2 度送らない)。``multiprocessing`` の子は、終わる前に ``flush`` を呼ぶ。
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
from collections.abc import AsyncGenerator, Callable, Generator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TypeVar, cast

from opentelemetry import context, trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from .deadlines import run_in_time
from .native_delivery import (
    SPAN_TYPE,
    Destination,
    HashedOnce,
    NativeStatus,
    base_url,
    experiment_id_of,
)

F = TypeVar("F", bound=Callable[..., Any])
_INPUTS = "mlflow.spanInputs"
_OUTPUTS = "mlflow.spanOutputs"
_TRACE_NAME = "mlflow.traceTag.mlflow.traceName"
_tracer: trace.Tracer = trace.NoOpTracer()


# ---- 送信を始める


@dataclass
class NativeTracing:
    """動いている送信。``setup_native_tracing`` が返す。"""

    experiment_id: str | None
    _destinations: dict[str, Destination]

    def status(self) -> dict[str, NativeStatus]:
        """送り先の URL ごとの、届いた数と失われた数。"""
        return {url: replace(one.exporter.status) for url, one in self._destinations.items()}

    def flush(self, timeout_seconds: float = 10.0) -> dict[str, NativeStatus]:
        """残りを送る。``timeout_seconds`` 秒で必ず戻る(間に合わなかった数は ``pending``)。"""
        run_in_time([one.force_flush for one in self._destinations.values()], timeout_seconds)
        return self.status()

    def shutdown(self, timeout_seconds: float = 10.0) -> dict[str, NativeStatus]:
        """残りを送って終える。呼ばなければ、プロセスの終わりに SDK が行う(30 秒まで待つ)。"""
        run_in_time([one.shutdown for one in self._destinations.values()], timeout_seconds)
        return self.status()


def setup_native_tracing(
    endpoint_or_server: str,
    experiment: str | None,
    service_name: str,
    *,
    collector: str | None = None,
    headers: Mapping[str, str] | None = None,
    masking: Callable[[str], str] | None = None,
    sampling_ratio: float = 1.0,
    max_queue_spans: int = 4_096,
) -> NativeTracing:
    """``traced`` のスパンを送り始める(値の誤りは ValueError、サーバーの誤りは ConnectionError)。

    Args:
        endpoint_or_server: MLflow のサーバー。``experiment`` が None なら OTLP/HTTP の受け口。
        experiment: エクスペリメントの名前。なければ作る。
        collector: もう 1 つの送り先。鍵や期限は、``OTEL_EXPORTER_OTLP_*`` の環境変数で決める。
        headers: ``endpoint_or_server`` への認証などのヘッダー。
        masking: 文字列を隠す関数(8.1 の ``mask_pii().text`` など)。送信スレッドで呼ぶ。
    """
    global _tracer
    if not service_name or not 0 <= sampling_ratio <= 1 or max_queue_spans < 1:
        given = f"{service_name=}, {sampling_ratio=}, {max_queue_spans=}"
        raise ValueError(f"{given}: write a name, a ratio from 0 to 1, and a limit of 1 or more")
    server = base_url(endpoint_or_server)
    keys = {name: value.strip() for name, value in (headers or {}).items()}
    receivers = {server: keys}
    if collector is not None:
        receivers[base_url(collector)] = {}
    experiment_id = None
    if experiment is not None:
        experiment_id = experiment_id_of(server, experiment, keys)
        keys["x-mlflow-experiment-id"] = experiment_id
    resource = HashedOnce(Resource.create({"service.name": service_name}))
    provider = TracerProvider(ParentBasedTraceIdRatio(sampling_ratio), resource)
    destinations = {
        url: Destination(url, keys_of_url, masking, max_queue_spans)
        for url, keys_of_url in receivers.items()
    }
    for destination in destinations.values():
        provider.add_span_processor(destination)
    _tracer = provider.get_tracer(__name__)
    return NativeTracing(experiment_id, destinations)


# ---- スパン


class traced:
    """関数(非同期とジェネレーターも)か、``with`` の中を 1 つのスパンにする。

    関数では、引数が入力、戻り値(ジェネレーターでは断片の一覧)が出力になる。最後まで読まれなかった
    ジェネレーターは ``stream.aborted`` を付けて終える。``setup_native_tracing`` の前は記録しない。
    """

    def __init__(self, *, span_type: str = "UNKNOWN", name: str | None = None) -> None:
        self._span_type = span_type
        self._name = name
        self._running: _Running | None = None

    def __enter__(self) -> trace.Span:
        self._running = _Running(self._name or self._span_type, self._span_type)
        self._running.__enter__()
        return self._running.span

    def __exit__(self, kind: object, error: BaseException | None, where: object) -> None:
        running = cast("_Running", self._running)
        running.__exit__(kind, error, where)
        if error is None:
            running.end()

    def __call__(self, function: F) -> F:
        name = self._name or function.__name__
        arguments = _arguments_of(function)

        def start(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Running:
            running = _Running(name, self._span_type)
            if running.span.is_recording():
                given = arguments(args, kwargs)
                given.pop("self", None)
                given.pop("cls", None)
                _write(running.span, _INPUTS, given)
            return running

        is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        wrap = _asynchronous if is_async else _synchronous
        return cast("F", functools.wraps(function)(wrap(function, start)))


Arguments = Callable[[tuple[Any, ...], dict[str, Any]], "dict[str, Any]"]


def _arguments_of(function: Callable[..., Any]) -> Arguments:
    """呼び出しの引数を、名前つきの辞書にする関数(既定値も入る。誤りは、呼ばれた関数が知らせる)。"""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    names = [one.name for one in parameters]
    required = {one.name for one in parameters if one.default is one.empty}
    defaults = {one.name: one.default for one in parameters if one.name not in required}

    def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        given = dict(zip(names, args, strict=False)) | kwargs
        if not required <= given.keys():
            return {}
        return given | {name: value for name, value in defaults.items() if name not in given}

    def bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        try:
            found = signature.bind(*args, **kwargs)
        except TypeError:
            return {}
        found.apply_defaults()
        return found.arguments

    varies = any(one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in parameters)
    return bound if varies else named


_NATIVE = context.create_key("native-span")
_EMPTY = context.Context()
_NOT_FAILURES = (StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError)


class _Running:
    """動いているスパン 1 つ。``with`` で中に入り、何度でも出入りできる。例外で出ると終わる。"""

    def __init__(self, name: str, span_type: str) -> None:
        around = trace.get_current_span()
        around_context = around.get_span_context()
        native: Any = context.get_value(_NATIVE)
        parent = around if around_context.is_remote else native
        attributes = {SPAN_TYPE: span_type}
        if parent is None:
            above = _EMPTY
            attributes[_TRACE_NAME] = name  # これがないと、トレースに名前が付かない
        else:
            above = trace.set_span_in_context(parent, _EMPTY)
        self.span = _tracer.start_span(name, above, attributes=attributes)
        # ほかの計装のスパンは MLflow に届かないので、親にしない。いまのスパンとしても替えない
        is_foreign = around_context.is_valid and around is not parent
        inside = context.get_current() if is_foreign else trace.set_span_in_context(self.span)
        self._inside = context.set_value(_NATIVE, self.span, inside)
        self._outside = _EMPTY
        self.chunks: list[Any] | None = None
        """ジェネレーターの、いままでの断片。"""

    def __enter__(self) -> None:
        self._outside = context.get_current()
        context.attach(self._inside)

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> None:
        self._inside = context.get_current()  # 中で開いたままの with は、次の断片でも開いている
        context.attach(self._outside)  # detach(token) は、別のスレッドの文脈で終わると失敗する
        if error is not None:
            self.end(error)

    def end(self, error: BaseException | None = None) -> None:
        """状態を付けて終える。"""
        span = self.span
        if self.chunks is not None:
            _write(span, _OUTPUTS, self.chunks)
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            span.set_attribute("stream.aborted", True)
        if error is not None and not isinstance(error, _NOT_FAILURES):
            span.record_exception(error)
            span.set_status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")
        elif isinstance(span, ReadableSpan) and span.status.status_code is trace.StatusCode.UNSET:
            span.set_status(trace.StatusCode.OK)  # 利用者が決めていれば、そのまま
        span.end()


Start = Callable[[tuple[Any, ...], dict[str, Any]], _Running]


def _synchronous(function: Any, start: Start) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        running = start(args, kwargs)
        with running:
            result = function(*args, **kwargs)
            _write(running.span, _OUTPUTS, result)
        running.end()
        return result

    def generate(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        source = function(*args, **kwargs)
        running = start(args, kwargs)
        running.chunks = []
        step: Callable[[Any], Any] = source.send
        value: Any = None
        while True:
            try:
                with running:
                    chunk = step(value)
            except StopIteration as stop:
                return stop.value
            running.chunks.append(chunk)
            try:
                value = yield chunk
                step = source.send
            except BaseException as error:  # 閉じられたことも、中身に知らせる
                value = error
                step = source.throw

    return generate if inspect.isgeneratorfunction(function) else call


def _asynchronous(function: Any, start: Start) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        running = start(args, kwargs)
        with running:
            result = await function(*args, **kwargs)
            _write(running.span, _OUTPUTS, result)
        running.end()
        return result

    async def generate(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        source = function(*args, **kwargs)
        running = start(args, kwargs)
        running.chunks = []
        step: Callable[[Any], Any] = source.asend
        value: Any = None
        while True:
            try:
                with running:
                    chunk = await step(value)
            except StopAsyncIteration:
                return
            running.chunks.append(chunk)
            try:
                value = yield chunk
                step = source.asend
            except BaseException as error:
                value = error
                step = source.athrow

    return generate if inspect.isasyncgenfunction(function) else call


_ANNOTATIONS = {
    "provider": "gen_ai.provider.name",
    "model": "gen_ai.response.model",
    "input_tokens": "gen_ai.usage.input_tokens",
    "output_tokens": "gen_ai.usage.output_tokens",
    "cache_read_tokens": "gen_ai.usage.cache_read.input_tokens",
    "cache_write_tokens": "gen_ai.usage.cache_write.input_tokens",
    "reasoning_tokens": "gen_ai.usage.reasoning.output_tokens",
    "prompt_name": "gen_ai.prompt.name",
    "prompt_version": "gen_ai.prompt.version",
    "session": "session.id",
    "user": "user.id",
}


def annotate_span(*, inputs: Any = None, outputs: Any = None, **values: Any) -> None:
    """いまの native のスパンに書く。

    ``values`` は ``provider`` ``model`` ``input_tokens`` (キャッシュの分を含む) ``output_tokens``
    ``cache_read_tokens`` ``cache_write_tokens`` ``reasoning_tokens`` ``prompt_name``
    ``prompt_version`` ``session`` ``user`` か、そのままの属性の名前。
    """
    span: Any = context.get_value(_NATIVE) or trace.INVALID_SPAN
    given = {_ANNOTATIONS.get(name, name): v for name, v in values.items() if v is not None}
    if "gen_ai.prompt.version" in given:
        given["gen_ai.prompt.version"] = str(given["gen_ai.prompt.version"])
    for name in given.keys() & {"session.id", "user.id"}:
        given[name] = str(given[name])[:250]  # これより長いと、1 回分のスパンを全部拒否される
    span.set_attributes(given)
    _write(span, _INPUTS, inputs)
    _write(span, _OUTPUTS, outputs)


_ENCODER = json.JSONEncoder(
    ensure_ascii=False,  # dataclass と pydantic のモデルは、その項目を書く
    default=lambda v: vars(v) if is_dataclass(v) or hasattr(type(v), "model_dump") else str(v),
)


def _write(span: trace.Span, name: str, value: Any) -> None:
    """値を JSON にして、スパンに書く。"""
    if value is None or not span.is_recording():
        return
    try:
        text = _ENCODER.encode(value)
    except Exception as error:  # 循環、文字列でないキー、例外になる __str__
        text = json.dumps(f"<{type(value).__name__} is not JSON: {type(error).__name__}>")
    if not text.isascii():
        text = text.encode(errors="replace").decode()  # 片割れの文字は送れない
    span.set_attribute(name, text)
