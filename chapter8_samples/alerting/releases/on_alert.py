"""8.4.5 アラートからの自動ロールバック。

アラートの原因がいつもリリースとは限らない。直近に昇格の記録があるときだけロールバックを提案し、任された
ときだけ実行する。同じ発報に対しては、何度呼んでも一度しか戻さない。

Databricks でもそのまま使う(``mlflow`` 本体が要る)。
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol

from .journal import Change, CooldownError, Journal, KnownBadVersionError, NoHistoryError

CLOCK_SKEW = timedelta(minutes=1)
"""評価するプロセスと昇格するプロセスの、時計のずれとして許す長さ。"""


class AlertLike(Protocol):
    """``auto_rollback`` が見る、アラートの項目(``Alert``)。"""

    @property
    def fingerprint(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def action(self) -> str | None: ...
    @property
    def starts_at(self) -> datetime: ...


class AliasHistory(Protocol):
    """一つのエイリアスの記録とロールバック(``AliasRollback``)。"""

    @property
    def journal(self) -> Journal: ...
    def history(self) -> list[Change]: ...
    def rollback(
        self, target_version: str | int | None = None, reason: str = "", **options: Any
    ) -> Change: ...


class RollbackManager(Protocol):
    """``ModelRollbackManager`` と ``PromptRollbackManager`` の、ここで使う部分。"""

    def for_alias(self, alias: str | None = None) -> AliasHistory: ...


@dataclass(frozen=True, kw_only=True)
class RollbackDecision:
    """自動ロールバックの判断。"""

    outcome: Literal["applied", "suggested", "none"]
    reason: str
    change: Change | None = None


def auto_rollback(
    alert: AlertLike,
    manager: RollbackManager,
    *,
    mode: Literal["suggest", "apply"] = "suggest",
    alias: str | None = None,
    max_change_age: timedelta = timedelta(hours=24),
) -> RollbackDecision:
    """アラートの原因が直近の昇格らしいときだけ、ロールバックを提案する(または実行する)。

    昇格より前から続く発報では何もしない(直すための昇格を戻さない)。
    同じ発報で何度呼んでも、実行は一度だけになる(``request_id``)。戻る先がない、間がないときは
    ``outcome="none"`` と理由を返す。同時の変更と確認の失敗は、``RollbackError`` のまま上げる。

    Raises:
        ValueError: ``mode`` の書き誤り(提案だけで済んだと思い込まないように断る)。
        RollbackError: 同時の変更、または確認の失敗。
    """
    if mode not in ("suggest", "apply"):
        raise ValueError(f"mode must be 'suggest' or 'apply', got {mode!r}")
    if alert.status != "firing" or alert.action != "rollback":
        return RollbackDecision(outcome="none", reason="the alert does not ask for a rollback")
    engine = manager.for_alias(alias)
    request_id = f"{alert.fingerprint[:16]}:{int(alert.starts_at.timestamp())}"
    done = [change for change in engine.history() if change.state == "done"]
    if before := [change for change in done if change.request_id == request_id]:
        return RollbackDecision(outcome="applied", reason="already rolled back", change=before[-1])
    last = done[-1:]
    if not last or last[0].action != "promote":
        return RollbackDecision(outcome="none", reason="the last recorded change is no promotion")
    age = engine.journal.clock() - last[0].at
    if age > max_change_age:
        return RollbackDecision(outcome="none", reason=f"the last promotion is {age} old")
    if alert.starts_at < last[0].at - CLOCK_SKEW:
        # 昇格の前からの発報。いまの版は、それを直すために出したものかもしれない
        return RollbackDecision(outcome="none", reason="the alert fired before the last promotion")
    dry_run = mode != "apply"
    reason = f"alert {alert.name}"
    try:
        change = engine.rollback(reason=reason, request_id=request_id, dry_run=dry_run)
    except (NoHistoryError, CooldownError, KnownBadVersionError) as refusal:
        return RollbackDecision(outcome="none", reason=str(refusal))
    return RollbackDecision(
        outcome="suggested" if dry_run else "applied",
        reason=f"{reason}; version {last[0].to_version} was promoted {age} ago",
        change=change,
    )
