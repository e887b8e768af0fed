"""8.3.5 過去のトレースをさかのぼって採点する(バックフィル)。

スコアラーを追加・変更すると、それより前のトレースには評価がない。期間を決めて採点し直す。
先に ``dry_run=True`` で件数とコストを見てから実行する。途中で止めても、同じ呼び出しで再開できる。

実行::

    $ python chapter8_samples/03_quality_monitoring/backfill_scorers.py
    見積もり: 40 トレース、ジャッジ 40 回、約 0.0134 USD
    予算 0.002 USD で実行: 採点 ...、済み 0、未着手 ...
    残りを実行: 採点 ...、済み ...、未着手 0
    もう一度: 採点 0、済み 40、未着手 0
    新しいスコアラー tone_check を 50% で追加: 採点 ...、標本外 ...
    名前で指定して直近 7 日間: 採点 0、済み ...

期間を省くと「全期間」ではなく直近 7 日間になる(Databricks の実際の動作と同じにした)。
Databricks では、同じ関数が ``databricks-agents`` のバックフィルジョブを登録し、ジョブ ID を返す。
"""

from __future__ import annotations

import contextlib
import io
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, time, timedelta, timezone
from typing import Any, Literal
from zoneinfo import ZoneInfo

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import Scorer, list_scorers

from chapter8_samples.quality_monitoring.scoring.engine import score_traces
from chapter8_samples.quality_monitoring.scoring.judges import ScoringError
from chapter8_samples.quality_monitoring.scoring.plan import (
    ProgressCallback,
    ScoringOptions,
    ScoringReport,
    ScoringTarget,
    judge_bill,
    show_progress,
)
from chapter8_samples.quality_monitoring.scoring.registry import (
    ScorerPlan,
    ScorerSetupError,
    find_status,
    setup_scorers,
)

logger = logging.getLogger(__name__)
DEFAULT_DAYS = 7


class BackfillError(ScoringError):
    """バックフィルを始められない。"""


@dataclass(frozen=True, kw_only=True)
class BackfillReport:
    """バックフィル 1 回の結果。Databricks では、ジョブを登録した時点の内容。"""

    job_id: str
    runs: Literal["client", "databricks"]
    start: datetime
    end: datetime
    sample_rates: Mapping[str, float]
    dry_run: bool = False
    scoring: ScoringReport | None = None  # Databricks のジョブでは None(採点はジョブの中で進む)
    judge_calls: int = 0  # LLM ジャッジを呼ぶ(呼んだ)回数
    cost_usd: float | None = None  # ジャッジのコスト(dry_run では見積もり)。単価が不明なら None
    unpriced: tuple[str, ...] = ()  # 単価が分からないスコアラー

    @property
    def traces(self) -> int:
        """対象の期間にあったトレースの数。"""
        return self.scoring.traces if self.scoring else 0

    @property
    def scored(self) -> int:
        """採点した数(``dry_run`` では採点することになる数)。"""
        return self.scoring.scored if self.scoring else 0

    @property
    def skipped(self) -> int:
        """採点済みで飛ばした数。"""
        return self.scoring.skipped if self.scoring else 0

    @property
    def failed(self) -> int:
        """採点に失敗した数。"""
        return self.scoring.failed if self.scoring else 0


def backfill_with_scorer_names(
    experiment_id: str,
    scorer_names: Sequence[str],
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    **run: Any,
) -> BackfillReport:
    """登録済みのスコアラーを名前で指定し、いまの割合でさかのぼって採点する。

    期間と ``run``(``dry_run``、``options``、``on_progress``)は ``backfill()`` を参照。停止中の
    スコアラーは、割合がないので ``BackfillError`` になる。
    """
    experiment_id = _experiment(experiment_id).experiment_id
    if isinstance(scorer_names, str):
        raise BackfillError(f"scorer_names must be a list, got the string {scorer_names!r}")
    targets = [_registered(experiment_id, name) for name in scorer_names]
    return backfill(experiment_id, targets, start_time=start_time, end_time=end_time, **run)


def backfill_with_custom_sample_rates(
    experiment_id: str,
    scorer_configs: Sequence[ScoringTarget | Mapping[str, Any]],
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    **run: Any,
) -> BackfillReport:
    """``{"scorer": ..., "sample_rate": 0.8}`` か ``ScoringTarget`` で、割合を決めて採点する。"""
    targets = [c if isinstance(c, ScoringTarget) else _target(**c) for c in scorer_configs]
    return backfill(experiment_id, targets, start_time=start_time, end_time=end_time, **run)


def backfill_last_week(
    experiment_id: str, scorer_names: Sequence[str], **run: Any
) -> BackfillReport:
    """直近 7 日間(168 時間)を採点する。"""
    start = datetime.now(timezone.utc) - timedelta(days=DEFAULT_DAYS)
    return backfill_with_scorer_names(experiment_id, scorer_names, start, **run)


