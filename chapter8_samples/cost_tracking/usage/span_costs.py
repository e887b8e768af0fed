"""8.2.3 トレースにコストを記録する(本書にリストなし)。

LLM のスパンが終わった瞬間にコストを書いておけば、画面でも SQL でもアラートでも同じ数が使える。
MLflow も自分で計算するが、知らないモデルは黙って抜ける。ここでは抜けたことを記録に残す。
ハンドラーが返したストリームのように、ルートより後で終わるスパンがあれば、トレースの合計を書き直す。

Databricks でも同じ属性が使われる(``mlflow.llm.cost`` を設定する方法は公式の手順)。料金表に
ないモデルは MLflow が自前のカタログで補うことがあるので、``cost.status`` で見分ける。
"""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from operator import add
from typing import Any
from weakref import WeakKeyDictionary

from mlflow.entities import LiveSpan
from mlflow.tracing import configure
from mlflow.tracing.config import get_config  # 登録済みのプロセッサーを読む公開 API はない
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import (
    SpanAggregationNode,
    aggregate_cost_from_span_nodes,
    aggregate_usage_from_spans,
)

from .._internals import outlive_set_tracking_uri
from ..tracker import BaseCostTracker, Calculator
from .calls import STATUS_KEY, UNATTRIBUTED, USAGE_ATTRIBUTE, LlmCall, read_call
from .pricing import TraceCost, price_call, price_spans, trace_cost

logger = logging.getLogger(__name__)

COST_ATTRIBUTE = "mlflow.llm.cost"
TRACE_COST_KEY, TRACE_USAGE_KEY = "mlflow.trace.cost", "mlflow.trace.tokenUsage"
SOURCE_KEY, REASON_KEY = "cost.price_source", "cost.reason"
BY_MODEL_TAG = "cost.by_model"  # {"モデル": [回数, 入力, 出力, "USD" か null]}
_MAX_TAG_LENGTH = 4096  # MLflow のどの保存先でも入る、タグの値の上限
_REMOVED = "cost tracking was removed by tracing.configure or reset; call install() again"


@dataclass(slots=True)
class _Seen:
    """1 つのトレースで、これまでに終わった呼び出しと、その先祖のスパンの ID。"""

    calls: dict[str, LlmCall] = field(default_factory=dict[str, LlmCall])
    parents: set[str] = field(default_factory=set[str])


