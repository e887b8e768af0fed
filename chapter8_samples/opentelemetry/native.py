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
import logging
import os
import re
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TypeVar, cast

import requests
from opentelemetry import context, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

from .deadlines import run_in_time
from .endpoint import split_endpoint

F = TypeVar("F", bound=Callable[..., Any])
_TYPE, _INPUTS, _OUTPUTS = "mlflow.spanType", "mlflow.spanInputs", "mlflow.spanOutputs"
_NATIVE, _NO_PARENT = context.create_key("native-span"), context.Context()
_NOT_FAILURES = (StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError)
_tracer: trace.Tracer = trace.NoOpTracer()


@dataclass
class NativeStatus:
    """終わったスパンの数(fork した子は 0 から)。``dropped`` と ``refused`` は失った数。"""

    ended: int = 0
    dropped: int = 0
    sent: int = 0
    delivered: int = 0
    refused: int = 0

    @property
    def pending(self) -> int:
        """まだ結果の出ていない数。"""
        return self.ended - self.dropped - self.delivered - self.refused


@dataclass
class NativeTracing:
    """動いている送信。``setup_native_tracing`` が返す。"""

    experiment_id: str | None
    _destinations: dict[str, _Destination]

    def status(self) -> dict[str, NativeStatus]:
        """送り先の URL ごとの、届いた数と失われた数。"""
        return {url: replace(one.sender.status) for url, one in self._destinations.items()}

    def flush(self, timeout_seconds: float = 10.0) -> dict[str, NativeStatus]:
        """残りを送る。``timeout_seconds`` 秒で必ず戻る(間に合わなかった数は ``pending``)。"""
        return self._run([one.force_flush for one in self._destinations.values()], timeout_seconds)

    def shutdown(self, timeout_seconds: float = 10.0) -> dict[str, NativeStatus]:
        """残りを送って終える。呼ばなければ、プロセスの終わりに SDK が行う(30 秒まで待つ)。"""
        return self._run([one.shutdown for one in self._destinations.values()], timeout_seconds)

    def _run(self, jobs: list[Callable[[], Any]], seconds: float) -> dict[str, NativeStatus]:
        run_in_time(jobs, seconds)
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
    keys = {name: value.strip() for name, value in (headers or {}).items()}
    url, experiment_id = _base_url(endpoint_or_server), None
    if experiment is not None:
        experiment_id = keys["x-mlflow-experiment-id"] = _experiment_id(url, experiment, keys)
    receivers = {url: keys} if collector is None else {url: keys, _base_url(collector): {}}
    resource = Resource.create({"service.name": service_name})
    provider = TracerProvider(ParentBasedTraceIdRatio(sampling_ratio), resource)
    destinations: dict[str, _Destination] = {}
    for url, keys in receivers.items():
        destinations[url] = _Destination(_Sender(url, keys, masking), max_queue_spans)
        provider.add_span_processor(destinations[url])
    _tracer = provider.get_tracer(__name__)
    return NativeTracing(experiment_id, destinations)


def _base_url(url: str) -> str:
    try:
        parts = split_endpoint(url)
    except ValueError as error:
        safe = re.sub("[^/]*@|[?#].*", "", url.strip())  # 鍵かもしれないところは、文面に出さない
        write = "write http://HOST:PORT, and keys in headers"
        raise ValueError(f"endpoint {safe!r} is wrong; {write} ({error})") from None
    return f"{parts.scheme}://{parts.netloc}{parts.path}".rstrip("/").removesuffix("/v1/traces")


def _experiment_id(server: str, name: str, headers: Mapping[str, str]) -> str:
    api, session, found = f"{server}/api/2.0/mlflow/experiments", requests.Session(), {}
    session.headers.update(headers)
    try:
        session.post(f"{api}/create", json={"name": name}, timeout=10)  # あれば、拒否されるだけ
        answer = session.get(f"{api}/get-by-name", params={"experiment_name": name}, timeout=10)
        said, found = f"HTTP {answer.status_code}", answer.json().get("experiment", {})
    except (requests.RequestException, ValueError) as error:
        said = type(error).__name__  # 文面には、ヘッダーの値が入りうる
    if found.get("lifecycle_stage") != "active":
        raise ConnectionError(
            f"experiment {name!r} cannot be used at {server} ({said}); start an MLflow server "
            "there, check headers, restore it if deleted, or pass experiment=None for a Collector"
        )
    return str(found["experiment_id"])


