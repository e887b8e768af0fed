"""8.1 サンプリング戦略(ヘッド、テール、適応)。"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from .sampling import Decision, TailSampler, TraceSummary
from mlflow.entities import Trace

@dataclass(frozen=True, kw_only=True)
class KeepRules:
    """必ず残す条件。どれにも当てはまらないものは ``rest`` の確率で残す。"""
    slow_ms: float = 5000.0
    'これ以上かかったトレースを残す(ミリ秒)。'
    vip_users: Iterable[str] = frozenset[str]()
    keep_tag: str = 'sampling.keep'
    'このタグが ``"true"`` のトレースを残す(調査中の機能など)。'
    low_rating: float = 2.0
    '実行中に付いた評価がこれ以下、または ``False`` のトレースを残す。'

    def __post_init__(self) -> None:
        ...

    def __call__(self, summary: TraceSummary) -> Decision | None:
        """必ず残すという判断と、その理由。どれにも当てはまらなければ ``None``。"""

    def _is_low(self, value: object) -> bool:
        ...

class ProbabilisticSampler(TailSampler):
    """先頭で、決まった割合だけを記録する。最も安いが、エラーも同じ割合で失う。"""

    def __init__(self, probability: float) -> None:
        """``probability`` は残す割合 [0, 1]。"""

class ConditionalSampler(TailSampler):
    """エラー・遅延・VIP・指定・低評価は必ず残し、ほかは ``rest_probability`` で残す。"""

    def __init__(self, rest_probability: float=0.1, *, slow_ms: float=5000.0, vip_users: Iterable[str]=(), keep_tag: str='sampling.keep', low_rating: float=2.0, head_probability: float=1.0) -> None:
        """``rest_probability`` は、どの条件にも当てはまらないトレースを残す割合 [0, 1]。"""

class AdaptiveSampler(TailSampler):
    """通常のトレースを、流量が変わっても 1 分あたり一定の件数に保つ。

    必ず残すもの(``rules``)は、この件数とは別に残す。
    """

    def __init__(self, target_per_minute: float=60.0, *, rules: KeepRules | None=None, time_constant_seconds: float=10.0, min_probability: float=0.0001, clock: Callable[[], float]=time.monotonic) -> None:
        """``time_constant_seconds`` が短いほど、急増に速く追従する。"""
        self.rate: AdaptiveRate

class AdaptiveRate:
    """到着の速さを指数減衰で見積もり、目標に合う確率を返す(メモリーは一定)。

    過去だけから決めるので、確率の逆数は偏りのない重みになる。流量が k 倍に増えた直後の超過は、
    およそ 目標 * 時定数 * ln k 件で収まる。
    """

    def __init__(self, target_per_minute: float, *, time_constant_seconds: float=10.0, min_probability: float=0.0001, clock: Callable[[], float]=time.monotonic) -> None:
        self._tau = time_constant_seconds
        self._floor = min_probability
        self._clock = clock
        self._first: float | None

    def __call__(self) -> float:
        """1 件の到着を数え、それを残す確率を返す。"""

    def _rate_until(self, now: float) -> float:
        """この到着より前の、1 秒あたりの件数。始まってすぐの過小評価を補正する。"""

@dataclass(frozen=True)
class WeightedEstimates:
    """重みから求めた、間引く前の全体の推定値。``*_se`` は標準誤差。"""
    traces: int
    '計算に使ったトレースの件数。'
    count: float
    count_se: float
    error_rate: float | None
    error_rate_se: float | None
    total_cost_usd: float
    'コストの分かるトレースの合計。'
    total_cost_usd_se: float
    mean_cost_usd: float | None
    mean_cost_usd_se: float | None
    unpriced_traces: int
    'コストの分からなかったトレースの件数。0 でなければ合計は実際より小さい。'

def trace_cost_usd(trace: Trace) -> float | None:
    """MLflow が記録したコスト(USD)。記録がなければ ``None``。"""

def trace_weight(trace: Trace) -> float:
    """``sampling.weight``。間引かずに残したトレースは 1。"""

def weighted_estimates(traces: Iterable[Trace], *, cost_usd: Callable[[Trace], float | None]=trace_cost_usd) -> WeightedEstimates:
    """残ったトレースから、間引く前の件数・エラー率・コストを推定する。

    合計は Horvitz-Thompson 推定、比率は Hajek 推定、標準誤差は線形化による(間引きによる誤差だけを
    表し、すべて残していれば 0 になる)。

    Args:
        cost_usd: トレースのコスト(USD)を返す関数。分からなければ ``None``。
    """

def main() -> None:
    """同じ 300 リクエストを 3 通りに間引き、残ったトレースから全体を推定する。"""