class CostTracking:
    """``setup_cost_tracking`` の結果。数は、このプロセスで終わったスパンの累計。"""

    def __init__(
        self,
        calculator: Calculator,
        tracker: BaseCostTracker | None,
        current_user: Callable[[], str | None] | None,
    ) -> None:
        self._calculator = calculator
        self._tracker = tracker
        self._current_user = current_user
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # (cost.status、モデル) ごと
        self._seen: WeakKeyDictionary[LiveSpan, _Seen] = WeakKeyDictionary()  # ルートごと
        self._expected = False  # 登録したあと、自分では外していない

        def price_span_on_end(span: LiveSpan) -> None:
            self._on_end(span)

        self._processor = price_span_on_end

    @property
    def priced(self) -> int:
        """料金を付けた呼び出しの数。"""
        return self.counts["priced"]

    @property
    def unpriced(self) -> int:
        """料金の決まらなかった呼び出しの数。"""
        return self.counts["unpriced"]

    @property
    def missing_usage(self) -> int:
        """使用量の報告がなかった呼び出しの数。ストリームの設定漏れに多い。"""
        return self.counts["missing_usage"]

    @property
    def failed(self) -> int:
        """計算そのものに失敗したスパンの数。0 でなければログに原因がある。"""
        return self.counts["failed"]

    @property
    def counts(self) -> Counter[str]:
        """``cost.status`` ごとの数。``partial`` と ``cache_hit`` もある。"""
        _ = self.installed  # 外されて止まった数を、正しい数と思わせない
        found: Counter[str] = Counter()
        with self._lock:
            for (status, _), number in self._counts.items():
                found[status] += number
        return found

    @property
    def unpriced_models(self) -> dict[str, int]:
        """料金表に足すべきモデルと、その回数。"""
        with self._lock:
            return {m: number for (kind, m), number in self._counts.items() if kind == "unpriced"}

    @property
    def installed(self) -> bool:
        """いまも動いているか。外されたことに気づいたら、警告を 1 回ログに出す。"""
        processors = get_config().span_processors
        if self._processor in processors:
            return True
        if self._expected and not any(map(_prices_spans, processors)):
            logger.warning(_REMOVED)
        self._expected = False
        return False

    def install(self) -> CostTracking:
        """ほかのプロセッサーを残して登録する。何度呼んでもよい。"""
        outlive_set_tracking_uri(_prices_spans)
        if not self.installed:
            kept = [p for p in get_config().span_processors if not _prices_spans(p)]
            configure(span_processors=[*kept, self._processor])
        self._expected = True
        return self

    def uninstall(self) -> None:
        """登録を外す。ほかのプロセッサーは残る。"""
        kept = [p for p in get_config().span_processors if p is not self._processor]
        configure(span_processors=kept)
        self._expected = False

    def _on_end(self, span: LiveSpan) -> None:
        with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
            family = trace.span_dict if trace else {span.span_id: span}  # 始まった順に並ぶ
        root = next(iter(family.values()))
        seen = self._seen.get(root) or self._seen.setdefault(root, _Seen())
        steps = [self._price]
        if root.parent_id is None and (root is span or root.end_time_ns is not None):
            steps.append(self._settle)
        for step in steps:
            try:
                step(span, family, seen)
            except Exception:  # コストの計算で、アプリの応答やトレースの保存を止めない
                self._count("failed", span.name)
                logger.exception("cost tracking failed for span %s", span.name)
                if span.get_attribute(STATUS_KEY) is None:
                    span.set_attribute(STATUS_KEY, "unpriced")

    def _price(self, span: LiveSpan, family: Mapping[str, LiveSpan], seen: _Seen) -> None:
        call = read_call(span)
        if call is None:
            return
        parent = span.parent_id
        while parent and parent in family and parent not in seen.parents:
            seen.parents.add(parent)
            parent = family[parent].parent_id
        if span.span_id not in seen.parents:
            seen.calls[span.span_id] = price_call(call, self._calculator)
            self._write_call(span, call)
            return
        calls = price_spans(_subtree(span, family), self._calculator, known=seen.calls)
        own = [c for c in calls if c.span_id == span.span_id and c.model != UNATTRIBUTED]
        if own:
            self._write_call(span, own[0])
        elif call.usage:  # 使用量は子孫で数え済み。親には合計を書き、二重に数えない
            total = trace_cost(calls)
            if total.by_model:
                span.set_attribute(COST_ATTRIBUTE, _usd(total))
            span.set_attribute(STATUS_KEY, "rollup")

    def _write_call(self, span: LiveSpan, call: LlmCall) -> None:
        no_output = call.usage and not call.output_tokens
        if no_output and not span.get_attribute(USAGE_ATTRIBUTE):  # 埋め込みの使用量を補う
            usage = {"input_tokens": call.input_tokens, "total_tokens": call.input_tokens}
            span.set_attribute(USAGE_ATTRIBUTE, {**usage, "output_tokens": 0})
        if not call.total_usd.is_nan():
            # 料金未定のときに None を書くと、MLflow 3.17 はトレースのスパンを 1 つも保存しなくなる
            span.set_attribute(COST_ATTRIBUTE, _usd(call))
        span.set_attribute(STATUS_KEY, call.status)
        for key, value in ((SOURCE_KEY, call.price_source), (REASON_KEY, call.reason)):
            if value:
                span.set_attribute(key, value)
        first = self._count(call.status, call.model) == 1
        if first and call.status in ("unpriced", "partial"):
            logger.warning("cost.status=%s, model %r: %s", call.status, call.model, call.reason)
        if self._tracker is not None and call.usage:
            self._tracker.add(call, user=self._current_user() if self._current_user else None)

    def _count(self, status: str, name: str) -> int:
        with self._lock:
            self._counts[status, name] += 1
            return self._counts[status, name]

    def _settle(self, span: LiveSpan, family: Mapping[str, LiveSpan], seen: _Seen) -> None:
        """ルートが終わったとき、またはその後でスパンが終わるたびに、トレースの合計を書く。"""
        with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
            if trace is None:
                return
            spans = list(family.values())
            calls = price_spans(spans, self._calculator, known=seen.calls)
            total = trace_cost(calls)
            for key in (STATUS_KEY, REASON_KEY, BY_MODEL_TAG):  # 前に書いた合計は残さない
                trace.info.tags.pop(key, None)
            trace.info.tags.update(_tags(calls, total))
            metadata: dict[str, Any] = {TRACE_COST_KEY: _total_usd(spans, calls, total)}
            if span.parent_id is not None:  # ルートが終わったときの分は、このあと MLflow が書く
                metadata[TRACE_USAGE_KEY] = aggregate_usage_from_spans(spans)
            for key, value in metadata.items():
                if value:
                    trace.info.trace_metadata[key] = json.dumps(value)


