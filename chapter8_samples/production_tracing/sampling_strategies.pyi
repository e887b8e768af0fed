"""8.1 サンプリング戦略(ヘッド、テール、適応)。"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from mlflow.entities import Trace
from .policies import AdaptiveRate, KeepRules
from .sampling import TailSampler

class ProbabilisticSampler(TailSampler):
    """ヘッド: 始まる前に、決まった割合だけを選ぶ。最も安いが、エラーも同じ割合で失う。

    ``TailSampler`` は先頭の間引きも行う。ここではそれだけを使う。
    """

    def __init__(self, probability: float) -> None:
        """``probability`` は残す割合 [0, 1]。"""

class ConditionalSampler(TailSampler):
    """テール: 終わってから選ぶ。``KeepRules`` は必ず、ほかは ``rest_probability`` で残す。"""

    def __init__(self, rest_probability: float=0.1, *, slow_ms: float=5000.0, vip_users: Iterable[str]=(), keep_tag: str='sampling.keep') -> None:
        """``rest_probability`` は、どの条件にも当てはまらないトレースを残す割合 [0, 1]。"""

class AdaptiveSampler(TailSampler):
    """適応: 通常のトレースを、流量が変わっても 1 分あたり一定の件数に保つ。

    残す確率は「目標 / いまの流量」で、1 件ごとに変わる。``rules`` に当たるものは別に、必ず残す。
    """

    def __init__(self, target_per_minute: float=60.0, *, rules: KeepRules | None=None, clock: Callable[[], float]=time.monotonic) -> None:
        """``target_per_minute`` は 1 分に残す件数の目標、``clock`` は秒を返す関数。"""
        self.rate: AdaptiveRate

@dataclass(frozen=True)
class WeightedEstimates:
    """重みから求めた、間引く前の全体の推定値。``*_se`` は標準誤差(すべて残していれば 0)。

    コストは分かるトレースだけのもの。``unpriced_traces`` が 0 でなければ、合計は実際より小さい。
    """
    traces: int
    count: float
    count_se: float
    error_rate: float | None
    error_rate_se: float | None
    total_cost_usd: float
    total_cost_usd_se: float
    mean_cost_usd: float | None
    mean_cost_usd_se: float | None
    unpriced_traces: int

def trace_cost_usd(trace: Trace) -> float | None:
    """MLflow が記録したコスト(USD)。記録がなければ ``None``。"""

def weighted_estimates(traces: Iterable[Trace], *, cost_usd: Callable[[Trace], float | None]=trace_cost_usd) -> WeightedEstimates:
    """残ったトレースから、間引く前の件数・エラー率・コストを推定する。

    確率 p で残るトレースの値 x は、重み w = 1/p を掛けて足す。合計に入るのは、確率 p で x/p、残りの
    確率で 0 なので、平均は p * x/p = x になり、p がトレースごとに違っても偏らない。

    Args:
        cost_usd: トレースのコスト(USD)を返す関数。分からなければ ``None``。
    """

def main() -> None:
    """同じ 300 リクエストを 3 通りに間引き、残ったトレースから全体を推定する。"""
