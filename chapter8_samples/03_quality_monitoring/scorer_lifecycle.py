"""8.3.4 スコアラーの状態を変える: 一覧、割合の変更、休止、再開、削除(リスト8.12)。

OSS の MLflow では、割合だけを更新するとフィルターが黙って消え、停止すると割合も消える。
Databricks とは戻り値も違う。その違いを隠し、休止しても割合とフィルターを覚えておく。

実行::

    $ python chapter8_samples/03_quality_monitoring/scorer_lifecycle.py
    登録前            UNREGISTERED
    登録・開始        STARTED         50%  status = 'OK'
    割合を変更        STARTED         20%  status = 'OK'
    休止              STOPPED          0%  status = 'OK'
    再開              STARTED         20%  status = 'OK'
    一覧              safety_check 版 1  採点: client
    削除              UNREGISTERED
    推奨の割合で月 100 万件を採点するコスト: 約 874 USD

Databricks でも同じ関数を使う。割合とフィルターは毎回両方を渡すので、どちらでも結果は同じになる。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import delete_scorer, list_scorers

from chapter8_samples.quality_monitoring.scoring.registry import (
    KeptSetting,
    ScorerNotFoundError,
    ScorerPlan,
    ScorerSetupError,
    ScorerStatus,
    apply_setting,
    check_filter,
    check_sample_rate,
    existing_experiment_id,
    find_status,
    keep_setting,
    kept_setting,
    setup_scorers,
    status_of,
)

State = Literal["UNREGISTERED", "STARTED", "STOPPED"]

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


def state_of(experiment_name: str, name: str) -> State:
    """スコアラーの状態。"""
    try:
        status = get_scorer_status(experiment_name, name)
    except ScorerNotFoundError:
        return "UNREGISTERED"
    return "STARTED" if status.sample_rate > 0 else "STOPPED"


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
    kept = kept_setting(existing_experiment_id(experiment_name), name)
    if status.sample_rate > 0:
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
    # 版を省くと、Databricks では全版、OSS 版ではエラーになる
    delete_scorer(name=name, experiment_id=experiment_id, version="all")
    keep_setting(experiment_id, name, None)


def delete_all_scorers(experiment_name: str, confirm: bool = False) -> list[str]:
    """すべてのスコアラーを削除し、名前を返す。``confirm=True`` がなければ何もしない。"""
    if not confirm:
        raise ScorerSetupError("delete_all_scorers() needs confirm=True")
    names = [status.name for status in list_scorer_statuses(experiment_name)]
    for name in names:
        remove_scorer(experiment_name, name)
    return names


def estimate_monthly_judge_cost(
    traffic: float,
    rates: Mapping[str, float],
    judge_price: tuple[float, float] | tuple[Decimal, Decimal] | float | Decimal = (0.40, 1.60),
    *,
    tokens_per_call: tuple[int, int] = (600, 60),
) -> float:
    """1 か月のトレースの数 ``traffic`` と割合から、ジャッジのコスト(USD / 月)を見積もる。

    ``judge_price`` は、入力と出力の単価(USD / 100 万トークン、``JudgePrice`` でもよい)か、ジャッジ
    1 回の額(USD)。既定は gpt-4.1-mini。
    """
    prices = judge_price if isinstance(judge_price, tuple) else (judge_price,)
    if not all(math.isfinite(n) and n >= 0 for n in (traffic, *prices, *tokens_per_call)):
        raise ScorerSetupError(
            "traffic, prices and tokens must be finite and not negative, "
            f"got {traffic}, {judge_price}, {tokens_per_call}"
        )
    calls = traffic * sum(check_sample_rate(name, rate) for name, rate in rates.items())
    if not isinstance(judge_price, tuple):
        return calls * float(judge_price)
    pairs = zip(judge_price, tokens_per_call, strict=True)
    return calls * sum(float(price) * tokens for price, tokens in pairs) / 1_000_000


@dataclass(frozen=True)
class LifecycleStep:
    """操作を 1 つ終えたあとの、保存先から読み直した状態。"""

    operation: str
    state: State
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
        state = state_of(experiment_name, name)
        if state == "UNREGISTERED":
            yield LifecycleStep(operation, state)
        else:
            status = get_scorer_status(experiment_name, name)
            yield LifecycleStep(operation, state, status.sample_rate, status.filter_string)


def main() -> None:
    """サンプルを実行する。"""
    from mlflow.genai.scorers import Safety

    from chapter8_samples import _lab

    name = "ch8-scorer-lifecycle"
    with _lab.sample(name):
        safety = Safety(name="safety_check", model="openai:/gpt-4.1-mini")
        for step in demonstrate_scorer_lifecycle(name, ScorerPlan(scorer=safety, sample_rate=0.5)):
            line = f"{step.operation}{' ' * (18 - 2 * len(step.operation))}{step.state}"
            if step.state != "UNREGISTERED":
                rate = f"{step.sample_rate:6.0%}  {step.filter_string}"
                line = f"{line:{30 - len(step.operation)}} {rate}"
            print(line)
            if step.operation == "再開":
                for status in list_scorer_statuses(name):
                    about = f"{status.name} 版 {status.version}  採点: {status.runs}"
                    print(f"一覧              {about}")
        cost = estimate_monthly_judge_cost(1_000_000, RECOMMENDED_SAMPLE_RATES)
        print(f"推奨の割合で月 100 万件を採点するコスト: 約 {cost:,.0f} USD")


if __name__ == "__main__":
    main()
