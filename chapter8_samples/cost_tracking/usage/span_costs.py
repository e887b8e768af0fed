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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from weakref import WeakKeyDictionary

from mlflow.entities import LiveSpan
from mlflow.tracing import configure
from mlflow.tracing.config import get_config  # 登録済みのプロセッサーを読む公開 API はない
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import aggregate_cost_from_spans, aggregate_usage_from_spans

from ..prices.call import PriceBreakdown
from ..tracker import BaseCostTracker, Calculator
from .calls import STATUS_KEY, USAGE_ATTRIBUTE, LlmCall, read_call
from .leaves import UNATTRIBUTED
from .pricing import TraceCost, price_call, price_spans, trace_cost

logger = logging.getLogger(__name__)

COST_ATTRIBUTE = "mlflow.llm.cost"
TRACE_COST_KEY, TRACE_USAGE_KEY = "mlflow.trace.cost", "mlflow.trace.tokenUsage"
SOURCE_KEY, REASON_KEY = "cost.price_source", "cost.reason"
BY_MODEL_TAG = "cost.by_model"  # {"モデル": [回数, 入力, 出力, "USD" か null]}
_MAX_TAG_LENGTH = 4096  # MLflow のどの保存先でも入る、タグの値の上限
_OURS = ("priced", "partial", "cache_hit", "rollup")  # このとき、スパンの金額はここで書いたもの
_REMOVED = "cost tracking was removed by tracing.configure or reset; call install() again"


@dataclass(slots=True)
class _Seen:
    """1 つのトレースで、これまでに終わった呼び出しと、その先祖のスパンの ID。"""

    calls: dict[str, LlmCall] = field(default_factory=dict[str, LlmCall])
    parents: set[str] = field(default_factory=set[str])


class CostTracking:
    """``setup_cost_tracking`` の結果。数は、このプロセスで終わったスパンの累計。"""

    def __init__(self, calculator: Calculator, tracker: BaseCostTracker | None) -> None:
        self.__name__ = "price_span_on_end"  # MLflow が、失敗したときのログに書く
        self._calculator = calculator
        self._tracker = tracker
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # (cost.status、モデル) ごと
        self._seen: WeakKeyDictionary[LiveSpan, _Seen] = WeakKeyDictionary()  # ルートごと
        self._expected = False  # 登録したあと、自分では外していない

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
        _ = self.installed  # 登録が外されて数が止まっていれば、ここで警告する
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
        ours = [p for p in get_config().span_processors if isinstance(p, CostTracking)]
        if self in ours:
            return True
        if self._expected and not ours:
            logger.warning(_REMOVED)
        self._expected = False
        return False

    def install(self) -> CostTracking:
        """ほかのプロセッサーを残して登録する。何度呼んでもよい。"""
        if not self.installed:
            kept = [p for p in get_config().span_processors if not isinstance(p, CostTracking)]
            configure(span_processors=[*kept, self])
        self._expected = True
        return self

    def uninstall(self) -> None:
        """登録を外す。ほかのプロセッサーは残る。"""
        kept = [p for p in get_config().span_processors if p is not self]
        configure(span_processors=kept)
        self._expected = False

    def __call__(self, span: LiveSpan) -> None:
        """終わったスパンにコストを書く。MLflow が呼ぶ。"""
        try:
            call = read_call(span)
        except Exception:  # コストの計算で、アプリの応答やトレースの保存を止めない
            self._failed(span)
            call = None
        alone = call is None and span.parent_id is None  # 合計を書くだけのルート
        family = {span.span_id: span} if alone else _family(span)
        root = next(iter(family.values()))
        if call is None and span is not root and root.end_time_ns is None:
            return  # 検索やツールのスパン。ルートより後に終わったのなら、合計を書き直す
        seen = self._seen.get(root) or self._seen.setdefault(root, _Seen())
        try:
            if call:
                self._price(span, call, family, seen)
        except Exception:
            self._failed(span)
        try:
            if root.parent_id is None and (root is span or root.end_time_ns is not None):
                self._settle(span, seen)
        except Exception:
            self._failed(span)

    def _failed(self, span: LiveSpan) -> None:
        self._count("failed", span.name)
        logger.exception("cost tracking failed for span %s", span.name)
        if span.get_attribute(STATUS_KEY) is None:
            span.set_attribute(STATUS_KEY, "unpriced")

    def _price(
        self, span: LiveSpan, call: LlmCall, family: Mapping[str, LiveSpan], seen: _Seen
    ) -> None:
        parent = span.parent_id
        while parent and parent in family and parent not in seen.parents:
            seen.parents.add(parent)
            parent = family[parent].parent_id
        if span.span_id not in seen.parents:
            call.cost = price_call(call, self._calculator)
            seen.calls[span.span_id] = call
            self._write_call(span, call, call.cost)
            return
        calls = price_spans(_subtree(span, family), self._calculator, known=seen.calls)
        for own in calls:
            if own.span_id == span.span_id and own.model != UNATTRIBUTED and own.cost:
                self._write_call(span, own, own.cost)
                return
        if call.usage:  # 使用量は子孫で数え済み。親には合計を書き、二重に数えない
            total = trace_cost(calls)
            if total.by_model:
                span.set_attribute(COST_ATTRIBUTE, _usd(total.prompt_usd, total.output_usd))
            span.set_attribute(STATUS_KEY, "rollup")

    def _write_call(self, span: LiveSpan, call: LlmCall, cost: PriceBreakdown) -> None:
        if call.usage and not cost.output_tokens and not span.get_attribute(USAGE_ATTRIBUTE):
            tokens = cost.input_tokens  # 埋め込みの使用量を補う
            usage = {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens}
            span.set_attribute(USAGE_ATTRIBUTE, usage)
        if not cost.output_usd.is_nan():
            # 料金未定のときに None を書くと、MLflow 3.17 はトレースのスパンを 1 つも保存しなくなる
            span.set_attribute(COST_ATTRIBUTE, _usd(cost.prompt_usd, cost.output_usd))
        span.set_attribute(STATUS_KEY, cost.status)
        if cost.price_source:
            span.set_attribute(SOURCE_KEY, cost.price_source)
        if cost.reason:
            span.set_attribute(REASON_KEY, cost.reason)
        first = self._count(cost.status, cost.model) == 1
        if first and cost.status in ("unpriced", "partial"):
            logger.warning("cost.status=%s, model %r: %s", cost.status, cost.model, cost.reason)
        if self._tracker is not None and call.usage:
            self._tracker.add(cost)

    def _count(self, status: str, name: str) -> int:
        with self._lock:
            self._counts[status, name] += 1
            return self._counts[status, name]

    def _settle(self, span: LiveSpan, seen: _Seen) -> None:
        """ルートが終わったとき、またはその後でスパンが終わるたびに、トレースの合計を書く。"""
        with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
            if trace is None:
                return
            spans = list(trace.span_dict.values())
            calls = price_spans(spans, self._calculator, known=seen.calls)
            total = trace_cost(calls)
            for key in (STATUS_KEY, REASON_KEY, BY_MODEL_TAG):  # 前に書いた合計は残さない
                trace.info.tags.pop(key, None)
            trace.info.tags.update(_tags(calls, total))
            metadata: dict[str, Any] = {TRACE_COST_KEY: _total_usd(spans, total, seen.calls)}
            if span.parent_id is not None:  # ルートが終わったときの分は、このあと MLflow が書く
                metadata[TRACE_USAGE_KEY] = aggregate_usage_from_spans(spans)
            for key, value in metadata.items():
                if value:
                    trace.info.trace_metadata[key] = json.dumps(value)


