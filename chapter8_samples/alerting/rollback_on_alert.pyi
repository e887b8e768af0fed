"""8.4.5 アラートからの自動ロールバックと、サービング中のモデルの切り替え。"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, Protocol
from .alias_journal import Change
from .rollback import ModelRollbackManager, PromptRollbackManager
CLOCK_SKEW = timedelta(minutes=1)

class AlertLike(Protocol):
    """``auto_rollback`` が見る、アラートの項目(``Alert``)。"""

    @property
    def fingerprint(self) -> str:
        ...

    @property
    def name(self) -> str:
        ...

    @property
    def status(self) -> str:
        ...

    @property
    def action(self) -> str | None:
        ...

    @property
    def starts_at(self) -> datetime:
        ...

@dataclass(frozen=True, kw_only=True)
class RollbackDecision:
    """自動ロールバックの判断。"""
    outcome: Literal['applied', 'suggested', 'none']
    reason: str
    change: Change | None = None

def auto_rollback(alert: AlertLike, manager: ModelRollbackManager | PromptRollbackManager, *, mode: Literal['suggest', 'apply']='suggest', alias: str | None=None, max_change_age: timedelta=timedelta(hours=24)) -> RollbackDecision:
    """アラートの原因が直近の昇格らしいときだけ、ロールバックを提案する(または実行する)。

    昇格より前から続く発報では何もしない(直すための昇格を戻さない)。
    同じ発報で何度呼んでも、実行は一度だけになる(``request_id``)。戻る先がない、間がないときは
    ``outcome="none"`` と理由を返す。同時の変更と確認の失敗は、``RollbackError`` のまま上げる。

    Raises:
        ValueError: ``mode`` の書き誤り(提案だけで済んだと思い込まないように断る)。
        RollbackError: 同時の変更、または確認の失敗。
    """

def main() -> None:
    """悪いプロンプトを昇格した後のアラートから、提案し、実行する。"""
