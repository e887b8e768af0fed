"""8.4.5 昇格、ロールバック、取り消し: 確かめてから切り替え、使えなければ戻す。

順序は、前の変更の後始末、検査、記録(prepared)、付け替え、確認、記録(done)。検査の間に誰かが変えたら
記録で止まる。どこで落ちても、エイリアスは前か後の版を指し、次の変更か ``recover`` が記録を閉じる。

Databricks でもそのまま使う(``mlflow`` 本体が要る)。
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

from .errors import (
    ConcurrentChangeError,
    CooldownError,
    GateRefusedError,
    KnownBadVersionError,
    NoHistoryError,
    SameVersionError,
    UnknownVersionError,
    VerificationError,
)
from .journal import Change, Journal, done_changes, find_request, known_bad
from .targets import AliasTarget

logger = logging.getLogger(__name__)

Check = Callable[[str], object]
Pick = Callable[[list[Change]], tuple[str, str]]
"""記録から、切り替える先の版と、理由を決める関数。"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """変更のしかた。

    Attributes:
        expected: いまのバージョン(空は、エイリアスがない)。違えば ``ConcurrentChangeError``。
        dry_run: 検査だけして、何も変えない。
        force: 待ち時間と、退けたバージョンの拒否を無視する。
        request_id: 同じ ID の変更が済んでいれば、その記録を返すだけにする。
    """

    expected: str | int | None = None
    dry_run: bool = False
    force: bool = False
    request_id: str | None = None


class AliasRollback:
    """一つのエイリアスの、昇格、ロールバック、取り消し。モデルとプロンプトで同じ。

    Args:
        smoke_check: URI を受け取り、使えなければ例外を出す。切り替えの前(バージョン)と後
            (エイリアス)に呼ぶ。
        gate: 候補の URI を受け取り、いまの版より悪ければ、偽を返すか例外を出す(8.3 の
            ``compare_releases`` の結果を返せる)。昇格の前にだけ呼び、最初の版では呼ばない。
        cooldown_seconds: 前のロールバックから、次のロールバックまでの最短の秒数。
        journal: ``Journal`` の引数(``settle_seconds`` など)。
    """

    def __init__(
        self,
        target: AliasTarget,
        *,
        smoke_check: Check | None = None,
        gate: Check | None = None,
        cooldown_seconds: float = 600.0,
        **journal: Any,
    ) -> None:
        self.target = target
        self.smoke_check = smoke_check
        self.gate = gate
        self.cooldown = timedelta(seconds=cooldown_seconds)
        self.journal = Journal(target, **journal)

    def history(self) -> list[Change]:
        """残っている記録を、古い順に。"""
        return self.journal.history()

    def promote(self, version: str | int, reason: str = "", **options: Any) -> Change:
        """新しいバージョンに切り替える。``gate`` が認めなければ ``GateRefusedError``。"""
        return self._change("promote", lambda _: (str(version), reason), Options(**options))

    def rollback(
        self, target_version: str | int | None = None, reason: str = "", **options: Any
    ) -> Change:
        """戻す。省略すると、記録にある一つ前の、退けられていないバージョンへ戻る。

        一つ前が消されていたら、その前の版へ戻る。飛ばした版は ``reason`` の始めに残る。
        """

        def pick(history: list[Change]) -> tuple[str, str]:
            if target_version is not None:
                return str(target_version), reason
            version, skipped = self._previous(history)
            return version, "; ".join(filter(None, [*skipped, reason]))

        return self._change("rollback", pick, Options(**options))

    def undo(self, reason: str = "", **options: Any) -> Change:
        """直前のロールバックを取り消す。プロセスを再起動した後でもできる。"""
        wanted = replace(Options(**options), force=True)
        return self._change("undo", lambda history: (self._undone(history), reason), wanted)

    def recover(self) -> Change | None:
        """途中で落ちた変更があれば、結果を確かめて記録を閉じる。なければ ``None``。"""
        return self._recover(self.history())

    def _recover(self, history: list[Change]) -> Change | None:
        change = self.journal.interrupted(history)
        if change is None:
            return None
        logger.warning("recovering %s %s of %s", change.action, change.id, self.target.uri())
        with self.journal.claimed(change, history) as change:
            if self.target.current() == change.from_version:
                return self.journal.close(change, "aborted")
            try:
                self._verify(change)
            except Exception:  # 切り替え後の確認が済んでいなかった: 使えないなら戻す
                logger.exception("recovered %s does not work", self.target.uri())
                return self._put_back(change)
            return self.journal.close(change, "done")

    def _previous(self, history: list[Change]) -> tuple[str, list[str]]:
        """(戻る先, 飛ばした版の理由)。いまの版より前に使った版を、新しいものから確かめる。"""
        current = self.target.current()
        done = done_changes(history)
        live = current
        if current is None and done:  # 版を消すと、それを指すエイリアスも消える
            live = done[-1].to_version
        while done and done[-1].to_version != live:
            done.pop()
        refused = {live, *known_bad(history)}
        skipped: list[str] = []
        used = [v for c in reversed(done) for v in (c.to_version, c.from_version)]
        for version in used:
            if version is None or version in refused:
                continue
            refused.add(version)
            try:
                self.target.check(version)
                return version, skipped
            except UnknownVersionError as error:
                skipped.append(f"skipped {version}: {error}")
        now = "; ".join([f"now version {current}", *skipped])
        raise NoHistoryError(
            f"no recorded predecessor for {self.target.uri()} ({now}); pass target_version"
        )

    def _undone(self, history: list[Change]) -> str:
        """直前のロールバックの前のバージョン。"""
        last = done_changes(history)[-1:]
        if not last or last[0].action != "rollback" or last[0].from_version is None:
            raise NoHistoryError(f"no rollback to undo for {self.target.uri()}")
        if self.target.current() != last[0].to_version:
            raise ConcurrentChangeError(
                f"{self.target.uri()} was moved after rollback {last[0].id}; use promote()"
            )
        return last[0].from_version

    def _change(self, action: str, pick: Pick, options: Options) -> Change:
        history = self.history()
        if not options.dry_run and (closed := self._recover(history)):
            history[-1] = closed  # 読み直すと、ほかの誰かが始めた変更が混ざりうる
        if done := find_request(history, options.request_id):
            return done
        change = self._plan(action, pick, options, history)
        if options.dry_run:
            return change
        with self.journal.claimed(change, history) as change:
            return self._switch(change)

    def _plan(self, action: str, pick: Pick, options: Options, history: list[Change]) -> Change:
        current, uri = self.target.current(), self.target.uri()
        if options.expected is not None and (current or "") != str(options.expected):
            raise ConcurrentChangeError(
                f"expected {uri} at version {options.expected or None}, found {current}"
            )
        version, reason = pick(history)
        self.target.check(version)
        if version == current:
            raise SameVersionError(f"{uri} already points at version {version}")
        if not options.force:
            self._refuse(action, version, history)
        self._smoke(version)
        if action == "promote" and current is not None:
            self._ask_gate(self.target.uri(version))
        return Change(
            id=uuid.uuid4().hex[:8],
            seq=history[-1].seq + 1 if history else 1,
            action=action,
            at=self.journal.clock(),
            by=self.journal.actor,
            from_version=current,
            to_version=version,
            reason=reason,
            request_id=options.request_id,
            state="dry-run",
        )

    def _refuse(self, action: str, version: str, history: list[Change]) -> None:
        if version in known_bad(history):
            raise KnownBadVersionError(
                f"version {version} was rolled back before; pass force=True to use it anyway"
            )
        rollbacks = [c for c in done_changes(history) if c.action == "rollback"]
        if action == "rollback" and rollbacks:
            waited = self.journal.clock() - rollbacks[-1].at
            if abs(waited) < self.cooldown:  # 記録のほうが先なら、そのときの時計が狂っていた
                raise CooldownError(
                    f"last rollback {waited.total_seconds():.0f} s ago, cooldown is "
                    f"{self.cooldown.total_seconds():.0f} s; pass force=True to override"
                )

    def _smoke(self, version: str) -> None:
        try:
            if self.smoke_check:
                self.smoke_check(self.target.uri(version))
        except Exception as error:
            problem = f"version {version} failed the smoke check before the switch: {error}"
            raise VerificationError(problem, restored=True) from error

    def _ask_gate(self, candidate: str) -> None:
        try:
            answer = self.gate(candidate) if self.gate else None
        except Exception as error:
            raise GateRefusedError(f"the gate refused {candidate}: {error}") from error
        if answer is not None and not answer:
            raise GateRefusedError(f"the gate refused {candidate}: {answer}")

    def _switch(self, change: Change) -> Change:
        if (now := self.target.current()) != change.from_version:
            self.journal.close(change, "superseded")
            raise ConcurrentChangeError(
                f"expected {self.target.uri()} at version {change.from_version}, found {now}"
            )
        self.target.point(change.to_version)
        try:
            self._verify(change)
        except Exception as error:  # 何であれ、確認できないものを本番に残さない
            restored = self._restored(change)
            note = f"{'restored' if restored else 'NOT restored'} version {change.from_version}"
            problem = f"version {change.to_version} failed after the switch ({note}): {error}"
            raise VerificationError(problem, restored=restored) from error
        return self.journal.close(change, "done")

    def _verify(self, change: Change) -> None:
        if self.smoke_check:
            self.smoke_check(self.target.uri())
        if (now := self.target.current()) != change.to_version:  # 長い確認の間に、動かされた
            raise ConcurrentChangeError(f"{self.target.uri()} points at version {now}")

    def _restored(self, change: Change) -> bool:
        try:
            return self._put_back(change).state == "restored"
        except Exception:  # サーバーが落ちている: 記録は prepared のまま残り、recover() が閉じる
            logger.exception("could not restore %s", self.target.uri())
            return False

    def _put_back(self, change: Change) -> Change:
        """元のバージョンに戻し、記録を閉じる。ほかの誰かが動かした後なら、触らない。"""
        try:
            moved = self.target.current() != change.to_version
        except Exception:  # 読めないなら、付け替えた本人として戻しにいく
            moved = False
        if moved:
            return self.journal.close(change, "superseded")
        try:
            if change.from_version is not None:
                self.target.check(change.from_version)
            self.target.point(change.from_version)
        except UnknownVersionError as error:  # 戻る先が消された: 次の変更(別の版へ)を塞がない
            logger.error("%s stays as it is: %s", self.target.uri(), error)
            return self.journal.close(change, "done")
        return self.journal.close(change, "restored")
