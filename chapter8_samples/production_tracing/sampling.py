"""8.1 テールサンプリングの仕組み(sampling_strategies.py の土台)。

終わったトレースだけを見て残すかどうかを決め、捨てるものは MLflow の送信処理に渡さない。したがって
ネットワークにもデータベースにも出ていかない。残すものには重み(確率の逆数)を付ける。

Databricks でも同じ。MLflow には捨てるための公開 API がないため、下の ``_Hooks`` とその周りだけが
非公開の名前を使う(MLflow 3.17 で確認。名前が変われば ``install()`` が ``RuntimeError`` を出す)。
"""

# MLflow と OpenTelemetry の非公開の名前を、このファイルだけで使う
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false
from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlflow
import mlflow.tracing
import mlflow.tracing.provider as mlflow_provider
from mlflow.entities import TraceInfo, TraceState
from mlflow.tracing.sampling import _SAMPLING_RATIO_OVERRIDE, _MlflowSampler
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.trace_manager import _Trace as LiveTrace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.sampling import (
    DEFAULT_ON,
    ParentBased,
    Sampler,
    SamplingResult,
    TraceIdRatioBased,
)
from opentelemetry.sdk.trace.sampling import Decision as HeadDecision
from opentelemetry.trace import StatusCode

logger = logging.getLogger(__name__)

PROBABILITY_KEY = "sampling.probability"
WEIGHT_KEY = "sampling.weight"
RULE_KEY = "sampling.rule"
_HEAD_KEY = "sampling.head_probability"
_MAX_DECISIONS = 8192  # 決定後に終わるスパン(背後のスレッドなど)のために覚えておく数


@dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """終わったトレースの要約。残すかどうかをこれで決める。"""

    trace_id: str
    name: str
    duration_ms: float
    is_error: bool
    """どれか 1 つのスパンでもエラーなら真。"""
    num_spans: int = 1
    user: str | None = None
    session: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    feedback: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """トレースの実行中に付いたフィードバック(名前 -> 値)。"""


@dataclass(frozen=True)
class Decision:
    """残す確率 [0, 1] と、その理由。"""

    probability: float
    rule: str

    def __post_init__(self) -> None:
        check_probability("probability", self.probability)


Policy = Callable[[TraceSummary], Decision]
Forward = Callable[[ReadableSpan], None]


@dataclass(frozen=True)
class SamplerStats:
    """``install()`` してからの件数。"""

    kept: int
    dropped: int
    by_rule: Mapping[str, tuple[int, int]]
    """規則 -> (残した件数, 捨てた件数)。"""
    policy_errors: int
    """判断の関数が例外になった件数(トレースは残している)。"""
    evicted: int
    """同時に開いているトレースが上限を超え、判断せずに残した件数。"""
    open_traces: int
    """子スパンを預かっている、終わっていないトレースの数。"""


def check_probability(name: str, value: float) -> None:
    """確率でなければ ``ValueError``(NaN も拒む)。"""
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r} must be within [0, 1]")


