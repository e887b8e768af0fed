"""8.4.1 一つのアラートの状態と、まだ届いていない通知。"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime

from ..delivery import Alert

Phase = Literal["inactive", "pending", "firing"]


@dataclass
class RuleState:
    """一つのルール(``by`` のあるルールでは、ラベルの値の一つ)の状態。日時は UTC。"""

    rule: str = ""
    label: str = ""
    phase: Phase = "inactive"
    since: AwareDatetime | None = None
    """今の phase になった時刻。"""
    last_true: AwareDatetime | None = None
    value: float | None = None
    n: int | None = None
    notified_at: AwareDatetime | None = None
    """発報を最後に知らせた時刻。"""
    failing: dict[str, AwareDatetime] = field(default_factory=dict[str, AwareDatetime])
    """評価に失敗しているルール -> 失敗し始めた時刻(失敗を知らせるアラートだけが使う)。"""
    told: Alert | None = None
    """知らせた発報。設定から消えても、同じ相手に解消を知らせられるように残す。"""

    def advance(
        self, breached: bool | None, at: datetime, hold: timedelta, keep: timedelta
    ) -> None:
        """判定を一つ受け取って進む。``None``(標本なし)では何も変わらない。

        時計が戻ったら、未来になった記録を ``at`` に直す(でないと、追いつくまで発報も解消もない)。

        Args:
            hold: pending でいる期間(``for``)。
            keep: 戻ってから解消までの期間(``keep_firing_for``)。
        """
        for key in ("since", "last_true", "notified_at"):
            noted = getattr(self, key)
            if noted and noted > at:
                setattr(self, key, at)
        if breached:
            self.last_true = at
            if self.phase == "inactive":
                self.phase, self.since = "pending", at
            if self.phase == "pending" and at - (self.since or at) >= hold:
                self.phase, self.since = "firing", at
        elif breached is False:
            calm = at - (self.last_true or at) >= keep
            if self.phase == "pending" or (self.phase == "firing" and calm):
                self.phase, self.since = "inactive", at


@dataclass(frozen=True)
class Unsent:
    """まだ届いていない通知。"""

    alert: Alert
    only: tuple[str, ...] | None = None
    """まだ受け取っていない通知先。``None`` は、まだ誰にも送っていない。"""
