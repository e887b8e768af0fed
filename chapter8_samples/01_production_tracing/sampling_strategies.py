"""8.1 サンプリング戦略(ヘッド、テール、適応)。

ヘッドサンプリングは始まりで選ぶので、いちばん見たいエラーや遅延も同じ割合で捨ててしまう。終わってから
選び、残した分に重み(確率の逆数)を付ければ、少ない記録からでも全体を偏りなく求められる。

実行::

    $ python chapter8_samples/01_production_tracing/sampling_strategies.py
    300 リクエスト(うちエラー 6 件 = 2.0%)。残ったトレースから求めた値(± は標準誤差):
    一律 10%: 30 件(エラー 1)  単純 3.3% → 重み付き 3.3%、全体は 300 ± 52 件
    条件つき: 34 件(エラー 6)  単純 17.6% → 重み付き 2.1%、全体は 286 ± 50 件
    毎分 60 件: 67 件(エラー 6)  単純 9.0% → 重み付き 2.0%、全体は 304 ± 34 件

Databricks でも同じコードで動く。メタデータ ``sampling.weight`` を掛ければ SQL の集計も偏らない。
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow.entities import Trace, TraceState

from chapter8_samples.production_tracing.policies import AdaptiveRate, Decision, KeepRules
from chapter8_samples.production_tracing.sampling import WEIGHT_KEY, TailSampler


class ProbabilisticSampler(TailSampler):
    """ヘッド: 始まる前に、決まった割合だけを選ぶ。最も安いが、エラーも同じ割合で失う。

    ``TailSampler`` は先頭の間引きも行う。ここではそれだけを使う。
    """

    def __init__(self, probability: float) -> None:
        """``probability`` は残す割合 [0, 1]。"""
        super().__init__(lambda _trace: Decision(1.0, "head"), head_probability=probability)


class ConditionalSampler(TailSampler):
    """テール: 終わってから選ぶ。``KeepRules`` は必ず、ほかは ``rest_probability`` で残す。"""

    def __init__(
        self,
        rest_probability: float = 0.1,
        *,
        slow_ms: float = 5000.0,
        vip_users: Iterable[str] = (),
        keep_tag: str = "sampling.keep",
    ) -> None:
        """``rest_probability`` は、どの条件にも当てはまらないトレースを残す割合 [0, 1]。"""
        keep = KeepRules(slow_ms=slow_ms, vip_users=vip_users, keep_tag=keep_tag)
        rest = Decision(rest_probability, "rest")
        super().__init__(lambda trace: keep(trace) or rest)


class AdaptiveSampler(TailSampler):
    """適応: 通常のトレースを、流量が変わっても 1 分あたり一定の件数に保つ。

    残す確率は「目標 / いまの流量」で、1 件ごとに変わる。``rules`` に当たるものは別に、必ず残す。
    """

    def __init__(
        self,
        target_per_minute: float = 60.0,
        *,
        rules: KeepRules | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``target_per_minute`` は 1 分に残す件数の目標、``clock`` は秒を返す関数。"""
        self.rate = AdaptiveRate(target_per_minute, clock=clock)
        keep = rules or KeepRules()
        super().__init__(lambda trace: keep(trace) or Decision(self.rate(), "adaptive"))


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
    cost = trace.info.cost
    return None if cost is None else float(cost["total_cost"])