def backfill_date_range(
    experiment_id: str,
    scorer_names: Sequence[str],
    start_date: date | str,
    end_date: date | str,
    *,
    tz: str = "Asia/Tokyo",
    **run: Any,
) -> BackfillReport:
    """``date`` か ``"2025-01-31"`` の形の、両端の日を含めて採点する。"""
    try:
        zone = ZoneInfo(tz)
        start = datetime.combine(_day(start_date, zone), time(), zone)
        end = datetime.combine(_day(end_date, zone) + timedelta(days=1), time(), zone)
    except (ValueError, TypeError, KeyError, OSError, OverflowError) as error:
        raise BackfillError(
            f"need dates like 2025-01-31 and a time zone like Asia/Tokyo, "
            f"got {start_date!r}, {end_date!r}, {tz!r}: {error}"
        ) from error
    return backfill_with_scorer_names(experiment_id, scorer_names, start, end, **run)


def backfill_new_scorer(
    experiment_id: str,
    new_scorer: Scorer,
    sample_rate: float = 0.5,
    days_back: int = 30,
    *,
    dry_run: bool = False,
    options: ScoringOptions | None = None,
    on_progress: ProgressCallback | None = None,
) -> BackfillReport:
    """新しいスコアラーを登録・開始し、``days_back`` 日前までさかのぼって採点する。"""
    end = datetime.now(timezone.utc)
    start, _ = _window(end - timedelta(days=days_back), end)
    target = _target(scorer=new_scorer, sample_rate=sample_rate)
    experiment = _experiment(experiment_id)
    if not (dry_run or (options and options.dry_run)):
        # 開始していないスコアラーを、Databricks のジョブは採点しない
        plan = ScorerPlan(scorer=new_scorer, sample_rate=sample_rate)
        try:
            target = replace(target, scorer=setup_scorers(experiment.name, [plan])[0].scorer)
        except ScorerSetupError as error:
            raise BackfillError(str(error)) from error
    more: dict[str, Any] = {"dry_run": dry_run, "options": options, "on_progress": on_progress}
    return backfill(experiment.experiment_id, [target], start_time=start, end_time=end, **more)


def backfill(
    experiment_id: str,
    targets: Sequence[ScoringTarget],
    *,
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    dry_run: bool = False,
    options: ScoringOptions | None = None,
    on_progress: ProgressCallback | None = None,
) -> BackfillReport:
    """期間 ``[start_time, end_time)`` のトレースを、さかのぼって採点する。

    Args:
        start_time: 開始(タイムゾーン付き)。省くと終了の 7 日前とし、警告をログに出す。
        end_time: 終了(タイムゾーン付き)。省くと現在。
        dry_run: 真なら、トレースの数、ジャッジの回数、コストを見積もるだけ。
        options: 並列数、呼び出し頻度、予算など。Databricks のジョブには効かない。
        on_progress: 1 件ごとと最後に、結果を渡して呼ぶ。省くと、端末には 1 行で途中経過を出す。

    Raises:
        BackfillError: 期間やスコアラーが正しくない、Databricks が断った、など。
        ScoringBusyError: ほかの実行が、同じスコアラーで採点している。
    """
    options = options or ScoringOptions()
    options = replace(options, dry_run=dry_run or options.dry_run)  # どちらで頼まれてもよい
    start, end = _window(start_time, end_time)
    names = [target.name for target in targets]
    if not names or len(set(names)) != len(names):
        raise BackfillError(f"need at least one scorer, with unique names, got {names}")
    experiment_id = _experiment(experiment_id).experiment_id
    on_databricks = mlflow.get_tracking_uri().startswith("databricks")
    report = BackfillReport(
        job_id=uuid.uuid4().hex[:12],
        runs="databricks" if on_databricks else "client",
        start=start,
        end=end,
        sample_rates={target.name: target.sample_rate for target in targets},
        dry_run=options.dry_run,
    )
    if on_databricks and not options.dry_run:
        return replace(report, job_id=_submit(experiment_id, targets, start, end))
    notify, window = on_progress or show_progress, {"start": start, "end": end}
    scoring = score_traces(experiment_id, targets, **window, options=options, on_progress=notify)
    notify(scoring)  # 終わったことも知らせる
    calls, cost, unpriced = judge_bill(scoring, targets, options)
    return replace(report, scoring=scoring, judge_calls=calls, cost_usd=cost, unpriced=unpriced)


