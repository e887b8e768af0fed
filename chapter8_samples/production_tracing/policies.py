"""8.1 残すトレースを選ぶ規則(sampling_strategies.py のサンプラーが使う)。"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

MEMORY_SECONDS = 10.0  # 到着の速さを、過去のおよそこの長さから見積もる


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
    user: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Decision:
    """残す確率 [0, 1] と、その理由。"""

    probability: float
    rule: str

    def __post_init__(self) -> None:
        check_probability("probability", self.probability)


@dataclass(frozen=True, kw_only=True)
class KeepRules:
    """必ず残す条件: エラー、遅いもの、重要な顧客、タグの付いたもの。"""

    slow_ms: float = 5000.0
    vip_users: Iterable[str] = ()
    keep_tag: str = "sampling.keep"

    def __post_init__(self) -> None:
        if isinstance(self.vip_users, str):  # 1 文字ずつのユーザーになり、誰も残らない
            raise ValueError(f"vip_users={self.vip_users!r} must be a list of user ids")
        object.__setattr__(self, "vip_users", frozenset(self.vip_users))

    def __call__(self, trace: TraceSummary) -> Decision | None:
        """必ず残すという判断と、その理由。どれにも当てはまらなければ ``None``。"""
        if trace.is_error:
            return Decision(1.0, "error")
        if trace.duration_ms >= self.slow_ms:
            return Decision(1.0, "slow")
        if trace.user is not None and trace.user in self.vip_users:
            return Decision(1.0, "vip")
        if trace.tags.get(self.keep_tag) == "true":
            return Decision(1.0, "forced")
        return None


@dataclass
class AdaptiveRate:
    """到着の速さを指数減衰で見積もり、確率 = 目標 / 流量 を返す(メモリーは一定)。

    過去だけから決めるので、確率の逆数は偏りのない重みになる。
    """

    target_per_minute: float
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        if not self.target_per_minute > 0:
            raise ValueError(f"target_per_minute={self.target_per_minute!r} must be > 0")
        self._seen: tuple[float, float, float] | None = None

    def __call__(self) -> float:
        """1 件の到着を数え、それを残す確率を返す。"""
        now = self.clock()
        first, last, total = self._seen or (now, now, 0.0)
        before = total * math.exp(-max(0.0, now - last) / MEMORY_SECONDS)
        # ロックはいらない。同時に来た 1 件を数え損ねても、確率は重みに入るので偏らない
        self._seen = first, now, before + 1.0
        if before == 0:
            return 1.0
        seen = max(now - first, 1e-3)
        # 始まってすぐの過小評価を補正した、1 秒あたりの件数
        rate = before / (MEMORY_SECONDS * (1 - math.exp(-seen / MEMORY_SECONDS)))
        return min(1.0, self.target_per_minute / 60.0 / rate)
