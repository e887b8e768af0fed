"""8.3.5 直近のトレースを定期的に採点する(継続的評価、リスト8.11)。

MLflow サーバーが自動で採点できるのは ``gateway:/`` の LLM ジャッジだけである(3.18 からは、選べば
コードのスコアラーもコンテナーの中で)。``openai:/`` のジャッジ、コードのスコアラー、手元の SQLite の
トレースは、この関数を cron などから呼んで採点する。

Databricks では、登録したスコアラーを Databricks が採点する。``ScorerStatus.runs`` が
``databricks`` のものは、ここでは飛ばされる。
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import Scorer

from .engine import score_traces
from .judges import ScoringError, require_judges
from .lease import ScoringBusyError, patiently
from .plan import FINISHED_TRACES, ScoringOptions, ScoringReport, ScoringTarget
from .registry import ScorerStatus

logger = logging.getLogger(__name__)
Scorable = Scorer | ScoringTarget | ScorerStatus


def run_scoring_cycle(
    experiment_name_or_id: str,
    scorers: Sequence[Scorable],
    *,
    lookback: timedelta = timedelta(hours=1),
    options: ScoringOptions | None = None,
    now: datetime | None = None,
    flush: bool = True,
) -> ScoringReport:
    """直近 ``lookback`` のトレースを採点する。cron などから、それより短い間隔で呼ぶ。

    重なった分は、採点済みとして飛ばされる。採点できないスコアラー(セッションを採点する、
    API キーがない、ほかの実行が採点している)は、理由を ``not_run`` に残し、ほかを採点する。

    トレースの時刻は始まった時刻なので、長くかかったもの、遅れて届いたもの、ジャッジが長く止まって
    いた間のものは、この期間から漏れる。1 日に 1 回、``lookback=timedelta(days=2)`` でも呼ぶ。

    Args:
        scorers: ``setup_quality_scorers()`` の戻り値か、MLflow のスコアラー。
            休止中のものと、サーバーや Databricks が採点するものは飛ばす。動き続けるプロセスでは、
            ほかからの休止が伝わるように、``list_scorer_statuses()`` で毎回読み直して渡す。
        flush: 先に、このプロセスの未保存のトレースを書き出す(トレースを作るプロセスでは約 2 秒)。

    Raises:
        ScoringError: エクスペリメントがない、採点できるスコアラーが 1 つもない、など。
    """
    if flush:
        mlflow.flush_trace_async_logging()
    end = now or datetime.now(timezone.utc)
    if end.tzinfo is not None:
        end = end.astimezone(timezone.utc)  # 夏時間の変わり目でも、lookback の長さを変えない
    start = end - lookback
    experiment_id = _experiment_id(experiment_name_or_id)
    here = [scorer for scorer in scorers if _runs_here(scorer)]
    elsewhere = tuple(scorer.name for scorer in scorers if not _runs_here(scorer))
    targets, refused = _runnable(here)
    if not targets and not elsewhere:
        raise next(iter(refused.values()), ScoringError("no scorers to run: pass at least one"))
    report = ScoringReport(experiment_id=experiment_id, start=start, end=end)
    while targets:
        try:
            report = score_traces(experiment_id, targets, start=start, end=end, options=options)
            break
        except ScoringBusyError as busy:  # 空いているスコアラーだけで、やり直す
            refused |= {target.name: busy for target in targets if target.name in busy.names}
            targets = [target for target in targets if target.name not in refused]
    report.elsewhere = elsewhere
    report.not_run = {name: str(error) for name, error in refused.items()}
    if refused:
        logger.warning("not scored: %s", report.not_run)
    return report


def _runnable(
    scorers: Sequence[Scorable],
) -> tuple[list[ScoringTarget], dict[str, ScoringError]]:
    """採点できるものと、できないもの(名前 -> 理由)。"""
    targets: list[ScoringTarget] = []
    refused: dict[str, ScoringError] = {}
    for scorer in scorers:
        try:
            target = _target(scorer)
            require_judges([target.scorer])
            targets.append(target)
        except ScoringError as error:
            refused[scorer.name] = error
    return targets, refused


def _experiment_id(name_or_id: str) -> str:
    client = MlflowClient()
    found = None
    try:
        found = patiently(lambda: client.get_experiment_by_name(name_or_id))
        if found is None and name_or_id.isdigit():
            found = client.get_experiment(name_or_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise ScoringError(f"cannot read {name_or_id!r}: {error.message}") from error
    if found is None:
        raise ScoringError(f"no experiment named {name_or_id!r} at {mlflow.get_tracking_uri()}")
    return found.experiment_id


def _runs_here(scorer: Scorable) -> bool:
    paused = getattr(scorer, "sample_rate", None) == 0
    return getattr(scorer, "runs", "client") == "client" and not paused


def _target(scorer: Scorable) -> ScoringTarget:
    if isinstance(scorer, ScoringTarget):
        return scorer
    rate, where = scorer.sample_rate, scorer.filter_string
    if isinstance(scorer, Scorer):  # 登録されていなければ、割合もフィルターもない
        rate, where = rate or 1.0, where or FINISHED_TRACES
        return ScoringTarget(scorer=scorer, sample_rate=rate, filter_string=where)
    return ScoringTarget(scorer=scorer.scorer, sample_rate=rate or 0.0, filter_string=where)
