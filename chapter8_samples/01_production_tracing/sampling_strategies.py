"""8.1 サンプリング戦略(ヘッド、テール、適応)。

ヘッドサンプリングは、いちばん見たいエラーや遅延も同じ割合で捨ててしまう。結果を見てから選び、
残した分に重み(確率の逆数)を付ければ、少ない記録からでも件数・エラー率・コストを偏りなく求められる。

実行::

    $ python chapter8_samples/01_production_tracing/sampling_strategies.py
    300 リクエスト(うちエラー 6 件 = 2.0%)。残ったトレースから求めたエラー率と件数:
    一律 10%: ... 件(エラー ...)  単純 ...% → 重み付き ...%、全体は ... ± ... 件
    条件つき: ... 件(エラー 6)  単純 ...% → 重み付き ...%、全体は ... ± ... 件
    毎分 60 件: ... 件(エラー 6)  単純 ...% → 重み付き ...%、全体は ... ± ... 件

Databricks でも同じコードで動く。メタデータ ``sampling.weight`` を掛ければ SQL の集計も偏らない。
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlflow

from chapter8_samples.production_tracing.sampling import (
    WEIGHT_KEY,
    Decision,
    TailSampler,
    TraceSummary,
    check_probability,
)

if TYPE_CHECKING:
    from mlflow.entities import Trace


_KEEP = {rule: Decision(1.0, rule) for rule in ("error", "slow", "vip", "forced", "feedback")}


@dataclass(frozen=True, kw_only=True)
class KeepRules:
    """必ず残す条件。どれにも当てはまらないものは ``rest`` の確率で残す。"""

    slow_ms: float = 5000.0
    """これ以上かかったトレースを残す(ミリ秒)。"""
    vip_users: Iterable[str] = frozenset[str]()
    keep_tag: str = "sampling.keep"
    """このタグが ``"true"`` のトレースを残す(調査中の機能など)。"""
    low_rating: float = 2.0
    """実行中に付いた評価がこれ以下、または ``False`` のトレースを残す。"""

    def __post_init__(self) -> None:
        if isinstance(self.vip_users, str):  # 1 文字ずつのユーザーになり、誰も残らない
            raise ValueError(f"vip_users={self.vip_users!r} must be a list of user ids")
        object.__setattr__(self, "vip_users", frozenset(self.vip_users))

    def __call__(self, summary: TraceSummary) -> Decision | None:
        """必ず残すという判断と、その理由。どれにも当てはまらなければ ``None``。"""
        if summary.is_error:
            return _KEEP["error"]
        if summary.duration_ms >= self.slow_ms:
            return _KEEP["slow"]
        if summary.user and summary.user in self.vip_users:
            return _KEEP["vip"]
        if summary.tags.get(self.keep_tag) == "true":
            return _KEEP["forced"]
        low = any(map(self._is_low, summary.feedback.values()))
        return _KEEP["feedback"] if low else None

    def _is_low(self, value: object) -> bool:
        if isinstance(value, bool):
            return not value
        return isinstance(value, int | float) and value <= self.low_rating


class ProbabilisticSampler(TailSampler):
    """先頭で、決まった割合だけを記録する。最も安いが、エラーも同じ割合で失う。"""

    def __init__(self, probability: float) -> None:
        """``probability`` は残す割合 [0, 1]。"""
        check_probability("probability", probability)
        keep = Decision(1.0, "head")
        super().__init__(lambda _summary: keep, head_probability=probability)


class ConditionalSampler(TailSampler):
    """エラー・遅延・VIP・指定・低評価は必ず残し、ほかは ``rest_probability`` で残す。"""

    def __init__(
        self,
        rest_probability: float = 0.1,
        *,
        slow_ms: float = 5000.0,
        vip_users: Iterable[str] = (),
        keep_tag: str = "sampling.keep",
        low_rating: float = 2.0,
        head_probability: float = 1.0,
    ) -> None:
        """``rest_probability`` は、どの条件にも当てはまらないトレースを残す割合 [0, 1]。"""
        check_probability("rest_probability", rest_probability)
        rules = KeepRules(
            slow_ms=slow_ms,
            vip_users=vip_users,
            keep_tag=keep_tag,
            low_rating=low_rating,
        )

        rest = Decision(rest_probability, "rest")

        def policy(summary: TraceSummary) -> Decision:
            return rules(summary) or rest

        super().__init__(policy, head_probability=head_probability)


class AdaptiveSampler(TailSampler):
    """通常のトレースを、流量が変わっても 1 分あたり一定の件数に保つ。

    必ず残すもの(``rules``)は、この件数とは別に残す。
    """

    def __init__(
        self,
        target_per_minute: float = 60.0,
        *,
        rules: KeepRules | None = None,
        time_constant_seconds: float = 10.0,
        min_probability: float = 1e-4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``time_constant_seconds`` が短いほど、急増に速く追従する。"""
        self.rate = AdaptiveRate(
            target_per_minute,
            time_constant_seconds=time_constant_seconds,
            min_probability=min_probability,
            clock=clock,
        )
        keep = rules or KeepRules()

        def policy(summary: TraceSummary) -> Decision:
            return keep(summary) or Decision(self.rate(), "adaptive")

        super().__init__(policy)


