"""8.4.1 アラートの指標: 名前と計算式。"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol
PASS_VALUES = frozenset({'yes', 'true', 'pass', 'passed', 'correct', '1', '1.0'})
FAIL_VALUES = frozenset({'no', 'false', 'fail', 'failed', 'incorrect', '0', '0.0'})
NAMED_METRICS = ('pass_rate', 'fail_rate', 'thumbs_down_rate', 'scorer_error_rate', 'feedback_rate')
PLAIN_METRICS = ('trace_count', 'request_rate', 'error_rate', 'latency_p50_ms', 'latency_p95_ms', 'latency_p99_ms', 'latency_avg_ms', 'cost_usd', 'cost_usd_per_hour', 'cost_usd_per_request', 'input_tokens', 'output_tokens', 'total_tokens', 'total_tokens_per_request')
RATE_METRICS = ('error_rate', *NAMED_METRICS)

class MetricSourceError(RuntimeError):
    """指標を求められない(エクスペリメントがない、サーバーに届かない、知らない指標)。"""

@dataclass(frozen=True, kw_only=True)
class MetricSample:
    """一つの窓の指標の値。"""
    metric: str
    value: float | None
    '指標の単位の値。標本がなく決まらないときは ``None``。'
    n: int
    '値を求めた標本(トレースまたは評価)の数。'
    start: datetime
    end: datetime
    successes: float | None = None
    '割合の分子。割合でない指標では ``None``。'

class MetricSource(Protocol):
    """指標の出どころ。``AlertEngine`` はこの形なら何でも使える。"""

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        """``(at - window, at]`` の値。求められなければ ``MetricSourceError``。"""

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int=3) -> list[str]:
        """その指標を悪くしているトレースの ID。"""

@dataclass(frozen=True, kw_only=True)
class TraceRow:
    """指標に要る分だけを抜き出したトレース。"""
    trace_id: str
    at_ms: int
    state: str = 'OK'
    latency_ms: float | None = None
    tokens: Mapping[str, float] = field(default_factory=dict[str, float])
    cost_usd: float | None = None
    weight: float = 1.0
    '間引いて残したトレース 1 件が代表する件数(``sampling.weight``)。'
    assessments: tuple[tuple[str, str], ...] = ()
    '(名前, 値)。失敗したスコアラーの値は ``error``。'

def percentile(values: Iterable[tuple[float, float]], q: float) -> float | None:
    """(値, 重み) の分位点。重みがすべて 1 なら線形補間(``numpy.percentile`` と同じ)。

    >>> percentile([(10.0, 1), (20.0, 1), (30.0, 1), (40.0, 1)], 50)
    25.0
    """

class Tally(NamedTuple):
    """件数。``weight`` は間引きを補正した推定値、``seen`` は実際に見た数。"""
    weight: float
    seen: int

class Numbers(Protocol):
    """一つの窓の集計値。サーバーに集計させても、行から数えても、同じ式で指標になる。"""

    def states(self) -> Mapping[str, Tally]:
        """トレースの状態(OK、ERROR、...)ごとの件数。"""

    def latency_ms(self, what: str) -> float | None:
        """``p95`` のような分位点か ``avg``。"""

    def tokens(self, kind: str) -> float:
        """``input_tokens`` などの合計。"""

    def cost_usd(self) -> float:
        """コストの合計。"""

    def verdicts(self, name: str) -> Mapping[str, Tally]:
        """評価の値ごとの件数。失敗したスコアラーは ``error``。"""
Value = tuple[float | None, int, float | None]

def measure(metric: str, window_seconds: float, numbers: Numbers) -> Value:
    """指標の名前から値を求める。知らない名前なら ``MetricSourceError``。"""

def check_metric(metric: str) -> None:
    """知っている指標の名前でなければ ``MetricSourceError``。"""

def metric_problem(metric: str, *, rate_for: str='') -> str:
    """指標の名前の誤り。正しければ空。``rate_for`` を渡すと、割合の指標かも見る。"""

def verdict(value: Any) -> str:
    """評価の値を、比べられる小文字の文字列にする。

    >>> verdict(True), verdict("Yes"), verdict(None)
    ('true', 'yes', 'error')
    """

class RowNumbers:
    """トレースの行から数える。"""

    def __init__(self, rows: Sequence[TraceRow]) -> None:
        self.rows = rows

    def _count(self, keys: Iterable[tuple[str, float]]) -> dict[str, Tally]:
        ...

    def states(self) -> dict[str, Tally]:
        """状態ごとの件数。"""

    def latency_ms(self, what: str) -> float | None:
        """分位点か平均(ms)。"""

    def tokens(self, kind: str) -> float:
        """トークンの合計。"""

    def cost_usd(self) -> float:
        """コストの合計(USD)。"""

    def verdicts(self, name: str) -> dict[str, Tally]:
        """評価の値ごとの件数。"""

    def worst(self, metric: str) -> list[TraceRow]:
        """その指標を悪くしている行を、悪い順に。"""

def main() -> None:
    """8 件のトレースから、指標を求める。"""