def _tags(calls: Sequence[LlmCall], total: TraceCost) -> dict[str, str]:
    """スパンを読まなくても、未計算とモデル別の内訳が分かるようにする。"""
    models: dict[str, tuple[Any, ...]] = {}
    for call in calls:  # 料金の決まらない呼び出しが混ざったモデルの USD は、NaN になる
        if call.usage:
            numbers = (1, call.input_tokens, call.output_tokens, call.total_usd)
            models[call.model] = tuple(map(add, models.get(call.model, (0, 0, 0, 0)), numbers))
    tags = {
        STATUS_KEY: total.status if calls else "",
        REASON_KEY: "; ".join(total.reasons)[:_MAX_TAG_LENGTH],
        BY_MODEL_TAG: json.dumps(models, separators=(",", ":"), default=_text) if models else "",
    }
    return {key: value for key, value in tags.items() if 0 < len(value) <= _MAX_TAG_LENGTH}


def _text(usd: Decimal) -> str | None:
    return None if usd.is_nan() else f"{usd:f}"


def _total_usd(
    spans: Sequence[LiveSpan], calls: Sequence[LlmCall], total: TraceCost
) -> dict[str, float] | None:
    """トレースの合計を、トークン数の合計と同じように、保存する前に決めておく。

    決めなければ保存先がスパンから計算するが、非同期の書き込みが前後すると、後から届いたスパンの
    分が合計から抜ける(MLflow 3.17)。手で書かれた金額があれば、MLflow の規則で一緒に足す。
    """
    own = {call.span_id: call for call in calls if not call.total_usd.is_nan()}
    rest = [span for span in spans if span.span_id not in own]
    by_hand = {s.span_id: usd for s in rest if (usd := s.get_attribute(COST_ATTRIBUTE))}
    if all(s.get_attribute(STATUS_KEY) == "rollup" for s in rest if s.span_id in by_hand):
        return _usd(total) if own else None
    costs = {**by_hand, **{key: _usd(call) for key, call in own.items()}}
    nodes = [SpanAggregationNode(s.span_id, s.parent_id, costs.get(s.span_id)) for s in spans]
    return aggregate_cost_from_span_nodes(nodes)


def _usd(item: LlmCall | TraceCost) -> dict[str, float]:
    return {
        "input_cost": float(item.prompt_usd),
        "output_cost": float(item.output_usd),
        "total_cost": float(item.total_usd),
    }


def _subtree(span: LiveSpan, family: Mapping[str, LiveSpan]) -> list[LiveSpan]:
    """スパンとその子孫。親は子より先に始まるので、先に並んでいる。"""
    found = {span.span_id: span}
    for other in list(family.values()):
        if other.parent_id in found:
            found[other.span_id] = other
    return list(found.values())


def _prices_spans(processor: Callable[[LiveSpan], None]) -> bool:
    return getattr(processor, "__name__", "") == "price_span_on_end"
