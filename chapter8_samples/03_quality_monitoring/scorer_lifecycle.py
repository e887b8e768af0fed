"""8.3.4 スコアラーの状態を変える: 一覧、割合の変更、休止、再開、削除(リスト8.12)。

OSS の MLflow では、割合だけを更新するとフィルターが黙って消え、停止すると割合も消える。
Databricks とは戻り値も違う。その違いを吸収し、休止しても割合とフィルターを覚えておく。

実行::

    $ python chapter8_samples/03_quality_monitoring/scorer_lifecycle.py
    操作        状態          割合  採点するトレース
    ----------  ------------  ----  ----------------
    登録前      UNREGISTERED
    登録・開始  STARTED        50%  status = 'OK'
    割合を変更  STARTED        20%  status = 'OK'
    休止        STOPPED         0%  status = 'OK'
    再開        STARTED        20%  status = 'OK'
    削除        UNREGISTERED
    再開後の一覧: safety_check 版 1、採点は client(run_scoring_cycle を呼ぶ側)
    推奨の割合で月 100 万件を採点するコスト: 約 874 USD

Databricks でも同じ関数を使う。割合とフィルターは毎回両方を渡すので、どちらでも結果は同じになる。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import delete_scorer, list_scorers

from chapter8_samples.quality_monitoring.scoring.judges import ScorerSetupError
from chapter8_samples.quality_monitoring.scoring.plan import ScorerPlan, check_sample_rate
from chapter8_samples.quality_monitoring.scoring.registry import (
    KeptSetting,
    ScorerNotFoundError,
    ScorerStatus,
    apply_setting,
    check_filter,
    estimate_monthly_judge_cost,
    existing_experiment_id,
    find_status,
    keep_setting,
    kept_setting,
    setup_scorers,
    status_of,
)

RECOMMENDED_SAMPLE_RATES = {
    "safety": 1.0,
    "relevance": 0.5,
    "groundedness": 0.5,
    "guidelines": 0.5,
    "complex_custom": 0.1,
}
"""本書の推奨。見逃せないものは全件、傾向が分かればよいものは一部、高価なものは少なく。"""


def list_scorer_statuses(experiment_name: str) -> list[ScorerStatus]:
    """登録済みのスコアラー(最新版)と、誰が何割を採点しているか。休止中の割合は 0.0。

    別のプロセスから ``run_scoring_cycle()`` に渡せる。OSS 版では、コードのスコアラーは
    登録されないので含まれない。
    """
    experiment_id = existing_experiment_id(experiment_name)
    try:
        scorers = list_scorers(experiment_id=experiment_id)
    except MlflowException as error:
        raise ScorerSetupError(
            f"cannot list the scorers of {experiment_name!r}: {error.message}; if a code scorer "
            "is registered, set MLFLOW_SERVER_ENABLE_CUSTOM_SCORERS=true here or delete it"
        ) from error
    return [status_of(experiment_id, scorer) for scorer in scorers]


def get_scorer_status(experiment_name: str, name: str) -> ScorerStatus:
    """スコアラー 1 つの状態。なければ ``ScorerNotFoundError``。"""
    status = find_status(existing_experiment_id(experiment_name), name)
    if status is None:
        raise ScorerNotFoundError(f"no scorer {name!r} is registered in {experiment_name!r}")
    return status


def change_sample_rate(
    experiment_name: str,
    name: str,
    sample_rate: float,
    *,
    filter_string: str | Literal["keep"] | None = "keep",
) -> ScorerStatus:
    """割合を変える。フィルターは、渡さなければそのまま残り、``None`` を渡すとなくなる。

    休止中なら、再開後の割合になる。
    """
    check_sample_rate(name, sample_rate)
    status = get_scorer_status(experiment_name, name)
    new_filter = status.filter_string if filter_string == "keep" else filter_string
    return _apply(status, experiment_name, sample_rate, new_filter, status.sample_rate == 0)


def pause_scorer(experiment_name: str, name: str) -> ScorerStatus:
    """採点を休止する。登録、割合、フィルターは残る。"""
    status = get_scorer_status(experiment_name, name)
    if status.sample_rate == 0:
        return status
    return _apply(status, experiment_name, status.sample_rate, status.filter_string, True)


def resume_scorer(experiment_name: str, name: str) -> ScorerStatus:
    """休止した採点を、休止前の割合とフィルターで再開する。"""
    status = get_scorer_status(experiment_name, name)
    experiment_id = existing_experiment_id(experiment_name)
    kept = kept_setting(experiment_id, name)
    if status.sample_rate > 0:
        if kept and kept.paused:  # 前に、再開はできたが、休止の記録を消せなかった
            keep_setting(experiment_id, name, None)
        return status
    if kept is None:
        raise ScorerSetupError(
            f"{name!r} has no remembered sample rate: call change_sample_rate() first"
        )
    return _apply(status, experiment_name, kept.sample_rate, kept.filter_string, False)


def _apply(
    status: ScorerStatus, experiment_name: str, rate: float, where: str | None, paused: bool
) -> ScorerStatus:
    """変えてから、保存先から読み直す。"""
    experiment_id = existing_experiment_id(experiment_name)
    try:
        check_filter(experiment_id, where)
        apply_setting(experiment_id, status.scorer, KeptSetting(rate, where, paused))
    except MlflowException as error:
        raise ScorerSetupError(f"cannot change {status.name!r}: {error.message}") from error
    return get_scorer_status(experiment_name, status.name)


def stop_all_scorers(experiment_name: str) -> list[ScorerStatus]:
    """すべてのスコアラーを休止する。"""
    return [pause_scorer(experiment_name, s.name) for s in list_scorer_statuses(experiment_name)]


def remove_scorer(experiment_name: str, name: str) -> None:
    """スコアラーを、すべての版について削除する。トレースに残る評価は消えない。"""
    get_scorer_status(experiment_name, name)
    experiment_id = existing_experiment_id(experiment_name)
    keep_setting(experiment_id, name, None)  # 先に消す。後だと、失敗したときやり直せない
    # 版を省くと、Databricks では全版、OSS 版ではエラーになる
    delete_scorer(name=name, experiment_id=experiment_id, version="all")


def delete_all_scorers(experiment_name: str, confirm: bool = False) -> list[str]:
    """すべてのスコアラーを削除し、名前を返す。``confirm=True`` がなければ、消さずに例外にする。"""
    if not confirm:
        raise ScorerSetupError("delete_all_scorers() needs confirm=True")
    names = [status.name for status in list_scorer_statuses(experiment_name)]
    for name in names:
        remove_scorer(experiment_name, name)
    return names


class LifecycleStep(NamedTuple):
    """操作を 1 つ終えたあとの、保存先から読み直した状態。"""

    operation: str
    state: Literal["UNREGISTERED", "STARTED", "STOPPED"] = "UNREGISTERED"
    sample_rate: float = 0.0
    filter_string: str | None = None


def demonstrate_scorer_lifecycle(experiment_name: str, plan: ScorerPlan) -> Iterator[LifecycleStep]:
    """登録から削除までを行い、操作のたびに保存先から読み直した状態を返す。"""
    name = plan.scorer.name
    operations: dict[str, Callable[[], object]] = {
        "登録前": lambda: None,
        "登録・開始": lambda: setup_scorers(experiment_name, [plan]),
        "割合を変更": lambda: change_sample_rate(experiment_name, name, 0.2),
        "休止": lambda: pause_scorer(experiment_name, name),
        "再開": lambda: resume_scorer(experiment_name, name),
        "削除": lambda: remove_scorer(experiment_name, name),
    }
    for operation, do in operations.items():
        do()
        try:
            status = get_scorer_status(experiment_name, name)
        except ScorerNotFoundError:
            yield LifecycleStep(operation)
            continue
        state = "STARTED" if status.sample_rate else "STOPPED"
        yield LifecycleStep(operation, state, status.sample_rate, status.filter_string)


def main() -> None:
    """登録から削除までを、操作のたびに読み直して表にする。"""
    from mlflow.genai.scorers import Safety

    from chapter8_samples import _lab
    from chapter8_samples._lab.console import table

    name = "ch8-scorer-lifecycle"
    rows: list[list[str]] = []
    listed: list[ScorerStatus] = []
    with _lab.sample(name):
        safety = Safety(name="safety_check", model="openai:/gpt-4.1-mini")
        for step in demonstrate_scorer_lifecycle(name, ScorerPlan(scorer=safety, sample_rate=0.5)):
            rate = where = ""  # 未登録なら空欄
            if step.state != "UNREGISTERED":
                rate = f"{step.sample_rate:.0%}"
                where = str(step.filter_string)
            rows.append([step.operation, step.state, rate, where])
            if step.operation == "再開":
                listed = list_scorer_statuses(name)
    print(table(["操作", "状態", "割合", "採点するトレース"], rows, "<<><"))
    for s in listed:
        print(f"再開後の一覧: {s.name} 版 {s.version}、採点は {s.runs}(run_scoring_cycle を呼ぶ側)")
    cost = estimate_monthly_judge_cost(1_000_000, RECOMMENDED_SAMPLE_RATES)
    print(f"推奨の割合で月 100 万件を採点するコスト: 約 {cost:,.0f} USD")


if __name__ == "__main__":
    main()
