"""8.4.1 アラートの指標を、アプリのプロセスの中で数える(サーバーのないアプリ向け)。"""

import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar
from .trace_metrics import MetricSample, Tally, TraceRow
K = TypeVar('K', bound=Hashable)
SLOT_SECONDS = 10
GROWTH = 1.02
MIN_MS = 0.001
EXAMPLES = 3
MAX_OPEN_SPANS = 10000

def bucket_of(latency_ms: float) -> int:
    """遅延の階級の番号。"""

def bucket_value(bucket: int) -> float:
    """階級の代表値(ms)。階級の両端から同じ比だけ離れた値。"""

@dataclass
class Slot:
    """10 秒分の件数。足し合わせると、長い窓やほかのプロセスの分も含む値になる。"""
    counts: dict[tuple[str, str], Tally] = field(default_factory=dict[tuple[str, str], Tally])
    '(評価の名前, 値) ごとの件数。名前が空の行は、トレースの状態。'
    sums: dict[str, float] = field(default_factory=dict[str, float])
    buckets: dict[int, Tally] = field(default_factory=dict[int, Tally])
    examples: dict[str, list[tuple[float, str]]] = field(default_factory=dict[str, list[tuple[float, str]]])

    def add(self, row: TraceRow) -> None:
        """1 件を数える。"""

    def judge(self, name: str, value: str, row: TraceRow) -> None:
        """評価 1 件を数える。"""

    def merge(self, other: Slot) -> None:
        """ほかの区画を足す。"""

    def _sum(self, kind: str, amount: float) -> None:
        ...

    def _note(self, kind: str, badness: float, trace_id: str) -> None:
        ...

    def states(self) -> dict[str, Tally]:
        """トレースの状態ごとの件数。"""

    def verdicts(self, name: str) -> dict[str, Tally]:
        """評価の値ごとの件数。"""

    def tokens(self, kind: str) -> float:
        """トークンの合計。"""

    def cost_usd(self) -> float:
        """コストの合計(USD)。"""

    def latency_ms(self, what: str) -> float | None:
        """分位点(誤差 1% 以内)か、正確な平均。"""

    def _at_rank(self, rank: float) -> float:
        ...

class InProcessMetricSource:
    """このプロセスで起きたことだけを数える ``MetricSource``。どのスレッドから呼んでもよい。

    Args:
        keep: 覚えておく長さ。ルールの最も長い窓以上にする。
        clock: 時刻の分からない記録に使う、UTC の秒。
    """

    def __init__(self, *, keep: timedelta=timedelta(hours=6), clock: Callable[[], float]=time.time) -> None:
        self.keep, self._clock = (keep, clock)
        self._capacity = math.ceil((keep + timedelta(minutes=10)).total_seconds() / SLOT_SECONDS)
        self._slots: dict[int, Slot] = {}
        self._lock = threading.Lock()

    def record(self, row: TraceRow) -> None:
        """終わったリクエスト 1 件を数える。"""

    def record_feedback(self, name: str, value: Any, *, at: datetime | None=None, trace_id: str='') -> None:
        """評価やフィードバック 1 件を数える。

        Args:
            value: bool か yes/no。``None`` は、スコアラーの失敗。
            at: 評価したリクエストの時刻。省略するといま(MLflow から読むと、その時刻になる)。
        """

    def span_processor(self) -> Callable[[Any], None]:
        """``mlflow.tracing.configure(span_processors=[...])`` に渡す関数。

        遅延は、ルートスパンの終わりに呼ばれた時点までを測る。
        """

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。両端は 10 秒に丸める。"""

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int=3) -> list[str]:
        """その指標を悪くしているトレースの ID(悪い順、多くても 3 件)。"""

    def snapshot(self) -> dict[int, Slot]:
        """今までの区画の写し。pickle できるので、ほかのプロセスへ渡せる。"""

    @classmethod
    def merged(cls, snapshots: Iterable[Mapping[int, Slot]], **options: Any) -> InProcessMetricSource:
        """各ワーカーの ``snapshot`` を合わせた出どころ。評価のたびに作り直す。"""

    def _slot(self, at_ms: int) -> Slot:
        ...

    def _window(self, window: timedelta, at: datetime) -> Slot:
        ...

class OpenSpans:
    """子スパンのトークンとコストを、ルートまで持ち上げる。数え方は MLflow と同じ。

    自分の値を持つスパンでは、その下の値を足さない(二重に数えない)。
    """

    def __init__(self) -> None:
        self._below: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """子の値を預かっている親スパンの数。"""

    def end(self, span: Any, clock: Callable[[], float]) -> TraceRow | None:
        """終わったスパンを受け取る。ルートなら、トレース全体の行を返す。"""

    def _lift(self, parent: tuple[str, str], found: Mapping[str, Mapping[str, float]]) -> None:
        ...

def main() -> None:
    """本物のスパンを数え、MLflow に記録された値と比べ、アラートを 1 つ出す。"""
