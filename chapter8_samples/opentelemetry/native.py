"""8.5 軽いスパン: MLflow を読み込まず、OpenTelemetry の SDK だけで作り、MLflow で見る。

プレビュー、状態、種類、会話、ユーザー、トークン数、コストが MLflow に残り、検索できる。送り手と Git
のメタデータ、run への紐付け、MLflow の SDK のスパンとの親子は届かない。fork した子では、SDK が
送信待ちを空にする(2 度送らない)。``multiprocessing`` の子は終了処理をしないので ``flush`` を呼ぶ。

Databricks へは、``preset("databricks", ...)`` で送る。
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import os
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import requests
from opentelemetry import context, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, Status, StatusCode

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Any])
Mask = Callable[[str], str]
_TYPE, _INPUTS, _OUTPUTS = "mlflow.spanType", "mlflow.spanInputs", "mlflow.spanOutputs"
_NATIVE, _OK = context.create_key("native-span"), Status(StatusCode.OK)
_NOT_FAILURES = (StopIteration, StopAsyncIteration, GeneratorExit, asyncio.CancelledError)
_tracer: trace.Tracer = trace.NoOpTracer()


@dataclass
class NativeStatus:
    """送り先 1 つへの、終わったスパンの数(fork した子では 0 から)。

    ``dropped`` は送信待ちの上限か ``shutdown`` で、``refused`` は送り先か ``masking`` で失った数。
    """

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
        """残りを送って終える。期限は ``flush`` と同じで、この後に終わるスパンは捨てる。"""
        return self._run([one.shutdown for one in self._destinations.values()], timeout_seconds)

    def _run(self, jobs: list[Callable[[], Any]], seconds: float) -> dict[str, NativeStatus]:
        """SDK は期限を守らないので、別のスレッドで動かして待つ。"""
        deadline = time.monotonic() + seconds
        threads = [threading.Thread(target=job, daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return self.status()


def setup_native_tracing(
    endpoint_or_server: str,
    experiment: str | None,
    service_name: str,
    *,
    collector: str | None = None,
    headers: Mapping[str, str] | None = None,
    masking: Mask | None = None,
    sampling_ratio: float = 1.0,
    max_queue_spans: int = 4_096,
) -> NativeTracing:
    """``traced`` のスパンを送り始める。プロセスの終わりには、SDK が残りを送る(30 秒まで)。

    間隔、期限、Collector の鍵は SDK の環境変数 ``OTEL_BSP_*`` ``OTEL_EXPORTER_OTLP_*`` で決める。

    Args:
        endpoint_or_server: MLflow のサーバー。``experiment`` が None なら OTLP/HTTP の受け口。
        experiment: エクスペリメントの名前。なければ作る。
        collector: もう 1 つの送り先(``http://HOST:4318``)。
        headers: ``endpoint_or_server`` への認証などのヘッダー。
        masking: 文字列を隠す関数(8.1 の ``mask_pii().text`` など)。送信スレッドで呼ぶ。

    Raises:
        ValueError, ConnectionError: 値が誤っている。エクスペリメントを読めない。
    """
    global _tracer
    if not service_name:
        raise ValueError(f"service_name {service_name!r} is empty; write the name of the service")
    if not 0 <= sampling_ratio <= 1 or max_queue_spans < 1:
        wrong = f"sampling_ratio {sampling_ratio!r} or max_queue_spans {max_queue_spans!r}"
        raise ValueError(f"{wrong} is wrong; write 0 to 1, and 1 or more")
    url, keys, experiment_id = _base_url(endpoint_or_server), dict(headers or {}), None
    if experiment is not None:
        experiment_id = keys["x-mlflow-experiment-id"] = _experiment_id(url, experiment, keys)
    receivers = {url: keys} if collector is None else {url: keys, _base_url(collector): {}}
    resource = Resource.create({"service.name": service_name})
    provider = TracerProvider(ParentBased(TraceIdRatioBased(sampling_ratio)), resource)
    destinations: dict[str, _Destination] = {}
    for url, keys in receivers.items():
        destinations[url] = _Destination(_Sender(url, keys, masking), max_queue_spans)
        provider.add_span_processor(destinations[url])
    _tracer = provider.get_tracer(__name__)
    return NativeTracing(experiment_id, destinations)


def _base_url(url: str) -> str:
    base = url.strip().rstrip("/").removesuffix("/v1/traces")
    if any(mark in base for mark in "@?#"):  # 鍵かもしれないので、値は文面に出さない
        raise ValueError("the endpoint has a user name or a query; pass keys in headers")
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).hostname:
        raise ValueError(f"endpoint {url!r} is not a URL; write http://HOST:PORT")
    return base


def _experiment_id(server: str, name: str, headers: Mapping[str, str]) -> str:
    api, session = f"{server}/api/2.0/mlflow/experiments", requests.Session()
    session.headers.update(headers)
    try:
        session.post(f"{api}/create", json={"name": name}, timeout=10)  # あれば、断られるだけ
        answer = session.get(f"{api}/get-by-name", params={"experiment_name": name}, timeout=10)
        answer.raise_for_status()
        experiment = answer.json()["experiment"]
    except (requests.RequestException, KeyError, ValueError) as error:
        said = getattr(getattr(error, "response", None), "status_code", type(error).__name__)
        raise ConnectionError(
            f"experiment {name!r} cannot be read at {server} ({said}); start an MLflow server "
            "there and check headers, or pass experiment=None for a Collector"
        ) from None  # 元の文面には、ヘッダーの値が入りうる
    if experiment["lifecycle_stage"] != "active":
        raise ValueError(f"experiment {name!r} is deleted; restore it or use another name")
    return str(experiment["experiment_id"])


class _Destination(BatchSpanProcessor):
    """送り先 1 つ。SDK の送信待ちは、あふれると数えずに捨てるので、その手前で数えて捨てる。"""

    def __init__(self, sender: _Sender, limit: int) -> None:
        self.sender, self._limit, self._forked_ns = sender, limit, 0
        self._lock = threading.Lock()
        super().__init__(sender, limit, max_export_batch_size=min(512, limit))
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._restart)

    def on_end(self, span: ReadableSpan) -> None:
        if (span.start_time or 0) <= self._forked_ns:  # fork の前に始まったものは、親が送る
            return
        status = self.sender.status
        with self._lock:
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

    def __init__(self, url: str, headers: dict[str, str], masking: Mask | None) -> None:
        self.status, self._masking = NativeStatus(), masking
        self.start_again = functools.partial(self.__init__, url, headers, masking)
        super().__init__(f"{url}/v1/traces", headers=headers)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.status.sent, mask = self.status.sent + len(spans), self._masking
        result = SpanExportResult.FAILURE
        try:
            result = super().export([_hidden_copy(s, mask) for s in spans] if mask else spans)
        except Exception as error:  # マスキングの失敗も。隠せないまま送るより、1 回分を捨てる
            logger.error("sending %d spans failed (%s)", len(spans), type(error).__name__)
        if result is SpanExportResult.SUCCESS:
            self.status.delivered += len(spans)
        else:
            self.status.refused += len(spans)
        return result


def _hidden_copy(span: ReadableSpan, mask: Mask) -> ReadableSpan:
    def attributes(given: Any) -> dict[str, Any]:
        return {k: v if k == _TYPE else _hidden(v, mask) for k, v in (given or {}).items()}

    same = ("context", "parent", "resource", "links", "instrumentation_scope")
    return ReadableSpan(
        name=_hidden(span.name, mask),
        attributes=attributes(span.attributes),
        events=[Event(e.name, attributes(e.attributes), e.timestamp) for e in span.events],
        status=Status(span.status.status_code, _hidden(span.status.description, mask)),
        **{name: getattr(span, name) for name in (*same, "start_time", "end_time")},
    )


def _hidden(value: Any, mask: Mask) -> Any:
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
    """関数(同期、非同期、ジェネレーター)か、``with`` の中を 1 つのスパンにする。

    関数では、引数が入力、戻り値(ジェネレーターでは断片の全体)が出力になる。最後まで読まれなかった
    ジェネレーターは ``stream.aborted`` を付けて終える。``setup_native_tracing`` の前は記録しない。
    """

    def __init__(self, *, span_type: str = "UNKNOWN", name: str | None = None) -> None:
        self._span_type, self._name = span_type, name
        self._inside: Context | None = None
        self.chunks: list[Any] | None = None

    def __call__(self, function: F) -> F:
        name = self._name or getattr(function, "__name__", self._span_type)
        signature = inspect.signature(function)

        def start(args: Any, kwargs: Any) -> traced:
            running = traced(span_type=self._span_type, name=name)
            if running._start().is_recording():
                bound = signature.bind(*args, **kwargs)
                bound.apply_defaults()
                given = {k: v for k, v in bound.arguments.items() if k not in ("self", "cls")}
                running._span.set_attribute(_INPUTS, _to_json(given))
            return running

        is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        wrapped: Any = (_asynchronous if is_async else _synchronous)(function, start)
        functools.update_wrapper(wrapped, function)
        return wrapped

    def _start(self) -> Span:
        around, native = trace.get_current_span(), context.get_value(_NATIVE)
        # ほかの計装のスパンは MLflow に届かないので、親にしない。いまのスパンとしても替えない
        parent: Any = around if around.get_span_context().is_remote else native
        is_foreign = around.get_span_context().is_valid and around is not parent
        name, attributes = self._name or self._span_type, {_TYPE: self._span_type}
        if not parent:  # これがないと、トレースに名前が付かない
            attributes["mlflow.traceTag.mlflow.traceName"] = name
        above = trace.set_span_in_context(parent or trace.INVALID_SPAN)
        self._span = _tracer.start_span(name, above, attributes=attributes)
        inside = context.get_current() if is_foreign else trace.set_span_in_context(self._span)
        self._inside = context.set_value(_NATIVE, self._span, inside)
        return self._span

    def __enter__(self) -> Span:
        span = self._span if self._inside else self._start()
        self._outside = context.get_current()
        context.attach(cast("Context", self._inside))
        return span

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> None:
        self._inside = context.get_current()  # 中で開いたままの with は、次の断片でも開いている
        context.attach(self._outside)  # detach(token) は、別のスレッドの文脈で終わると失敗する
        if self.chunks is not None:
            if error is None:
                return
            is_text = all(isinstance(chunk, str) for chunk in self.chunks)
            _returned(self._span, "".join(self.chunks) if is_text else self.chunks)
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            self._span.set_attribute("stream.aborted", True)
        if error is not None and not isinstance(error, _NOT_FAILURES):
            self._span.record_exception(error)
            self._span.set_status(StatusCode.ERROR, f"{type(error).__name__}: {error}")
        elif getattr(self._span, "status", _OK).status_code is StatusCode.UNSET:
            self._span.set_status(_OK)
        self._span.end()
        self._inside = None


def _returned(span: Span, value: Any) -> Any:
    if span.is_recording():
        span.set_attribute(_OUTPUTS, _to_json(value))
    return value


def _synchronous(function: Any, start: Callable[..., traced]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with start(args, kwargs) as span:
            return _returned(span, function(*args, **kwargs))

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
            return _returned(span, await function(*args, **kwargs))

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
    "session": "session.id",
    "user": "user.id",
}


def annotate_span(*, inputs: Any = None, outputs: Any = None, **values: Any) -> None:
    """いまの native のスパンに書く。スパンがないか、間引かれていれば、何もしない。

    ``values`` は ``provider`` ``model`` ``input_tokens`` (キャッシュの分を含む) ``output_tokens``
    ``cache_read_tokens`` ``cache_write_tokens`` ``session`` ``user`` と、点のある属性の名前。
    """
    if unknown := {name for name in values.keys() - _ANNOTATIONS if "." not in name}:
        raise ValueError(f"annotate_span has no {unknown}; write {list(_ANNOTATIONS)}")
    span: Any = context.get_value(_NATIVE)
    if span is None or not span.is_recording():
        return
    texts = {_INPUTS: inputs, _OUTPUTS: outputs}
    values |= {name: _to_json(value) for name, value in texts.items() if value is not None}
    given = {_ANNOTATIONS.get(name, name): v for name, v in values.items() if v is not None}
    for name in given.keys() & {"session.id", "user.id"}:
        given[name] = str(given[name])[:250]  # これより長いと、サーバーは 1 回分のスパンを全部断る
    span.set_attributes(given)


_encoder = json.JSONEncoder(
    ensure_ascii=False,  # dataclass と pydantic のモデルは、その項目を書く
    default=lambda v: vars(v) if is_dataclass(v) or hasattr(type(v), "model_dump") else str(v),
)


def _to_json(value: Any) -> str:
    """どんな値でもアプリを止めない。片割れの文字は、1 回分のスパンを送れなくするので替える。"""
    try:
        text = _encoder.encode(value)
    except Exception as error:  # 循環、文字列でないキー、例外になる __str__
        text = json.dumps(f"<{type(value).__name__} is not JSON: {type(error).__name__}>")
    return text.encode(errors="replace").decode()
