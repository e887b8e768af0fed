"""8.2.3 トレースにコストを記録する(本書にリストなし)。"""

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Protocol
import mlflow
from mlflow.entities import LiveSpan
from .trace_reader import Calculator, Price, TokenUsage
logger = logging.getLogger(__name__)
COST_ATTRIBUTE = 'mlflow.llm.cost'
TRACE_COST_KEY = 'mlflow.trace.cost'
STATUS_KEY = 'cost.status'
SOURCE_KEY = 'cost.price_source'
BY_MODEL_TAG = 'cost.by_model'
_ZERO = Decimal(0)

class Tracker(Protocol):
    """``cost_tracker.CostTracker``、または同じ ``add`` を持つもの。"""

    def add(self, item: Any, *, user: str | None=None) -> None:
        ...

@dataclass(slots=True)
class _Sum:
    """あるスパンの下にある呼び出しの合計。料金未定が混ざったモデルの USD は NaN になる。"""
    prompt_usd: Decimal = _ZERO
    output_usd: Decimal = _ZERO
    kinds: set[str] = field(default_factory=set[str])
    models: dict[str, tuple[Any, ...]] = field(default_factory=dict[str, tuple[Any, ...]])
    'モデルごとの (回数, 入力, 出力, USD)。'

    @property
    def status(self) -> str:
        ...

    def add_call(self, item: Price) -> None:
        ...

    def merge(self, other: _Sum) -> None:
        ...

    def _add(self, model: str, more: tuple[Any, ...]) -> None:
        ...

class CostTracking:
    """``setup_cost_tracking`` の結果。数は、このプロセスで終わったスパンの累計。"""

    def __init__(self, calculator: Calculator, tracker: Tracker | None, current_user: Callable[[], str | None] | None) -> None:
        self._calculator = calculator
        self._tracker = tracker
        self._current_user = current_user
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._unpriced_models: Counter[str] = Counter()
        self._open: OrderedDict[str, dict[str, _Sum]] = OrderedDict()
        self._expected = False
        self._processor = price_span_on_end

    @property
    def priced(self) -> int:
        """料金を付けた呼び出しの数。"""

    @property
    def unpriced(self) -> int:
        """料金の決まらなかった呼び出しの数。"""

    @property
    def missing_usage(self) -> int:
        """使用量の報告がなかった呼び出しの数。ストリームの設定漏れに多い。"""

    @property
    def failed(self) -> int:
        """計算そのものに失敗したスパンの数。0 でなければログに原因がある。"""

    @property
    def unpriced_models(self) -> dict[str, int]:
        """料金表に足すべきモデルと、その回数。"""

    @property
    def installed(self) -> bool:
        """いまも動いているか。外されたことに気づいたら、警告を 1 回ログに出す。"""

    def install(self) -> CostTracking:
        """ほかのプロセッサーを残して登録する。何度呼んでもよい。"""

    def uninstall(self) -> None:
        """登録を外す。ほかのプロセッサーは残る。"""

    def _seen(self, name: str) -> int:
        """数を読むときにも、外されていないかを確かめる。止まった数を正しい数と思わせない。"""

    def _on_end(self, span: LiveSpan) -> None:
        ...

    def _take(self, span: LiveSpan) -> _Sum:
        """子孫の合計を受け取る。子は親より先に終わる。"""

    def _hand_over(self, span: LiveSpan, total: _Sum) -> None:
        ...

    def _price(self, span: LiveSpan, total: _Sum) -> None:
        ...

    def _price_call(self, span: LiveSpan, usage: TokenUsage, total: _Sum) -> None:
        ...

    def _note_unpriced(self, model: str) -> None:
        ...

    def _count(self, name: str) -> None:
        ...

def setup_cost_tracking(calculator: Calculator | None=None, *, tracker: Tracker | None=None, current_user: Callable[[], str | None] | None=None) -> CostTracking:
    """LLM のスパンが終わるたびに、コストをトレースへ記録する。

    スパンに ``mlflow.llm.cost``、``cost.status``、``cost.price_source`` を、トレースに
    ``cost.status`` と ``cost.by_model`` を付ける。料金は呼び出しが始まった日のもの。
    ``set_experiment`` や ``set_tracking_uri`` の後も動き続ける。ほかの処理が
    ``mlflow.tracing.configure`` で上書きしたり ``mlflow.tracing.reset()`` で消したりすると外れ、
    ``installed`` か件数を読んだときに警告する。``install()`` をもう一度呼べばよい。
    ``setup_cost_tracking`` を二度呼ぶと、新しいほうに替わる。

    Args:
        calculator: 既定は ``CostCalculator()``(2024 年 12 月の公開料金)。
        tracker: 渡すと、同じコストを ``CostTracker`` にも足す。
        current_user: いまのユーザーを返す関数。ユーザー別の合計に使う。

    Returns:
        件数(``priced``、``unpriced``、``missing_usage``、``failed``)を持つ ``CostTracking``。
    """

def main() -> None:
    ...

@mlflow.trace
def answer(client: Any, question: str) -> None:
    """検索用の埋め込みと、3 つのチャットモデルを呼ぶ。"""