class _Destination(BatchSpanProcessor):
    """送り先 1 つ。SDK の送信待ちは、あふれると数えずに捨てるので、その手前で数えて捨てる。"""

    def __init__(self, sender: _Sender, limit: int) -> None:
        self.sender, self._limit, self._lock = sender, limit, threading.Lock()
        self._forked_ns = 0
        super().__init__(sender, limit, max_export_batch_size=min(512, limit))
        getattr(os, "register_at_fork", lambda **_: None)(after_in_child=self._restart)

    def on_end(self, span: ReadableSpan) -> None:
        if (span.start_time or 0) > self._forked_ns:  # fork の前に始まったものは、親が送る
            with self._lock:
                status = self.sender.status
                status.ended += 1
                is_full = status.ended - status.dropped - status.sent > self._limit
                status.dropped += is_full
            if not is_full:
                super().on_end(span)

    def shutdown(self) -> None:
        self._limit = 0
        super().shutdown()

    def _restart(self) -> None:  # fork した子は、親とつながったままの接続も使わない
        self._lock, self._forked_ns = threading.Lock(), time.time_ns()
        self.sender.start_again()


class _Sender(OTLPSpanExporter):
    """標準のエクスポーターに、マスキングと、結果を数えることを足したもの(送信スレッドで動く)。"""

    def __init__(self, url: str, keys: dict[str, str], mask: Callable[[str], str] | None) -> None:
        self.status, self._mask = NativeStatus(), mask
        self.start_again = functools.partial(self.__init__, url, keys, mask)
        super().__init__(f"{url}/v1/traces", headers=keys)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.status.sent, mask = self.status.sent + len(spans), self._mask
        result = SpanExportResult.FAILURE
        try:
            result = super().export([_hidden_copy(s, mask) for s in spans] if mask else spans)
        except Exception as error:  # マスキングの失敗も。隠せないまま送るより、1 回分を捨てる
            logging.getLogger(__name__).error("sending failed (%s)", type(error).__name__)
        if result is SpanExportResult.SUCCESS:
            self.status.delivered += len(spans)
        else:
            self.status.refused += len(spans)
        return result


def _hidden_copy(span: ReadableSpan, mask: Callable[[str], str]) -> ReadableSpan:
    def attributes(given: Any) -> dict[str, Any]:
        return {k: v if k == _TYPE else _hidden(v, mask) for k, v in (given or {}).items()}

    same = ("context", "parent", "resource", "links", "instrumentation_scope")
    return ReadableSpan(
        name=_hidden(span.name, mask),
        attributes=attributes(span.attributes),
        events=[Event(e.name, attributes(e.attributes), e.timestamp) for e in span.events],
        status=trace.Status(span.status.status_code, _hidden(span.status.description, mask)),
        **{name: getattr(span, name) for name in (*same, "start_time", "end_time")},
    )


def _hidden(value: Any, mask: Callable[[str], str]) -> Any:
    """JSON は、エスケープを解いてから中のキーと文字列と数を調べ、JSON に戻す。"""
    if isinstance(value, dict):
        return {str(mask(key)): _hidden(item, mask) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(item, mask) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, str) and value.startswith(("{", "[", '"')):
        with suppress(json.JSONDecodeError):
            return json.dumps(_hidden(json.loads(value), mask), ensure_ascii=False)
    hidden = str(mask(str(value)))
    return value if hidden == str(value) else hidden