def _family(span: LiveSpan) -> Mapping[str, LiveSpan]:
    """同じトレースのスパン。始まった順に並ぶ。"""
    with InMemoryTraceManager.get_instance().get_trace(span.trace_id) as trace:
        return trace.span_dict if trace else {span.span_id: span}


def _tags(calls: Sequence[LlmCall], total: TraceCost) -> dict[str, str]:
    """スパンを読まなくても、未計算とモデル別の内訳が分かるようにする。"""
    models: dict[str, list[Any]] = {}
    for call in calls:
        if call.usage and call.cost:
            numbers = models.setdefault(call.model, [0, 0, 0, Decimal(0)])
            numbers[0] += 1
            numbers[1] += call.usage.input_tokens
            numbers[2] += call.usage.output_tokens
            numbers[3] += call.cost.total_usd  # 料金の決まらない呼び出しが混ざると NaN になる
    for numbers in models.values():
        numbers[3] = None if numbers[3].is_nan() else f"{numbers[3]:f}"
    tags = {
        STATUS_KEY: total.status if calls else "",
        REASON_KEY: "; ".join(total.reasons)[:_MAX_TAG_LENGTH],
        BY_MODEL_TAG: json.dumps(models, separators=(",", ":")) if models else "",
    }
    return {key: value for key, value in tags.items() if 0 < len(value) <= _MAX_TAG_LENGTH}


def _total_usd(
    spans: Sequence[LiveSpan], total: TraceCost, known: Mapping[str, LlmCall]
) -> dict[str, float] | None:
    """トレースの合計を、トークン数の合計と同じように、保存する前に決めておく。

    決めなければ保存先がスパンから計算するが、非同期の書き込みが前後すると、後から届いたスパンの
    分が合計から抜ける(MLflow 3.17)。手で書かれた金額があれば、MLflow の規則で一緒に足す。
    """
    for span in spans:
        call = known.get(span.span_id)
        if call and call.cost and call.cost.status in _OURS:
            continue
        if span.get_attribute(COST_ATTRIBUTE) and span.get_attribute(STATUS_KEY) not in _OURS:
            return aggregate_cost_from_spans(list(spans))
    return _usd(total.prompt_usd, total.output_usd) if total.by_model else None


def _usd(prompt: Decimal, output: Decimal) -> dict[str, float]:
    total = prompt + output
    return {
        "input_cost": float(prompt),
        "output_cost": float(output),
        "total_cost": float(total),
    }


def _subtree(span: LiveSpan, family: Mapping[str, LiveSpan]) -> list[LiveSpan]:
    """スパンとその子孫。親は子より先に始まるので、先に並んでいる。"""
    found = {span.span_id: span}
    for other in list(family.values()):
        if other.parent_id in found:
            found[other.span_id] = other
    return list(found.values())
