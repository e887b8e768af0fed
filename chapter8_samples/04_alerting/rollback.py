"""8.4.5 ロールバック(リスト8.13)。

エイリアスの付け替えは 1 行で書けるが、本番では「戻る先は正しいか」「同時に誰かが動かしていないか」
「途中で落ちたら」「やはり取り消したい」に答える必要がある。答えはレジストリのタグの記録にある。

実行::

    $ python chapter8_samples/04_alerting/rollback.py
    昇格: None -> 1 (done)
    昇格: 1 -> 2 (done)
    戻す: 2 -> 1 (done)
    再起動後に取り消す: 1 -> 2 (done)
    二度目の取り消し: NoHistoryError
    壊れた版: VerificationError
    いまの production: 版 2

Databricks では、名前を ``カタログ.スキーマ.名前`` にするだけでよい(``mlflow`` 本体が要る)。
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

from chapter8_samples.alerting.releases import (
    AliasTarget,
    Change,
    ConcurrentChangeError,
    CooldownError,
    GateRefusedError,
    Journal,
    KnownBadVersionError,
    ModelAlias,
    NoHistoryError,
    Options,
    PromptAlias,
    RollbackError,
    SameVersionError,
    VerificationError,
    done_changes,
    find_request,
    known_bad,
)

logger = logging.getLogger(__name__)

SmokeCheck = Callable[[str], object]
"""URI を受け取り、使えなければ例外を出す関数。切り替えの前(バージョン)と後(エイリアス)に呼ぶ。"""

Gate = Callable[[str], object]
"""昇格する候補の URI を受け取り、いまの版より悪ければ、偽を返すか例外を出す関数
(8.3 の ``compare_releases`` の結果をそのまま返せる)。"""

Pick = Callable[[list[Change]], tuple[str, str | None]]
"""記録から、(切り替える先, 取り消す変更の ID) を選ぶ関数。"""


class AliasRollback:
    """一つのエイリアスの、昇格、ロールバック、取り消し。モデルとプロンプトで同じ。

    Args:
        gate: 昇格の前にだけ呼ぶ。最初の版と、戻すとき、取り消すときは呼ばない。
        cooldown_seconds: 前のロールバックから、次のロールバックまでの最短の秒数。
        journal: ``Journal`` の引数(``settle_seconds`` など)。
    """

    def __init__(
        self,
        target: AliasTarget,
        *,
        smoke_check: SmokeCheck | None = None,
        gate: Gate | None = None,
        cooldown_seconds: float = 600.0,
        **journal: Any,
    ) -> None:
        self.target, self.smoke_check, self.gate = target, smoke_check, gate
        self.cooldown = timedelta(seconds=cooldown_seconds)
        self.journal = Journal(target, **journal)

    def history(self) -> list[Change]:
        """残っている記録を、古い順に。"""
        return self.journal.history()

    def promote(self, version: str | int, reason: str = "", **options: Any) -> Change:
        """新しいバージョンに切り替える。``gate`` が認めなければ ``GateRefusedError``。"""
        wanted = Options(**options)
        if self.gate and not find_request(self.history(), wanted.request_id):
            wanted = replace(wanted, expected=self._ask_gate(self.gate, str(version), wanted))
        return self._change("promote", lambda _: (str(version), None), reason, wanted)

    def rollback(
        self, target_version: str | int | None = None, reason: str = "", **options: Any
    ) -> Change:
        """戻す。省略すると、記録にある一つ前の、退けられていないバージョンへ戻る。"""

        def pick(history: list[Change]) -> tuple[str, str | None]:
            wanted = self.previous(history) if target_version is None else target_version
            return str(wanted), None

        return self._change("rollback", pick, reason, Options(**options))

    def undo(self, reason: str = "", **options: Any) -> Change:
        """最後のロールバックを取り消す。プロセスを再起動した後でもできる。"""
        options["force"] = True
        return self._change("undo", self._to_undo, reason, Options(**options))

    def previous(self, history: list[Change] | None = None) -> str:
        """いまのバージョンの一つ前。なければ ``NoHistoryError``。"""
        history = self.history() if history is None else history
        current, bad = self.target.current(), known_bad(history)
        for change in reversed(done_changes(history)):
            before = change.from_version
            if change.to_version == current and before and before not in bad:
                return before
        raise NoHistoryError(
            f"no recorded predecessor for {self.target.uri()} (now version {current}); "
            "pass target_version"
        )

    def recover(self) -> Change | None:
        """途中で落ちた変更があれば、結果を確かめて記録を閉じる。なければ ``None``。"""
        with self.journal.locked():
            return self._recover(self.history())

    def _to_undo(self, history: list[Change]) -> tuple[str, str | None]:
        undone = {change.undoes for change in done_changes(history)}
        last = [c for c in done_changes(history) if c.action == "rollback" and c.id not in undone]
        if not last or last[-1].from_version is None:
            raise NoHistoryError(f"no rollback to undo for {self.target.uri()}")
        if self.target.current() != last[-1].to_version:
            raise ConcurrentChangeError(
                f"{self.target.uri()} was moved after rollback {last[-1].id}; use promote()"
            )
        return last[-1].from_version, last[-1].id

    def _ask_gate(self, gate: Gate, version: str, options: Options) -> str | int | None:
        """検査し、比べたバージョンを返す(検査の間に変わったら、切り替えない)。"""
        self.target.check(version)
        current = self.target.current()
        if current in (None, version):
            return options.expected  # 比べる相手がない
        candidate = self.target.uri(version)
        try:
            answer = gate(candidate)
        except Exception as error:
            raise GateRefusedError(f"the gate refused {candidate}: {error}") from error
        if answer is not None and not answer:
            raise GateRefusedError(f"the gate refused {candidate}: {answer}")
        return current if options.expected is None else options.expected

    def _change(self, action: str, pick: Pick, reason: str, options: Options) -> Change:
        if options.dry_run:
            return self._plan(action, pick, reason, options, self.history())
        with self.journal.locked() as still_mine:
            self._recover(self.history())
            history = self.history()
            if done := find_request(history, options.request_id):
                return done
            change = self._plan(action, pick, reason, options, history)
            change = self.journal.write(replace(change, state="prepared"))
            still_mine()
            return self._switch(change)

    def _plan(
        self, action: str, pick: Pick, reason: str, options: Options, history: list[Change]
    ) -> Change:
        current = self.target.current()
        if options.expected is not None and current != str(options.expected):
            raise ConcurrentChangeError(
                f"expected {self.target.uri()} at version {options.expected}, found {current}"
            )
        version, undoes = pick(history)
        self.target.check(version)
        if version == current:
            raise SameVersionError(f"{self.target.uri()} already points at version {version}")
        if not options.force:
            self._refuse(action, version, history)
        self._smoke(version)
        return self.journal.next(
            history,
            action=action,
            to_version=version,
            from_version=current,
            reason=reason,
            state="dry-run",
            request_id=options.request_id,
            undoes=undoes,
        )

    def _refuse(self, action: str, version: str, history: list[Change]) -> None:
        if version in known_bad(history):
            raise KnownBadVersionError(
                f"version {version} was rolled back before; pass force=True to use it anyway"
            )
        rollbacks = [c for c in done_changes(history) if c.action == "rollback"]
        if action == "rollback" and rollbacks:
            waited = self.journal.clock() - rollbacks[-1].at
            if waited < self.cooldown:
                raise CooldownError(
                    f"last rollback {waited.total_seconds():.0f} s ago, cooldown is "
                    f"{self.cooldown.total_seconds():.0f} s; pass force=True to override"
                )

    def _switch(self, change: Change) -> Change:
        self.target.point(change.to_version)
        try:
            self._verify(change)
        except Exception as error:  # 何であれ、確認できないものを本番に残さない
            restored = self._restore(change)
            raise VerificationError(
                f"version {change.to_version} failed after the switch "
                f"({'restored' if restored else 'NOT restored'} "
                f"version {change.from_version}): {error}",
                restored=restored,
            ) from error
        return self.journal.write(replace(change, state="done", verified=True))

    def _verify(self, change: Change) -> None:
        if (now := self.target.current()) != change.to_version:
            raise ConcurrentChangeError(f"{self.target.uri()} points at version {now}")
        if self.smoke_check:
            self.smoke_check(self.target.uri())

    def _restore(self, change: Change) -> bool:
        moved = self._moved_by_someone_else(change)
        try:
            if not moved:
                self.target.point(change.from_version)
            self.journal.write(replace(change, state="superseded" if moved else "restored"))
        except Exception:  # サーバーが落ちている: 記録は prepared のまま残り、recover() が閉じる
            logger.exception("could not restore %s", self.target.uri())
            return False
        return not moved

    def _moved_by_someone_else(self, change: Change) -> bool:
        try:
            return self.target.current() != change.to_version
        except Exception:  # 読めないなら、付け替えた本人として戻しにいく
            return False

    def _smoke(self, version: str) -> None:
        if self.smoke_check is None:
            return
        try:
            self.smoke_check(self.target.uri(version))
        except Exception as error:
            raise VerificationError(
                f"version {version} failed the smoke check before the switch: {error}",
                restored=True,
            ) from error

    def _recover(self, history: list[Change]) -> Change | None:
        if not history or history[-1].state != "prepared":
            return None
        change, current = history[-1], self.target.current()
        logger.warning("recovering %s %s of %s", change.action, change.id, self.target.uri())
        if current != change.to_version:
            state = "aborted" if current == change.from_version else "superseded"
            return self.journal.write(replace(change, state=state))
        try:
            self._verify(change)
        except Exception:  # 切り替え後の確認が済んでいなかった: 使えないなら戻す
            logger.exception("recovered %s does not work", self.target.uri())
            self.target.point(change.from_version)
            return self.journal.write(replace(change, state="restored"))
        return self.journal.write(replace(change, state="done", verified=bool(self.smoke_check)))


class _Manager:
    """本の API。エイリアスごとに ``AliasRollback`` を用意する。"""

    default_alias: str

    def __init__(self, target: Callable[[str], AliasTarget], **options: Any) -> None:
        self._target, self._options = target, options

    def for_alias(self, alias: str | None = None) -> AliasRollback:
        """一つのエイリアスの操作。"""
        return AliasRollback(self._target(alias or self.default_alias), **self._options)

    def promote(
        self, version: str | int, alias: str | None = None, reason: str = "", **options: Any
    ) -> Change:
        """``alias`` を新しいバージョンに切り替える。"""
        return self.for_alias(alias).promote(version, reason, **options)

    def rollback(
        self,
        target_version: str | int | None = None,
        alias: str | None = None,
        reason: str | None = None,
        **options: Any,
    ) -> Change:
        """``alias`` を前の(または指定の)バージョンへ戻す。

        Raises:
            RollbackError: 断る理由ごとの子クラス(``alerting/releases/journal.py``)。
        """
        return self.for_alias(alias).rollback(target_version, reason or "", **options)

    def undo_rollback(self, alias: str | None = None, reason: str = "", **options: Any) -> Change:
        """最後のロールバックを取り消す。二度目は ``NoHistoryError``。"""
        return self.for_alias(alias).undo(reason, **options)

    def recover(self, alias: str | None = None) -> Change | None:
        """途中で落ちた変更を片付ける。"""
        return self.for_alias(alias).recover()

    def get_rollback_history(self, alias: str | None = None) -> list[Change]:
        """変更の記録(古い順、直近 8 件)。"""
        return self.for_alias(alias).history()

    def current_version(self, alias: str | None = None) -> str | None:
        """エイリアスの指すバージョン。なければ ``None``。"""
        return self.for_alias(alias).target.current()


class ModelRollbackManager(_Manager):
    """登録済みモデルのロールバック。mlflow 本体が要る(mlflow-tracing だけでは動かない)。

    ``options`` は ``AliasRollback`` の引数(``smoke_check``、``cooldown_seconds`` など)。
    """

    default_alias = "champion"

    def __init__(self, model_name: str, client: Any = None, **options: Any) -> None:
        self.model_name, self.client = model_name, client or _client()
        super().__init__(lambda alias: ModelAlias(self.client, model_name, alias), **options)

    def get_model_versions(self) -> list[Any]:
        """登録済みのバージョン(新しい順)。"""
        found = self.client.search_model_versions(f"name = '{self.model_name}'")
        return sorted(found, key=lambda version: -int(version.version))

    def get_alias_info(self, alias: str = "champion") -> Any:
        """エイリアスの指すバージョン(MLflow の ``ModelVersion``)。なければ ``None``。"""
        version = self.current_version(alias)
        return version and self.client.get_model_version(self.model_name, version)

    def list_aliases(self) -> dict[str, str]:
        """エイリアス -> バージョン。"""
        aliases = self.client.get_registered_model(self.model_name).aliases
        return {alias: str(version) for alias, version in aliases.items()}


class PromptRollbackManager(_Manager):
    """プロンプトのロールバック。mlflow 本体が要る(mlflow-tracing だけでは動かない)。"""

    default_alias = "production"

    def __init__(self, prompt_name: str, client: Any = None, **options: Any) -> None:
        self.prompt_name, self.client = prompt_name, client or _client()
        super().__init__(lambda alias: PromptAlias(self.client, prompt_name, alias), **options)


def _client() -> Any:
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise RollbackError(
            "rollback needs the registry client, which mlflow-tracing does not have; "
            "pip install 'mlflow>=3'"
        ) from error
    return MlflowClient()


def quick_rollback(
    model_name: str,
    target_version: str | int | None = None,
    alias: str = "champion",
    reason: str = "",
    **options: Any,
) -> Change:
    """一行で戻す。``options`` は ``Options`` の項目。"""
    return ModelRollbackManager(model_name).rollback(target_version, alias, reason, **options)


def get_champion_version(model_name: str) -> str | None:
    """``champion`` の指すバージョン。"""
    return ModelRollbackManager(model_name).current_version("champion")


def main() -> None:
    """プロンプトを昇格し、戻し、プロセスを替えて取り消す。壊れた版は自動で元に戻る。"""
    import mlflow.genai

    from chapter8_samples import _lab

    def answers(uri: str) -> None:
        if "壊れた" in str(mlflow.genai.load_prompt(uri, cache_ttl_seconds=0).template):
            raise ValueError("the prompt does not answer")

    def show(title: str, change: Change) -> None:
        print(f"{title}: {change.from_version} -> {change.to_version} ({change.state})")

    with _lab.sample(fresh_store=True):
        for text in ("版 1 {{q}}", "版 2 {{q}}", "版 3 壊れた {{q}}"):
            mlflow.genai.register_prompt("support-answer", text)
        manager = PromptRollbackManager("support-answer", smoke_check=answers)
        show("昇格", manager.promote(1, reason="初版"))
        show("昇格", manager.promote(2, reason="新しい言い回し"))
        show("戻す", manager.rollback(reason="品質低下"))
        restarted = PromptRollbackManager("support-answer", smoke_check=answers)
        show("再起動後に取り消す", restarted.undo_rollback(reason="誤報だった"))
        for title, call in {
            "二度目の取り消し": restarted.undo_rollback,
            "壊れた版": lambda: restarted.promote(3),
        }.items():
            try:
                call()
            except RollbackError as error:
                print(f"{title}: {type(error).__name__}")
        print("いまの production: 版", restarted.current_version())


if __name__ == "__main__":
    main()