def unit_hash(trace_id: str, salt: str = "tail") -> float:
    """トレース ID から決まる [0, 1) の値。先頭の間引きが見るビットとは独立。"""
    digest = hashlib.blake2b(f"{salt}:{trace_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class TailSampler:
    """トレースが終わってから残すかどうかを決め、MLflow の送信につなぐ。"""

    def __init__(
        self, policy: Policy, *, head_probability: float = 1.0, max_open_traces: int = 10_000
    ) -> None:
        """設定だけを行う。MLflow につなぐのは ``install()``。

        Args:
            policy: 終わったトレースの要約から ``Decision`` を返す関数。例外なら残す。
            head_probability: その前に先頭で残す割合。重みに反映される。1 のままなら、環境変数
                ``MLFLOW_TRACE_SAMPLING_RATIO`` の割合が使われ、それも重みに反映される。
            max_open_traces: 子スパンを預かるトレースの上限(超えた分は古い順に残す)。
        """
        check_probability("head_probability", head_probability)
        if max_open_traces < 1:
            raise ValueError(f"max_open_traces={max_open_traces!r} must be >= 1")
        self.head_probability = head_probability
        self._policy = policy
        self._max_open = max_open_traces
        self._hooks: _Hooks | None = None
        self._exports_otlp = False
        self._clear()

    def install(self) -> TailSampler:
        """MLflow につなぐ。以後に終わるトレースから有効になる(2 回目は何もしない)。

        ``set_experiment`` などで MLflow がプロバイダーを作り直しても有効なまま残る。

        Raises:
            RuntimeError: 別のサンプラーが有効、または MLflow の内部が変わった。
        """
        global _active
        if _active is self:
            return self
        if _active is not None:
            raise RuntimeError(f"{type(_active).__name__} is installed; uninstall() it first")
        self._clear()
        self._hooks = _Hooks(self)
        _active = self
        _renew_locks_after_fork()
        return self

    def uninstall(self) -> None:
        """MLflow から外す。預かっている子スパンは、捨てずに渡す。"""
        global _active
        if self._hooks is None:
            return
        self._hooks.remove()
        self._hooks = None
        _active = None
        with self._lock:
            waiting = [item for items in self._open.values() for item in items]
            self._open.clear()
        _send(waiting)

    def stats(self) -> SamplerStats:
        """いままでの件数。"""
        with self._lock:
            rules = sorted({rule for rule, _ in self._counts})
            by_rule = {
                rule: (self._counts[rule, True], self._counts[rule, False]) for rule in rules
            }
            return SamplerStats(
                kept=sum(kept for kept, _ in by_rule.values()),
                dropped=sum(dropped for _, dropped in by_rule.values()),
                by_rule=by_rule,
                policy_errors=self._counts["policy_error", True],
                evicted=self._counts["evicted", True],
                open_traces=len(self._open),
            )

    def _clear(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, list[tuple[Forward, ReadableSpan]]] = OrderedDict()
        self._decided: OrderedDict[int, bool] = OrderedDict()
        self._unmarked: set[int] = set()
        self._counts: Counter[tuple[str, bool]] = Counter()

    def _count(self, rule: str, kept: bool) -> None:
        with self._lock:
            self._counts[rule, kept] += 1

    def _on_end(self, forward: Forward, span: ReadableSpan) -> None:
        """スパンの終わり。子は預かり、ルートが終わったら決めて、まとめて渡すか捨てる。"""
        if not _sampled(span) or _decided_by_caller(span):
            forward(span)
        elif span.parent is not None:
            self._end_child(forward, span)
        else:
            self._end_root(forward, span)

    def _end_child(self, forward: Forward, span: ReadableSpan) -> None:
        trace_id = _otel_id(span)
        with self._lock:
            keep = self._decided.get(trace_id)
            evicted = self._hold(trace_id, forward, span) if keep is None else []
        if keep:
            forward(span)
        _send(evicted)

    def _hold(
        self, trace_id: int, forward: Forward, span: ReadableSpan
    ) -> list[tuple[Forward, ReadableSpan]]:
        """子を預かる。上限を超えたら、いちばん古いトレースを残すと決めて返す。"""
        self._open.setdefault(trace_id, []).append((forward, span))
        if len(self._open) <= self._max_open:
            return []
        oldest, items = self._open.popitem(last=False)
        self._remember(oldest, True)
        self._unmarked.add(oldest)
        self._counts["evicted", True] += 1
        return items

    def _remember(self, trace_id: int, keep: bool) -> None:
        self._decided[trace_id] = keep
        if len(self._decided) > _MAX_DECISIONS:
            forgotten, _ = self._decided.popitem(last=False)
            self._unmarked.discard(forgotten)

    def _end_root(self, forward: Forward, span: ReadableSpan) -> None:
        trace_id = _otel_id(span)
        with self._lock:
            keep = self._decided.get(trace_id)
            children = [child for _, child in self._open.get(trace_id, [])]
            evicted = trace_id in self._unmarked
            self._unmarked.discard(trace_id)
        if keep is None:
            keep = self._decide(span, children)
        elif evicted:
            with _live_trace(trace_id) as trace:
                self._mark(span, trace, Decision(1.0, "evicted"))
        if keep:
            forward(span)

    def _decide(self, span: ReadableSpan, children: list[ReadableSpan]) -> bool:
        trace_id = _otel_id(span)
        with _live_trace(trace_id) as trace:
            summary = _summary(span, children, trace.info if trace else None)
        decision = self._ask(summary)  # 利用者の関数なので、MLflow のロックの外で呼ぶ
        keep = decision.probability >= 1.0 or unit_hash(summary.trace_id) < decision.probability
        if keep:
            self._mark(span, trace, decision)
        with self._lock:
            self._remember(trace_id, keep)
            self._counts[decision.rule, keep] += 1
            waiting = self._open.pop(trace_id, [])
        if keep:
            _send(waiting)
        else:
            InMemoryTraceManager.get_instance().pop_trace(trace_id)
        return keep

    def _ask(self, summary: TraceSummary) -> Decision:
        try:
            decision: Any = self._policy(summary)
            if not isinstance(decision, Decision):
                raise TypeError(f"policy returned {decision!r}; return a Decision")
            return decision
        except Exception:  # 判断の不具合で記録を失わない
            logger.exception("sampling policy failed; the trace is kept")
            return Decision(1.0, "policy_error")

    def _mark(self, span: ReadableSpan, trace: LiveTrace | None, decision: Decision) -> None:
        """残すトレースに確率・重み・規則を記す。OTLP にはメタデータが届かないので属性にも書く。"""
        attributes = span.attributes or {}
        probability = decision.probability * float(str(attributes.get(_HEAD_KEY, "1")))
        values = {
            PROBABILITY_KEY: repr(probability),
            WEIGHT_KEY: repr(1.0 / probability),
            RULE_KEY: decision.rule,
        }
        if trace is not None:
            trace.info.trace_metadata.update(values)
        if self._exports_otlp:
            tags = {f"mlflow.traceTag.{key}": value for key, value in values.items()}
            span._attributes = {**attributes, **values, **tags}


class _HeadSampler(Sampler):
    """ヘッドサンプリングを行い、残したものには確率を記す(``sampling_ratio_override`` にも従う)。"""

    def __init__(self, ratio: float, dropped: Callable[[], None]) -> None:
        self._ratio = ratio
        self._default = TraceIdRatioBased(ratio)
        self._dropped = dropped

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:
        override = _SAMPLING_RATIO_OVERRIDE.get()
        ratio = self._ratio if override is None else override
        sampler = self._default if override is None else TraceIdRatioBased(override)
        result = sampler.should_sample(*args, **kwargs)
        if result.decision is HeadDecision.DROP:
            self._dropped()
            return result
        if ratio >= 1.0:  # 記さなければ 1 とみなす(リクエストごとの手間を省く)
            return result
        attributes = {**(result.attributes or {}), _HEAD_KEY: repr(ratio)}
        return SamplingResult(result.decision, attributes, result.trace_state)

    def get_description(self) -> str:
        return f"Head{{{self._ratio}}}"


class _Hooks:
    """MLflow への取り付け。非公開の名前はここと、このファイルの下の 4 つの関数だけが使う。

    ``_get_span_processors`` と ``_get_trace_sampler`` は、MLflow がプロバイダーを作るたびに必ず
    通る 2 か所である。ここを包めば、作り直されても外れない。
    """

    NAMES = ("_get_span_processors", "_get_trace_sampler")

    def __init__(self, sampler: TailSampler) -> None:
        for name in self.NAMES:
            if not callable(getattr(mlflow_provider, name, None)):
                raise RuntimeError(f"MLflow {mlflow.__version__} has no {name}; update this file")
        self._sampler = sampler
        self._gated: list[Any] = []
        self._provider: object = mlflow.tracing.get_bridged_tracer_provider()
        self._get_processors = mlflow_provider._get_span_processors
        self._get_sampler = mlflow_provider._get_trace_sampler
        mlflow_provider._get_span_processors = self._processors
        mlflow_provider._get_trace_sampler = self._head
        self._attach_to_current()

    def remove(self) -> None:
        """取り付ける前に戻す。"""
        mlflow_provider._get_span_processors = self._get_processors
        mlflow_provider._get_trace_sampler = self._get_sampler
        for processor in self._gated:
            vars(processor).pop("on_end", None)
        self._restore_sampler()

    def _restore_sampler(self) -> None:
        provider: Any = mlflow.tracing.get_bridged_tracer_provider()
        if not isinstance(provider, TracerProvider) or not _is_ours(provider.sampler):
            return  # 無効になっている(有効になるとき作り直される)か、替えていない
        if provider is self._provider:
            _use_sampler(provider, self._previous_sampler)
        else:  # つないだ後に作り直されたもの
            _use_sampler(provider, self._get_sampler() or DEFAULT_ON)

    def _attach_to_current(self) -> None:
        provider = self._provider
        if not isinstance(provider, TracerProvider):
            return  # トレーシングが無効。有効になったときに _processors が呼ばれる
        self._previous_sampler = provider.sampler
        if (head := self._weighted(provider.sampler)) is not None:
            _use_sampler(provider, head)
        self._gate(provider._active_span_processor._span_processors)

    def _processors(self, disabled: bool = False) -> list[Any]:
        processors = self._get_processors(disabled=disabled)
        self._gate(processors)
        return processors

    def _head(self) -> Sampler | None:
        original = self._get_sampler()
        return self._weighted(original) or original

    def _weighted(self, original: Sampler | None) -> Sampler | None:
        """先頭で残した割合を重みに記すサンプラー。先頭では間引かないなら ``None``。"""
        ratio = self._sampler.head_probability
        if ratio >= 1.0:
            if not isinstance(root := getattr(original, "_root", None), _MlflowSampler):
                return None
            ratio = root._default_ratio  # MLFLOW_TRACE_SAMPLING_RATIO
        dropped = partial(self._sampler._count, "head", False)
        return ParentBased(root=_HeadSampler(ratio, dropped))

    def _gate(self, processors: Iterable[Any]) -> None:
        """送信の入り口(``on_end``)だけを差し替える。型や状態は MLflow のものがそのまま残る。"""
        for processor in processors:
            ours = type(processor).__module__.startswith("mlflow.")
            if ours and "on_end" not in vars(processor):
                # MLflow の送信処理だけが、ルートスパンから _start_trace でトレースを始める
                self._sampler._exports_otlp |= not hasattr(processor, "_start_trace")
                processor.on_end = partial(self._sampler._on_end, processor.on_end)
                self._gated.append(processor)


def _is_ours(sampler: Sampler) -> bool:
    return isinstance(getattr(sampler, "_root", None), _HeadSampler)


def _use_sampler(provider: TracerProvider, sampler: Sampler) -> None:
    """作成済みの tracer もサンプラーを覚えているので、それも差し替える。"""
    provider.sampler = sampler
    for tracer in provider._tracers.values():
        tracer.sampler = sampler


def _send(items: Iterable[tuple[Forward, ReadableSpan]]) -> None:
    for forward, span in items:
        forward(span)


def _otel_id(span: ReadableSpan) -> int:
    return span.context.trace_id if span.context else 0


def _sampled(span: ReadableSpan) -> bool:
    return span.context is not None and span.context.trace_flags.sampled


def _mlflow_id(trace_id: int) -> str:
    return f"tr-{trace_id:032x}"


def _decided_by_caller(span: ReadableSpan) -> bool:
    """別のサービスから続くトレースか(残すかどうかは呼び出し元が決めている)。"""
    if span.parent is None:
        return False
    if span.parent.is_remote:
        return True
    with _live_trace(_otel_id(span)) as trace:
        return trace is not None and trace.is_remote_trace


def _live_trace(trace_id: int) -> contextlib.AbstractContextManager[LiveTrace | None]:
    """MLflow がいま組み立てているトレース(ロックを持ったまま読む)。"""
    return InMemoryTraceManager.get_instance().get_trace(_mlflow_id(trace_id))


def _summary(
    span: ReadableSpan, children: list[ReadableSpan], info: TraceInfo | None
) -> TraceSummary:
    failed = any(item.status.status_code is StatusCode.ERROR for item in (span, *children))
    metadata = dict(info.trace_metadata) if info else {}
    found = info.assessments or () if info else ()
    return TraceSummary(
        trace_id=_mlflow_id(_otel_id(span)),
        name=span.name,
        duration_ms=((span.end_time or 0) - (span.start_time or 0)) / 1e6,
        is_error=failed or (info is not None and info.state is TraceState.ERROR),
        num_spans=len(children) + 1,
        user=metadata.get("mlflow.trace.user"),
        session=metadata.get("mlflow.trace.session"),
        tags=dict(info.tags) if info else {},
        metadata=metadata,
        feedback={item.name: item.feedback.value for item in found if item.feedback is not None},
    )


_active: TailSampler | None = None
_fork_hook_installed = False


def _renew_locks_after_fork() -> None:
    """fork の瞬間に別スレッドが持っていたロックは、子では永久に解かれないので作り直す。"""
    global _fork_hook_installed
    if _fork_hook_installed or not hasattr(os, "register_at_fork"):
        return
    _fork_hook_installed = True
    os.register_at_fork(after_in_child=lambda: _active and _active._clear())
