"""8.4.5 アラートからの自動ロールバック。

アラートの原因がいつもリリースとは限らない。直近に昇格の記録があり、エイリアスがまだその版を指すときだけ
ロールバックを提案し、任されたときだけ実行する。同じ発報に対しては、何度呼んでも一度しか戻さない。

Databricks でもそのまま使う(``mlflow`` 本体が要る)。
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, Protocol

from ..delivery import Alert, AlertStatus
from .errors import CooldownError, KnownBadVersionError, NoHistoryError, UnknownVersionError
from .journal import Change, find_request
from .switch import AliasRollback

CLOCK_SKEW = timedelta(minutes=1)
"""評価するプロセスと昇格するプロセスの、時計のずれとして許す長さ。"""


class RollbackManager(Protocol):
    """``ModelRollbackManager`` と ``PromptRollbackManager`` の、ここで使う部分。"""

    def for_alias(self, alias: str | None = None) -> AliasRollback: ...


@dataclass(frozen=True, kw_only=True)
class RollbackDecision:
    """自動ロールバックの判断。"""

    outcome: Literal["applied", "suggested", "none"]
    reason: str
    change: Change | None = None


def auto_rollback(
    alert: Alert,
    manager: RollbackManager,
    *,
    mode: Literal["suggest", "apply"] = "suggest",
    alias: str | None = None,
    max_change_age: timedelta = timedelta(hours=24),
) -> RollbackDecision:
    """アラートの原因が直近の昇格らしいときだけ、ロールバックを提案する(または実行する)。

    昇格より前から続く発報と、昇格の後で誰かが動かしたエイリアスには、何もしない。
    同じ発報で何度呼んでも、実行は一度だけになる(``request_id``)。戻る先がない、間がないときは
    ``outcome="none"`` と理由を返す。

    Raises:
        ValueError: ``mode`` の書き誤り(提案だけで済んだと思い込まないように拒否する)。
        RollbackError: 同時の変更、または確認の失敗。
    """
    if mode not in ("suggest", "apply"):
        raise ValueError(f"mode must be 'suggest' or 'apply', got {mode!r}")
    if alert.status != AlertStatus.FIRING or alert.action != "rollback":
        return RollbackDecision(outcome="none", reason="the alert does not ask for a rollback")
    engine = manager.for_alias(alias)
    request_id = f"{alert.fingerprint[:16]}:{int(alert.starts_at.timestamp())}"
    history = engine.history()
    if before := find_request(history, request_id):
        return RollbackDecision(outcome="applied", reason="already rolled back", change=before)
    # prepared は、切り替えの途中で落ちた昇格。rollback() が先に片付ける
    last = next((c for c in reversed(history) if c.state in ("done", "prepared")), None)
    if last is None or last.action != "promote":
        return RollbackDecision(outcome="none", reason="the last recorded change is no promotion")
    now = engine.target.current()
    if reason := _unrelated(alert, last, engine, now, max_change_age):
        return RollbackDecision(outcome="none", reason=reason)
    try:
        change = engine.rollback(
            reason=f"alert {alert.name}",
            request_id=request_id,
            dry_run=mode != "apply",
            expected=now or "",
        )
    except (NoHistoryError, CooldownError, KnownBadVersionError) as refusal:
        return RollbackDecision(outcome="none", reason=str(refusal))
    age = engine.journal.clock() - last.at
    return RollbackDecision(
        outcome="applied" if mode == "apply" else "suggested",
        reason=f"{change.reason}; version {last.to_version} was promoted {age} ago",
        change=change,
    )


def _unrelated(
    alert: Alert, last: Change, engine: AliasRollback, now: str | None, max_age: timedelta
) -> str:
    """直近の昇格 ``last`` が、この発報の原因ではない理由。原因らしければ空。"""
    age = engine.journal.clock() - last.at
    if age > max_age:
        return f"the last promotion is {age} old"
    if now != last.to_version and (now or _exists(engine, last.to_version)):
        return f"the alias points at version {now}, no longer at the promoted {last.to_version}"
    if alert.starts_at < last.at - CLOCK_SKEW:
        # 昇格の前からの発報。いまの版は、それを直すために出したものかもしれない
        return "the alert fired before the last promotion"
    return ""


def _exists(engine: AliasRollback, version: str) -> bool:
    try:
        engine.target.check(version)
    except UnknownVersionError:  # 版を消すと、それを指すエイリアスも消える
        return False
    return True
