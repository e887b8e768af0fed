"""8.1 残すトレースを選ぶ規則(sampling_strategies.py のサンプラーが使う)。"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


def check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}={value!r} must be within [0, 1]")


@dataclass(frozen=True, kw_only=True)
class TraceSummary:
    """終わったトレースの要約。残すかどうかをこれで決める。"""

    trace_id: str
    name: str
    duration_ms: float
    is_error: bool
    num_spans: int = 1
    user: str | None = None
    session: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    feedback: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Decision:
    """残す確率 [0, 1] と、その理由。"""

    probability: float
    rule: str

    def __post_init__(self) -> None:
        check_probability("probability", self.probability)


@dataclass(frozen=True, kw_only=True)
class KeepRules:
    """必ず残す条件: エラー、遅いもの、重要な顧客、タグの付いたもの、評価の低いもの。"""

    slow_ms: float = 5000.0
    vip_users: Iterable[str] = ()
    keep_tag: str = "sampling.keep"
    low_rating: float = 2.0

    def __post_init__(self) -> None:
        if isinstance(self.vip_users, str):  # 1 文字ずつのユーザーになり、誰も残らない
            raise ValueError(f"vip_users={self.vip_users!r} must be a list of user ids")
        object.__setattr__(self, "vip_users", frozenset(self.vip_users))

    def __call__(self, trace: TraceSummary) -> Decision | None:
        """必ず残すという判断と、その理由。どれにも当てはまらなければ ``None``。"""
        rules = {
            "error": trace.is_error,
            "slow": trace.duration_ms >= self.slow_ms,
            "vip": trace.user is not None and trace.user in self.vip_users,
            "forced": trace.tags.get(self.keep_tag) == "true",
            "feedback": any(map(self._is_low, trace.feedback.values())),  # 実行中に付いた評価
        }
        return next((Decision(1.0, rule) for rule, applies in rules.items() if applies), None)

    def _is_low(self, value: object) -> bool:
        limit = 0 if isinstance(value, bool) else self.low_rating
        return isinstance(value, int | float) and value <= limit


@dataclass
class AdaptiveRate:
    """到着の速さを指数減衰で見積もり、確率 = 目標 / 流量 を返す(メモリーは一定)。

    過去だけから決めるので、確率の逆数は偏りのない重みになる。
    """

    target_per_minute: float
    time_constant_seconds: float = 10.0
    min_probability: float = 1e-4
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        check_probability("min_probability", self.min_probability)
        for name in ("target_per_minute", "time_constant_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be > 0")
        self._lock = threading.Lock()
        self._first: float | None = None
        self._last = self._sum = 0.0

    def __call__(self) -> float:
        """1 件の到着を数え、それを残す確率を返す。"""
        now, tau = self.clock(), self.time_constant_seconds
        with self._lock:
            if self._first is None:
                self._first = self._last = now
            before = self._sum * math.exp(-max(0.0, now - self._last) / tau)
            self._sum, self._last = before + 1.0, now
            # 始まってすぐの過小評価を補正した、1 秒あたりの件数
            rate = before / (tau * (1 - math.exp(-max(now - self._first, 1e-3) / tau)))
        wanted = self.target_per_minute / 60.0
        return max(self.min_probability, min(1.0, wanted / rate)) if rate else 1.0