def _window(start: datetime | None, end: datetime | None) -> tuple[datetime, datetime]:
    end = end or datetime.now(timezone.utc)
    if start is None:
        start = end - timedelta(days=DEFAULT_DAYS)
        logger.warning(
            "no start_time: only the last %d days are scored, from %s", DEFAULT_DAYS, start
        )
    for name, value in (("start_time", start), ("end_time", end)):
        if getattr(value, "tzinfo", None) is None:
            raise BackfillError(
                f"{name} {value} has no time zone: "
                "use datetime(..., tzinfo=timezone.utc) or backfill_date_range(tz=...)"
            )
    if start >= end:
        raise BackfillError(f"start_time {start.isoformat()} is not before {end.isoformat()}")
    return start, end


def _experiment(given: str) -> Experiment:
    """ID を確かめる(ないエクスペリメントを検索しても、MLflow はエラーにせず 0 件を返す)。"""
    try:
        return MlflowClient().get_experiment(str(given))
    except MlflowException as error:
        raise BackfillError(f"no experiment with id {given!r}: {error.message}") from error


def _target(**config: Any) -> ScoringTarget:
    try:
        return ScoringTarget(**config)
    except (ScoringError, TypeError) as error:
        raise BackfillError(str(error)) from error


def _day(value: date | str, zone: ZoneInfo) -> date:
    if isinstance(value, str):
        return date.fromisoformat(value)
    if isinstance(value, datetime):
        return (value.astimezone(zone) if value.tzinfo else value).date()
    return value


def _registered(experiment_id: str, name: str) -> ScoringTarget:
    status = find_status(experiment_id, name)
    if status is None:
        known = [scorer.name for scorer in list_scorers(experiment_id=experiment_id)]
        raise BackfillError(
            f"no scorer {name!r} in experiment {experiment_id}; registered: {known}"
        )
    if status.sample_rate == 0:
        raise BackfillError(
            f"scorer {name!r} is stopped: resume it, or use backfill_with_custom_sample_rates()"
        )
    where = {"sample_rate": status.sample_rate, "filter_string": status.filter_string}
    return _target(scorer=status.scorer, **where)


def _submit(
    experiment_id: str, targets: Sequence[ScoringTarget], start: datetime, end: datetime
) -> str:
    try:
        from databricks.agents.scorers import (  # pyright: ignore[reportMissingTypeStubs]
            BackfillScorerConfig,
            backfill_scorers,
        )
    except ImportError as error:
        raise BackfillError(
            'backfill on Databricks needs: pip install "databricks-agents>=1.13"'
        ) from error
    # 率を省くとクライアントが AttributeError になり、時刻を省くと 7 日間に変わるので、必ず渡す
    configs = [BackfillScorerConfig(scorer=t.scorer, sample_rate=t.sample_rate) for t in targets]
    window: dict[str, Any] = {"start_time": start, "end_time": end}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # クライアントは進捗を print する
            return str(backfill_scorers(experiment_id=experiment_id, scorers=configs, **window))
    except (ValueError, OSError, MlflowException) as error:  # requests の例外は OSError
        raise BackfillError(
            f"Databricks refused the backfill: {error}; scorers must be registered and started"
        ) from error


def main() -> None:
    """サンプルを実行する。"""
    from mlflow.genai.scorers import Guidelines, Safety

    from chapter8_samples import _lab

    def show(title: str, report: BackfillReport) -> None:
        assert report.scoring is not None
        (counts,) = report.scoring.scorers.values()
        print(f"{title}: 採点 {counts.scored}、済み {counts.skipped}、", end="")
        print(f"標本外 {counts.sampled_out}、未着手 {counts.not_started}")

    answer = mlflow.trace(lambda question: f"{question}は、30 日以内に承ります。", name="answer")
    model = "openai:/gpt-4.1-mini"
    with _lab.sample("ch8-backfill", llm=True) as lab:
        experiment_id = str(lab.experiment_id)
        for number in range(40):
            answer(f"質問 {number}")
        mlflow.flush_trace_async_logging()
        targets = [ScoringTarget(scorer=Safety(name="safety_check", model=model))]
        since = datetime.now(timezone.utc) - timedelta(days=1)
        plan = backfill(experiment_id, targets, start_time=since, dry_run=True)
        print(f"見積もり: {plan.traces} トレース、ジャッジ {plan.judge_calls} 回、", end="")
        print(f"約 {plan.cost_usd:.4f} USD")
        cheap = ScoringOptions(budget_usd=0.002)
        first = backfill(experiment_id, targets, start_time=since, options=cheap)
        show("予算 0.002 USD で実行", first)
        show("残りを実行", backfill(experiment_id, targets, start_time=since))
        show("もう一度", backfill(experiment_id, targets, start_time=since))
        tone = Guidelines(name="tone_check", guidelines="回答は丁寧である", model=model)
        show("新しい tone_check を 50% で", backfill_new_scorer(experiment_id, tone, 0.5))
        show("名前で直近 7 日間", backfill_last_week(experiment_id, [tone.name]))


if __name__ == "__main__":
    main()
