"""8.1 テールサンプリングの仕組み(sampling_strategies.py の土台)。

終わったトレースだけを見て残すかどうかを決め、捨てるものは MLflow の送信処理に渡さない。したがって
ネットワークにもデータベースにも出ていかない。残すものには重み(確率の逆数)を付ける。
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from mlflow.entities import TraceState
from opentelemetry.sdk import trace as otel
from opentelemetry.sdk.trace import ReadableSpan, sampling
from opentelemetry.trace import StatusCode

from . import _internals
from .delivery.text import copied_span
from .policies import Decision, TraceSummary, check_probability

logger = logging.getLogger(__name__)

Policy = Callable[[TraceSummary], Decision]
Send = Callable[[ReadableSpan], None]

PROBABILITY_KEY = "sampling.probability"
WEIGHT_KEY = "sampling.weight"
RULE_KEY = "sampling.rule"
HEAD_KEY = "sampling.head_probability"
MAX_OPEN_TRACES = 10_000  # 超えた分は、古い順に、判断せずに残す(規則は "evicted")
MAX_DROPPED = 8192  # 捨てた後に終わる子(背後のスレッドなど)も捨てるために、覚えておく数
_EVICTED = Decision(1.0, "evicted")


def unit_hash(trace_id: str) -> float:
    """トレース ID から決まる [0, 1) の値。先頭の間引きが見るビットとは独立。"""
    digest = hashlib.blake2b(f"tail:{trace_id}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48


class TailSampler:
    """トレースが終わってから残すかどうかを決め、MLflow の送信につなぐ。"""

    kept: int
    """いままでに残したトレースの件数。"""
    dropped: int
    """いままでに捨てたトレースの件数(先頭で捨てたものも)。"""

    def __init__(self, policy: Policy, *, head_probability: float = 1.0) -> None:
        """``policy`` は、トレースの要約から判断を返す関数。MLflow につなぐのは ``install()``。

        Args:
            head_probability: その前に先頭で残す割合。1 のままなら、環境変数
                ``MLFLOW_TRACE_SAMPLING_RATIO`` の割合。どちらも重みに反映される。
        """
        check_probability("head_probability", head_probability)
        self.head_probability = head_probability
        self._policy = policy
        self._attached: dict[otel.TracerProvider, sampling.Sampler] = {}
        self.forget()

    def forget(self) -> None:
        """預かったスパンと件数を空にする(フォークした子には、親のものが写っている)。"""
        self._lock = threading.Lock()
        self._open: OrderedDict[int, list[tuple[Send, ReadableSpan]]] = OrderedDict()
        self._dropped: OrderedDict[int, None] = OrderedDict()
        self.kept = 0
        self.dropped = 0

    def install(self) -> TailSampler:
        """MLflow につなぐ。以後に始まるトレースから有効になる(2 回目は何もしない)。

        ``set_experiment`` などで MLflow がプロバイダーを作り直しても有効なまま残る。

        Raises:
            RuntimeError: 別のサンプラーが有効、または MLflow の内部が変わった。
        """
        global _active
        if _active is self:
            return self
        if _active is not None:
            raise RuntimeError(f"{type(_active).__name__} is installed; uninstall() it first")
        self._unwatch = _internals.watch_provider(self._attach)
        try:
            self._attach()
        except Exception as error:  # MLflow の内部の名前が変わった。トレースは、間引かずに続ける
            self._unwatch()
            self._attached.clear()
            raise RuntimeError(f"TailSampler does not fit this MLflow: {error}") from error
        _active = self
        return self

    def uninstall(self) -> None:
        """MLflow から外す。預かっている子スパンは、捨てずに渡す。"""
        global _active
        if _active is not self:
            return
        _active = None
        self._unwatch()
        self._detach()
        with self._lock:
            held = [item for items in self._open.values() for item in items]
            self._open.clear()
        _send_all(held)

    def _attach(self) -> None:
        """いまのプロバイダーの、スパンの行き先とサンプラーを包む。"""
        provider = _internals.current_provider()
        if not isinstance(provider, otel.TracerProvider) or provider in self._attached:
            return  # トレーシングが無効か、まだ作られていない
        plain = provider.sampler
        self._attached[provider] = plain
        given = self.head_probability < 1.0
        ratio = self.head_probability if given else _internals.head_ratio(plain)
        head = plain if ratio is None else sampling.ParentBased(_Head(ratio, self))
        _internals.use_pipeline(provider, _Gate(self), head)

    def _detach(self) -> None:
        for provider, plain in self._attached.items():
            _internals.use_pipeline(provider, otel.SynchronousMultiSpanProcessor(), plain)
        self._attached.clear()

    def head_dropped(self) -> None:
        """先頭で 1 件捨てられた。"""
        with self._lock:
            self.dropped += 1

    def span_started(self, span: otel.Span) -> None:
        """ルートがこのプロセスにあるトレースだけを預かる(ほかは、呼び出し元のサービスが決める)。"""
        context = span.get_span_context()
        if span.parent is not None or not context.trace_flags.sampled:
            return
        oldest: list[tuple[Send, ReadableSpan]] = []
        with self._lock:
            self._open[context.trace_id] = []
            if len(self._open) > MAX_OPEN_TRACES:
                _, oldest = self._open.popitem(last=False)
                self.kept += 1
        _send_all(oldest)

    def span_ended(self, span: ReadableSpan, send: Send) -> None:
        """子は預かり、ルートが終わったら決めて、まとめて渡すか捨てる。"""
        trace_id = _otel_id(span)
        with self._lock:
            held = self._open.get(trace_id)
            if held is not None and span.parent is not None:
                held.append((send, span))
                return
            is_dropped = trace_id in self._dropped
        if held is not None:
            self._decide(span, held, send)
        elif not is_dropped:  # 預かっていないもの(終わる前にあふれたものなど)は残す
            send(span if span.parent is not None else _marked(span, _EVICTED))

    def _decide(
        self, root: ReadableSpan, held: list[tuple[Send, ReadableSpan]], send: Send
    ) -> None:
        trace_id = _otel_id(root)
        summary = _summary(root, [child for _, child in held])
        decision = self._ask(summary)
        keep = unit_hash(summary.trace_id) < decision.probability
        with self._lock:
            if self._open.pop(trace_id, None) is None:  # 判断している間にあふれ、子は渡した
                held, decision, keep = [], _EVICTED, True
            elif keep:
                self.kept += 1
            else:
                self.dropped += 1
                self._dropped[trace_id] = None
                if len(self._dropped) > MAX_DROPPED:
                    self._dropped.popitem(last=False)
        if keep:
            _send_all([*held, (send, _marked(root, decision))])
        else:
            _internals.forget_trace(trace_id)

    def _ask(self, summary: TraceSummary) -> Decision:
        try:
            decision: Any = self._policy(summary)
            if not isinstance(decision, Decision):
                raise TypeError(f"policy returned {decision!r}; return a Decision")
            return decision
        except Exception:  # 判断の不具合で記録を失わない
            logger.exception("sampling policy failed; the trace is kept")
            return Decision(1.0, "policy_error")


_active: TailSampler | None = None


def _renew_after_fork() -> None:
    # フォークの瞬間に別のスレッドが持っていたロックは、子では永久に解かれない
    if _active is not None:
        _active.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_after_fork)


class _Gate(otel.SynchronousMultiSpanProcessor):
    """プロバイダーの入り口。MLflow の送信処理だけは、残すと決まったスパンを後から受け取る。"""

    def __init__(self, sampler: TailSampler) -> None:
        super().__init__()
        self._sampler = sampler

    def on_start(self, span: otel.Span, parent_context: Any = None) -> None:
        self._sampler.span_started(span)
        super().on_start(span, parent_context)

    def on_end(self, span: ReadableSpan) -> None:
        self._send(span, to_mlflow=False)
        self._sampler.span_ended(span, self._send)

    def _send(self, span: ReadableSpan, to_mlflow: bool = True) -> None:
        for processor in _internals.processors_of(self):
            if _internals.is_mlflows(processor) is to_mlflow:
                processor.on_end(span)


class _Head(sampling.Sampler):
    """ヘッドサンプリングを行い、残したものには確率を記す(``sampling_ratio_override`` にも従う)。"""

    def __init__(self, ratio: float, tail: TailSampler) -> None:
        self._ratio = ratio
        self._tail = tail

    def should_sample(self, *args: Any, **kwargs: Any) -> sampling.SamplingResult:
        override = _internals.sampling_ratio_override()
        ratio = self._ratio if override is None else override
        result = sampling.TraceIdRatioBased(ratio).should_sample(*args, **kwargs)
        if not result.decision.is_sampled():
            self._tail.head_dropped()
        elif ratio < 1.0:
            result.attributes = MappingProxyType({**result.attributes, HEAD_KEY: repr(ratio)})
        return result

    def get_description(self) -> str:
        return f"Head{{{self._ratio}}}"


def _send_all(held: list[tuple[Send, ReadableSpan]]) -> None:
    for send, span in held:
        send(span)


def _otel_id(span: ReadableSpan) -> int:
    return span.context.trace_id if span.context else 0


def _summary(root: ReadableSpan, children: list[ReadableSpan]) -> TraceSummary:
    failed = any(span.status.status_code is StatusCode.ERROR for span in (root, *children))
    user: str | None = None
    tags: dict[str, str] = {}
    trace_id = _internals.mlflow_trace_id(root)
    with _internals.open_trace_info(trace_id) as info:
        if info is not None:
            failed = failed or info.state is TraceState.ERROR
            user = info.trace_metadata.get("mlflow.trace.user")
            tags = dict(info.tags)
    return TraceSummary(
        trace_id=trace_id,
        name=root.name,
        duration_ms=((root.end_time or 0) - (root.start_time or 0)) / 1e6,
        is_error=failed,
        user=user,
        tags=tags,
    )


def _marked(root: ReadableSpan, decision: Decision) -> ReadableSpan:
    """残すトレースに確率・重み・規則を記す。OTLP にはメタデータが届かないので属性にも書く。"""
    attributes = root.attributes or {}
    probability = decision.probability * float(str(attributes.get(HEAD_KEY, 1)))
    values = {
        PROBABILITY_KEY: repr(probability),
        WEIGHT_KEY: repr(1.0 / probability),
        RULE_KEY: decision.rule,
    }
    with _internals.open_trace_info(_internals.mlflow_trace_id(root)) as info:
        if info is not None:
            info.trace_metadata.update(values)
    tags = {f"mlflow.traceTag.{key}": value for key, value in values.items()}
    return copied_span(root, attributes={**attributes, **values, **tags})
