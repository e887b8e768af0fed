"""8.2.3 トレースにコストを記録する(本書にリストなし)。

LLM のスパンが終わった瞬間にコストを書いておけば、画面でも SQL でもアラートでも同じ数が使える。
MLflow も自分で計算するが、知らないモデルは黙って抜ける。ここでは抜けたことを記録に残す。

Databricks でも同じ属性が使われる(``mlflow.llm.cost`` を設定する方法は公式の手順)。料金表に
ないモデルは MLflow が自前のカタログで補うことがあるので、``cost.status`` で見分ける。
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from decimal import Decimal
from operator import add
from typing import Any, Protocol

import mlflow
from mlflow.entities import LiveSpan
from mlflow.tracing import configure
from mlflow.tracing.config import get_config  # 登録済みのプロセッサーを読む公開 API はない
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import aggregate_cost_from_spans

from .._internals import tracking_service
from .pricing import Calculator, Price, price_usage
from .reader import USAGE_ATTRIBUTE, TokenUsage, is_silent_call, span_model, span_usage

logger = logging.getLogger(__name__)

COST_ATTRIBUTE = "mlflow.llm.cost"
TRACE_COST_KEY = "mlflow.trace.cost"
STATUS_KEY = "cost.status"  # priced / unpriced / rollup / partial / missing_usage
SOURCE_KEY = "cost.price_source"
BY_MODEL_TAG = "cost.by_model"  # {"モデル": [回数, 入力, 出力, "USD" か null]}
_MAX_OPEN_TRACES = 10_000  # 終わらないトレースの分を、いつまでも覚えておかない
_MAX_TAG_LENGTH = 4096  # MLflow のどの保存先でも入る、タグの値の上限
_REMOVED = "cost tracking was removed by tracing.configure or reset; call install() again"
_ZERO = Decimal(0)


class Tracker(Protocol):
    """``CostTracker``、または同じ ``add`` を持つもの。"""

    def add(self, item: Any, *, user: str | None = None) -> None: ...


@dataclass(slots=True)
class _Sum:
    """あるスパンの下にある呼び出しの合計。料金未定が混ざったモデルの USD は NaN になる。"""

    prompt_usd: Decimal = _ZERO
    output_usd: Decimal = _ZERO
    kinds: set[str] = field(default_factory=set[str])  # priced / unpriced / missing_usage
    models: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    """モデルごとの (回数, 入力, 出力, USD)。"""

    @property
    def status(self) -> str:
        if "priced" in self.kinds:
            return "priced" if len(self.kinds) == 1 else "partial"
        return "unpriced" if "unpriced" in self.kinds else "missing_usage"

    def add_call(self, item: Price) -> None:
        self.kinds.add("priced" if item.priced else "unpriced")
        if item.priced:
            self.prompt_usd += item.prompt_usd
            self.output_usd += item.output_usd
        self._add(item.model, (1, item.input_tokens, item.output_tokens, item.total_usd))

    def merge(self, other: _Sum) -> None:
        self.prompt_usd += other.prompt_usd
        self.output_usd += other.output_usd
        self.kinds |= other.kinds
        for model, numbers in other.models.items():
            self._add(model, numbers)

    def _add(self, model: str, more: tuple[Any, ...]) -> None:
        known = self.models.get(model)
        self.models[model] = tuple(map(add, known, more)) if known else more


class CostTracking:
    """``setup_cost_tracking`` の結果。数は、このプロセスで終わったスパンの累計。"""

    def __init__(
        self,
        calculator: Calculator,
        tracker: Tracker | None,
        current_user: Callable[[], str | None] | None,
    ) -> None:
        self._calculator = calculator
        self._tracker = tracker
        self._current_user = current_user
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._unpriced_models: Counter[str] = Counter()
        self._open: OrderedDict[str, dict[str, _Sum]] = OrderedDict()
        self._expected = False  # 登録したあと、自分では外していない

        def price_span_on_end(span: LiveSpan) -> None:
            self._on_end(span)

        self._processor = price_span_on_end

    @property
    def priced(self) -> int:
        """料金を付けた呼び出しの数。"""
        return self._seen("priced")

    @property
    def unpriced(self) -> int:
        """料金の決まらなかった呼び出しの数。"""
        return self._seen("unpriced")

    @property
    def missing_usage(self) -> int:
        """使用量の報告がなかった呼び出しの数。ストリームの設定漏れに多い。"""
        return self._seen("missing_usage")

    @property
    def failed(self) -> int:
        """計算そのものに失敗したスパンの数。0 でなければログに原因がある。"""
        return self._seen("failed")

    @property
    def unpriced_models(self) -> dict[str, int]:
        """料金表に足すべきモデルと、その回数。"""
        with self._lock:
            return dict(self._unpriced_models)

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
        _outlive_set_tracking_uri()
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

    def _seen(self, name: str) -> int:
        """数を読むときにも、外されていないかを確かめる。止まった数を正しい数と思わせない。"""
        _ = self.installed
        return self._counts[name]

    def _on_end(self, span: LiveSpan) -> None:
        total = self._take(span)
        for step in (self._price, self._hand_over):
            try:
                step(span, total)
            except Exception:  # コストの計算で、アプリの応答やトレースの保存を止めない
                self._count("failed")
                logger.exception("cost tracking failed for span %s", span.name)
                _admit_failure(span, total)

    def _take(self, span: LiveSpan) -> _Sum:
        """子孫の合計を受け取る。子は親より先に終わる。"""
        with self._lock:
            below = self._open.get(span.trace_id)
            return (below.pop(span.span_id, None) if below else None) or _Sum()

    def _hand_over(self, span: LiveSpan, total: _Sum) -> None:
        if span.parent_id is None:
            with self._lock:
                self._open.pop(span.trace_id, None)
            _tag_trace(span.trace_id, total)
            _settle_trace_cost(span.trace_id, total)
        elif total.kinds:
            with self._lock:
                below = self._open.setdefault(span.trace_id, {})
                siblings = below.setdefault(span.parent_id, total)
                if siblings is not total:
                    siblings.merge(total)
                while len(self._open) > _MAX_OPEN_TRACES:
                    self._open.popitem(last=False)

    def _price(self, span: LiveSpan, total: _Sum) -> None:
        reported = span.get_attribute(USAGE_ATTRIBUTE)
        usage = TokenUsage.from_mlflow(reported) if reported else span_usage(span)
        if usage is not None and not reported:  # 埋め込みの使用量を MLflow の形で補う
            names = ("input_tokens", "output_tokens", "total_tokens")
            span.set_attribute(USAGE_ATTRIBUTE, {name: getattr(usage, name) for name in names})
        if usage is None:
            if is_silent_call(span) and not total.kinds:
                total.kinds.add("missing_usage")
                self._count("missing_usage")
                span.set_attribute(STATUS_KEY, "missing_usage")
        elif total.models:  # 使用量は子孫で数え済み。親には合計を書き、二重に数えない
            if "priced" in total.kinds:
                _write_cost(span, total.prompt_usd, total.output_usd)
            span.set_attribute(STATUS_KEY, "rollup" if total.status == "priced" else total.status)
        else:
            total.kinds.clear()
            self._price_call(span, usage, total)

    def _price_call(self, span: LiveSpan, usage: TokenUsage, total: _Sum) -> None:
        model = span_model(span)
        at = datetime.fromtimestamp(span.start_time_ns / 1e9, timezone.utc)
        item = price_usage(self._calculator, model, usage, at)
        total.add_call(item)
        if item.priced:
            _write_cost(span, item.prompt_usd, item.output_usd)
            span.set_attribute(STATUS_KEY, "priced")
            span.set_attribute(SOURCE_KEY, item.price_source)
            self._count("priced")
        else:
            span.set_attribute(STATUS_KEY, "unpriced")
            self._note_unpriced(model)
        if self._tracker is not None:
            self._tracker.add(item, user=self._current_user() if self._current_user else None)

    def _note_unpriced(self, model: str) -> None:
        with self._lock:
            self._counts["unpriced"] += 1
            self._unpriced_models[model] += 1
            first = self._unpriced_models[model] == 1
        if first:
            logger.warning("no price for model %r: cost.status=unpriced; add a price row", model)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1


def _prices_spans(processor: Callable[[LiveSpan], None]) -> bool:
    return getattr(processor, "__name__", "") == "price_span_on_end"


def _outlive_set_tracking_uri() -> None:
    """接続先を変えると MLflow は登録を消す。消した直後に付け直すようにする。

    ``mlflow.tracing.configure`` や ``mlflow.tracing.reset()`` で外したものは戻さない。
    """
    reset = getattr(tracking_service, "reset", None)
    if reset is None or reset.__name__ == "reset_and_keep_costs":
        return  # 消し方の違う版では、外れたことを _seen() が警告する

    def reset_and_keep_costs() -> None:
        ours = [p for p in get_config().span_processors if _prices_spans(p)]
        reset()
        if ours:
            configure(span_processors=[*get_config().span_processors, *ours])

    tracking_service.reset = reset_and_keep_costs  # pyright: ignore[reportPrivateImportUsage]


def _write_cost(span: LiveSpan, prompt_usd: Decimal, output_usd: Decimal) -> None:
    # 料金未定のときに None を書くと、MLflow 3.17 はトレースのスパンを 1 つも保存しなくなる
    span.set_attribute(COST_ATTRIBUTE, _cost(prompt_usd, output_usd))


def _cost(prompt_usd: Decimal, output_usd: Decimal) -> dict[str, float]:
    return {
        "input_cost": float(prompt_usd),
        "output_cost": float(output_usd),
        "total_cost": float(prompt_usd + output_usd),
    }


def _admit_failure(span: LiveSpan, total: _Sum) -> None:
    """計算できなかった呼び出しの分、トレースの合計は下限でしかない。"""
    if span.get_attribute(STATUS_KEY) is None:
        total.kinds.add("unpriced")
        span.set_attribute(STATUS_KEY, "unpriced")


def _settle_trace_cost(trace_id: str, total: _Sum) -> None:
    """トレースの合計を、トークン数の合計と同じように、保存する前に決めておく。

    決めなければ保存先がスパンから計算するが、非同期の書き込みが前後すると、後から届いたスパンの
    分が合計から抜ける(MLflow 3.17)。スパンが 1 つだけなら、抜けるものはない。
    MLflow の合計は float の足し算で端数が付くので、同じ金額なら 10 進数で足したほうを書く。
    """
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        if trace is None or len(trace.span_dict) < 2:
            return
        if cost := aggregate_cost_from_spans(list(trace.span_dict.values())):
            ours = _cost(total.prompt_usd, total.output_usd)
            same = all(math.isclose(cost[key], usd, rel_tol=1e-9) for key, usd in ours.items())
            trace.info.trace_metadata[TRACE_COST_KEY] = json.dumps(ours if same else cost)


def _tag_trace(trace_id: str, total: _Sum) -> None:
    """スパンを読まなくても、未計算とモデル別の内訳が分かるようにする。"""
    if not total.kinds:
        return
    mlflow.set_trace_tag(trace_id, STATUS_KEY, total.status)
    text = json.dumps(total.models, separators=(",", ":"), default=_usd_text)
    if total.models and len(text) <= _MAX_TAG_LENGTH:
        mlflow.set_trace_tag(trace_id, BY_MODEL_TAG, text)


def _usd_text(usd: Decimal) -> str | None:
    return None if usd.is_nan() else f"{usd:f}"