def weighted_estimates(
    traces: Iterable[Trace], *, cost_usd: Callable[[Trace], float | None] = trace_cost_usd
) -> WeightedEstimates:
    """残ったトレースから、間引く前の件数・エラー率・コストを推定する。

    確率 p で残るトレースの値 x は、重み w = 1/p を掛けて足す。合計に入るのは、確率 p で x/p、残りの
    確率で 0 なので、平均は p * x/p = x になり、p がトレースごとに違っても偏らない。

    Args:
        cost_usd: トレースのコスト(USD)を返す関数。分からなければ ``None``。
    """
    requests: list[tuple[float, float]] = []  # どれも (重み, 値) の組
    errors: list[tuple[float, float]] = []
    costs: list[tuple[float, float]] = []
    for trace in traces:
        weight = float(trace.info.trace_metadata.get(WEIGHT_KEY, 1.0))
        requests.append((weight, 1.0))
        errors.append((weight, 1.0 if trace.info.state == TraceState.ERROR else 0.0))
        cost = cost_usd(trace)
        if cost is not None:
            costs.append((weight, cost))
    count, count_se = _total(requests)
    error_rate, error_rate_se = _mean(errors)
    total_cost, total_cost_se = _total(costs)
    mean_cost, mean_cost_se = _mean(costs)
    return WeightedEstimates(
        traces=len(requests),
        count=count,
        count_se=count_se,
        error_rate=error_rate,
        error_rate_se=error_rate_se,
        total_cost_usd=total_cost,
        total_cost_usd_se=total_cost_se,
        mean_cost_usd=mean_cost,
        mean_cost_usd_se=mean_cost_se,
        unpriced_traces=len(requests) - len(costs),
    )


def _total(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """(重み w, 値 x) から、合計 Σwx(Horvitz-Thompson)と、標準誤差 √Σw(w-1)x*x。"""
    variance = sum(w * (w - 1) * x * x for w, x in pairs)
    return sum(w * x for w, x in pairs), math.sqrt(variance)


def _mean(pairs: list[tuple[float, float]]) -> tuple[float | None, float | None]:
    """平均 m = Σwx / Σw(Hajek)と、その標準誤差(Σw(x - m) の標準誤差 / Σw)。"""
    if not pairs:
        return None, None
    size, _ = _total([(w, 1.0) for w, _ in pairs])
    total, _ = _total(pairs)
    mean = total / size
    _, spread = _total([(w, x - mean) for w, x in pairs])
    return mean, spread / size


def main() -> None:
    """同じ 300 リクエストを 3 通りに間引き、残ったトレースから全体を推定する。"""
    from chapter8_samples import _lab

    ticks = itertools.count(0, 0.2)  # 毎分 300 件の流量を、待たずに再現する
    samplers: dict[str, TailSampler] = {
        "一律 10%": ProbabilisticSampler(0.1),
        "条件つき": ConditionalSampler(0.1),
        "毎分 60 件": AdaptiveSampler(60, clock=lambda: next(ticks)),
    }
    random.seed(2)  # 残るかどうかはトレース ID で決まる。何度実行しても同じものが残るようにする
    with _lab.sample("ch8-sampling", fresh_store=True):
        experiments = {name: _record(name, sampler) for name, sampler in samplers.items()}
        mlflow.flush_trace_async_logging()
        print("300 リクエスト(うちエラー 6 件 = 2.0%)。残ったトレースから求めた値(± は標準誤差):")
        for name, experiment_id in experiments.items():
            print(f"{name}: {_estimate(experiment_id)}")


def _record(name: str, sampler: TailSampler) -> str:
    """300 リクエストを間引いて記録し、エクスペリメントの ID を返す。"""
    experiment = mlflow.set_experiment(f"ch8-sampling {name}")
    sampler.install()
    for number in range(300):
        with contextlib.suppress(TimeoutError):
            _answer(number)
    sampler.uninstall()
    return experiment.experiment_id


def _estimate(experiment_id: str) -> str:
    found: Any = mlflow.search_traces(
        locations=[experiment_id], return_type="list", include_spans=False
    )
    errors = sum(trace.info.state == TraceState.ERROR for trace in found)
    estimate = weighted_estimates(found)
    return (
        f"{len(found)} 件(エラー {errors})  単純 {errors / max(1, len(found)):.1%}"
        f" → 重み付き {estimate.error_rate or 0:.1%}、全体は {estimate.count:.0f}"
        f" ± {estimate.count_se:.0f} 件"
    )


@mlflow.trace(name="chat")
def _answer(number: int) -> str:
    if number % 50 == 7:  # 2% がタイムアウトする
        raise TimeoutError("provider timeout")
    return "ok"


if __name__ == "__main__":
    main()