class traced:
    """関数(非同期とジェネレーターも)か、``with`` の中を 1 つのスパンにする。

    関数では、引数が入力、戻り値(ジェネレーターでは断片の一覧)が出力になる。最後まで読まれなかった
    ジェネレーターは ``stream.aborted`` を付けて終える。``setup_native_tracing`` の前は記録しない。
    """

    def __init__(self, *, span_type: str = "UNKNOWN", name: str | None = None) -> None:
        self._span_type, self._name = span_type, name
        self._inside: Any = None
        self.chunks: list[Any] | None = None

    def __call__(self, function: F) -> F:
        signature, name = inspect.signature(function), self._name or function.__name__

        def start(args: Any, kwargs: Any) -> traced:
            running = traced(span_type=self._span_type, name=name)
            if running._start().is_recording():
                with suppress(TypeError):  # 引数の誤りは、呼ばれた関数が知らせる
                    bound = signature.bind(*args, **kwargs)
                    bound.apply_defaults()
                    given = {k: v for k, v in bound.arguments.items() if k not in ("self", "cls")}
                    _write(running._span, _INPUTS, given)
            return running

        is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        wrap = _asynchronous if is_async else _synchronous
        return cast("F", functools.wraps(function)(wrap(function, start)))

    def _start(self) -> trace.Span:
        around, native = trace.get_current_span(), context.get_value(_NATIVE)
        outer = around.get_span_context()
        parent: Any = around if outer.is_remote else native
        # ほかの計装のスパンは MLflow に届かないので、親にしない。いまのスパンとしても替えない
        is_foreign = outer.is_valid and around is not parent
        name, attributes = self._name or self._span_type, {_TYPE: self._span_type}
        if not parent:  # これがないと、トレースに名前が付かない
            attributes["mlflow.traceTag.mlflow.traceName"] = name
        above = trace.set_span_in_context(parent) if parent else _NO_PARENT
        self._span = _tracer.start_span(name, above, attributes=attributes)
        inside = context.get_current() if is_foreign else trace.set_span_in_context(self._span)
        self._inside = context.set_value(_NATIVE, self._span, inside)
        return self._span

    def __enter__(self) -> trace.Span:
        span = self._span if self._inside else self._start()
        self._outside = context.get_current()
        context.attach(self._inside)
        return span

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> None:
        self._inside = context.get_current()  # 中で開いたままの with は、次の断片でも開いている
        context.attach(self._outside)  # detach(token) は、別のスレッドの文脈で終わると失敗する
        if self.chunks is not None:
            if error is None:
                return
            _write(self._span, _OUTPUTS, self.chunks)
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            self._span.set_attribute("stream.aborted", True)
        if error is not None and not isinstance(error, _NOT_FAILURES):
            self._span.record_exception(error)
            self._span.set_status(trace.StatusCode.ERROR, f"{type(error).__name__}: {error}")
        elif isinstance(self._span, ReadableSpan) and not self._span.status.status_code.value:
            self._span.set_status(trace.StatusCode.OK)  # 利用者が決めていれば、そのまま
        self._span.end()
        self._inside = None


def _synchronous(function: Any, start: Callable[..., traced]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with start(args, kwargs) as span:
            return _write(span, _OUTPUTS, function(*args, **kwargs))

    def generate(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        source, running = function(*args, **kwargs), start(args, kwargs)
        step, value, running.chunks = source.send, None, []
        while True:
            try:
                with running:
                    chunk = step(value)
            except StopIteration as stop:
                return stop.value
            running.chunks.append(chunk)
            try:
                step, value = source.send, (yield chunk)
            except BaseException as error:  # 閉じられたことも、中身に知らせる
                step, value = source.throw, error

    return generate if inspect.isgeneratorfunction(function) else call


def _asynchronous(function: Any, start: Callable[..., traced]) -> Callable[..., Any]:
    async def call(*args: Any, **kwargs: Any) -> Any:
        with start(args, kwargs) as span:
            return _write(span, _OUTPUTS, await function(*args, **kwargs))

    async def generate(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        source, running = function(*args, **kwargs), start(args, kwargs)
        step, value, running.chunks = source.asend, None, []
        with suppress(StopAsyncIteration):
            while True:
                with running:
                    chunk = await step(value)
                running.chunks.append(chunk)
                try:
                    step, value = source.asend, (yield chunk)
                except BaseException as error:
                    step, value = source.athrow, error

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


_encoder = json.JSONEncoder(
    ensure_ascii=False,  # dataclass と pydantic のモデルは、その項目を書く
    default=lambda v: vars(v) if is_dataclass(v) or hasattr(type(v), "model_dump") else str(v),
)


def _write(span: trace.Span, name: str, value: Any) -> Any:
    if value is not None and span.is_recording():
        try:
            text = _encoder.encode(value)
        except Exception as error:  # 循環、文字列でないキー、例外になる __str__
            text = json.dumps(f"<{type(value).__name__} is not JSON: {type(error).__name__}>")
        span.set_attribute(name, text.encode(errors="replace").decode())  # 片割れの文字は送れない
    return value