class AdaptiveRate:
    """到着の速さを指数減衰で見積もり、目標に合う確率を返す(メモリーは一定)。

    過去だけから決めるので、確率の逆数は偏りのない重みになる。流量が k 倍に増えた直後の超過は、
    およそ 目標 * 時定数 * ln k 件で収まる。
    """

    def __init__(
        self,
        target_per_minute: float,
        *,
        time_constant_seconds: float = 10.0,
        min_probability: float = 1e-4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if target_per_minute <= 0 or time_constant_seconds <= 0:
            raise ValueError("target_per_minute and time_constant_seconds must be > 0")
        check_probability("min_probability", min_probability)
        self._target = target_per_minute / 60.0
        self._tau = time_constant_seconds
        self._floor = min_probability
        self._clock = clock
        self._lock = threading.Lock()
        self._sum = 0.0
        self._first: float | None = None
        self._last = 0.0

    def __call__(self) -> float:
        """1 件の到着を数え、それを残す確率を返す。"""
        now = self._clock()
        with self._lock:
            rate = self._rate_until(now)
            self._sum += 1.0
        return 1.0 if rate <= 0 else max(self._floor, min(1.0, self._target / rate))

    def _rate_until(self, now: float) -> float:
        """この到着より前の、1 秒あたりの件数。始まってすぐの過小評価を補正する。"""
        if self._first is None:
            self._first = self._last = now
            return 0.0
        self._sum *= math.exp(-max(0.0, now - self._last) / self._tau)
        self._last = now
        elapsed = max(now - self._first, 1e-3)
        return self._sum / (self._tau * (1 - math.exp(-elapsed / self._tau)))


@dataclass(frozen=True)
class WeightedEstimates:
    """重みから求めた、間引く前の全体の推定値。``*_se`` は標準誤差。"""

    traces: int
    """計算に使ったトレースの件数。"""
    count: float
    count_se: float
    error_rate: float | None
    error_rate_se: float | None
    total_cost_usd: float
    """コストの分かるトレースの合計。"""
    total_cost_usd_se: float
    mean_cost_usd: float | None
    mean_cost_usd_se: float | None
    unpriced_traces: int
    """コストの分からなかったトレースの件数。0 でなければ合計は実際より小さい。"""


def trace_cost_usd(trace: Trace) -> float | None:
    """MLflow が記録したコスト(USD)。記録がなければ ``None``。"""
    cost = trace.info.cost
    return None if cost is None else float(cost["total_cost"])


def trace_weight(trace: Trace) -> float:
    """``sampling.weight``。間引かずに残したトレースは 1。"""
    values = {**trace.info.tags, **trace.info.trace_metadata}
    return float(values.get(WEIGHT_KEY, 1.0))


def weighted_estimates(
    traces: Iterable[Trace], *, cost_usd: Callable[[Trace], float | None] = trace_cost_usd
) -> WeightedEstimates:
    """残ったトレースから、間引く前の件数・エラー率・コストを推定する。

    合計は Horvitz-Thompson 推定、比率は Hajek 推定、標準誤差は線形化による(間引きによる誤差だけを
    表し、すべて残していれば 0 になる)。

    Args:
        cost_usd: トレースのコスト(USD)を返す関数。分からなければ ``None``。
    """
    items = list(traces)
    weights = [trace_weight(trace) for trace in items]
    errors = [float(str(trace.info.state).endswith("ERROR")) for trace in items]
    priced = [(w, c) for w, t in zip(weights, items, strict=True) if (c := cost_usd(t)) is not None]
    count, count_se = _total(weights, [1.0] * len(items))
    error_rate, error_rate_se = _ratio(weights, errors)
    cost_weights, costs = [w for w, _ in priced], [c for _, c in priced]
    total_cost, total_cost_se = _total(cost_weights, costs)
    mean_cost, mean_cost_se = _ratio(cost_weights, costs)
    return WeightedEstimates(
        traces=len(items),
        count=count,
        count_se=count_se,
        error_rate=error_rate,
        error_rate_se=error_rate_se,
        total_cost_usd=total_cost,
        total_cost_usd_se=total_cost_se,
        mean_cost_usd=mean_cost,
        mean_cost_usd_se=mean_cost_se,
        unpriced_traces=len(items) - len(priced),
    )


def _total(weights: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    pairs = list(zip(weights, values, strict=True))
    variance = sum(w * (w - 1.0) * v * v for w, v in pairs)
    return sum(w * v for w, v in pairs), math.sqrt(max(0.0, variance))


def _ratio(
    weights: Sequence[float], values: Sequence[float]
) -> tuple[float, float] | tuple[None, None]:
    size = sum(weights)
    if not weights:
        return None, None
    mean = sum(w * v for w, v in zip(weights, values, strict=True)) / size
    _, spread = _total(weights, [value - mean for value in values])
    return mean, spread / size


def main() -> None:
    """同じ 300 リクエストを 3 通りに間引き、残ったトレースから全体を推定する。"""
    from chapter8_samples import _lab

    ticks = itertools.count(0, 0.2)  # 毎分 300 件の流量を、待たずに再現する
    samplers: dict[str, TailSampler] = {
        "一律 10%": ProbabilisticSampler(0.1),
        "条件つき": ConditionalSampler(0.1, slow_ms=40),
        "毎分 60 件": AdaptiveSampler(60, rules=KeepRules(slow_ms=40), clock=lambda: next(ticks)),
    }
    with _lab.sample("ch8-sampling", fresh_store=True):
        print("300 リクエスト(うちエラー 6 件 = 2.0%)。残ったトレースから求めたエラー率と件数:")
        for name, sampler in samplers.items():
            print(_compare(name, sampler))


def _compare(name: str, sampler: TailSampler, requests: int = 300) -> str:
    experiment = mlflow.set_experiment(  # pyright: ignore[reportUnknownMemberType]
        f"ch8-sampling {name}"
    )
    sampler.install()
    for number in range(requests):
        with contextlib.suppress(TimeoutError):
            _answer(number)
    mlflow.flush_trace_async_logging()
    sampler.uninstall()
    found: Any = mlflow.search_traces(
        locations=[experiment.experiment_id], return_type="list", include_spans=False
    )
    errors = sum(str(trace.info.state).endswith("ERROR") for trace in found)
    estimate = weighted_estimates(found)
    return (
        f"{name}: {len(found)} 件(エラー {errors})  単純 {errors / max(1, len(found)):.1%}"
        f" → 重み付き {estimate.error_rate or 0:.1%}、全体は {estimate.count:.0f}"
        f" ± {estimate.count_se:.0f} 件"
    )


@mlflow.trace(name="chat")
def _answer(number: int) -> str:
    if number % 50 == 7:  # 2% がタイムアウトする
        raise TimeoutError("provider timeout")
    if number % 40 == 3:
        time.sleep(0.05)
    return "ok"


if __name__ == "__main__":
    main()
