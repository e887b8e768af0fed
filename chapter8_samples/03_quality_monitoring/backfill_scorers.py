"""8.3.5 過去のトレースをさかのぼって採点する(バックフィル)。

スコアラーを追加・変更すると、それより前のトレースには評価がない。期間を決めて採点し直す。
先に ``dry_run=True`` で件数とコストを見てから実行する。途中で止めても、同じ呼び出しで再開できる。

実行::

    $ python chapter8_samples/03_quality_monitoring/backfill_scorers.py
    見積もり: 40 トレース、ジャッジ 40 回、約 0.0134 USD
    実行: 採点 40、済み 0、失敗 0(... から ... まで)
    もう一度: 採点 0、済み 40、失敗 0
    新しいスコアラー tone_check を 50% で追加: 採点 ...、済み 0
    名前で指定して直近 7 日間: 採点 0、済み ...

期間を省くと「全期間」ではなく直近 7 日間になる(Databricks の実際の動作と同じにした)。
Databricks では、同じ関数が ``databricks-agents`` のバックフィルジョブを登録し、ジョブ ID を返す。
停止中のスコアラーやタイムゾーンのない時刻で黙って何も採点されないことがないよう、先に調べて例外にする。
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
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import Scorer, list_scorers

from chapter8_samples.quality_monitoring.scoring import (
    ProgressCallback,
    ScorerPlan,
    ScoringError,
    ScoringOptions,
    ScoringReport,
    ScoringTarget,
    find_status,
    judge_bill,
    score_traces,
    setup_scorers,
    show_progress,
)

logger = logging.getLogger(__name__)

DEFAULT_DAYS = 7


class BackfillError(ScoringError):
    """バックフィルを始められない。"""


@dataclass(frozen=True, kw_only=True)
class BackfillReport:
    """バックフィル 1 回の結果。Databricks ではジョブを登録した時点の内容。"""

    job_id: str
    runs: Literal["client", "databricks"]
    start: datetime
    end: datetime
    sample_rates: Mapping[str, float]
    dry_run: bool = False
    scoring: ScoringReport | None = None
    """トレースごとの結果。Databricks のジョブでは ``None``(採点はジョブの中で進む)。"""
    judge_calls: int = 0  # LLM ジャッジを呼ぶ(呼んだ)回数
    cost_usd: float | None = None
    """ジャッジのコスト(USD)。``dry_run`` では見積もり。単価が分からなければ ``None``。"""
    unpriced: tuple[str, ...] = ()  # 単価が分からず、cost_usd を出せなかったスコアラー

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

    Args:
        scorer_names: スコアラーの名前。停止中のものは割合がないので例外になる。
        start_time: 開始(タイムゾーン付き)。両方省くと直近 7 日間。
        end_time: 終了(この時刻は含まない)。省くと現在。
        run: ``dry_run``、``options``、``on_progress``(``backfill()`` を参照)。

    Raises:
        BackfillError: 名前や期間が正しくない、停止中、Databricks が断った、など。
    """
    experiment_id = _experiment_id(experiment_id)
    targets = [_registered(experiment_id, name) for name in _not_a_string(scorer_names)]
    return backfill(experiment_id, targets, start_time=start_time, end_time=end_time, **run)


def backfill_with_custom_sample_rates(
    experiment_id: str,
    scorer_configs: Sequence[ScoringTarget | Mapping[str, Any]],
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    **run: Any,
) -> BackfillReport:
    """スコアラーごとに割合を決めて、さかのぼって採点する。

    Args:
        scorer_configs: ``{"scorer": スコアラー, "sample_rate": 0.8}`` か ``ScoringTarget``。
            割合を省くと 1.0。
    """
    targets = [
        config if isinstance(config, ScoringTarget) else _target(config)
        for config in scorer_configs
    ]
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
    """``start_date`` から ``end_date`` まで(両端の日を含む)を採点する。

    Args:
        start_date: 最初の日(``date`` か ``"2025-01-31"`` の形)。
        end_date: 最後の日。
        tz: 日の区切りを決めるタイムゾーン。
    """
    start, end = _local_days(start_date, end_date, tz)
    return backfill_with_scorer_names(experiment_id, scorer_names, start, end, **run)


def backfill_new_scorer(
    experiment_id: str,
    new_scorer: Scorer,
    sample_rate: float = 0.5,
    days_back: int = 30,
    **run: Any,
) -> BackfillReport:
    """新しいスコアラーを登録・開始し、``days_back`` 日前までさかのぼって採点する。"""
    end = datetime.now(timezone.utc)
    target = _target({"scorer": new_scorer, "sample_rate": sample_rate})
    options: ScoringOptions | None = run.get("options")
    if not (run.get("dry_run") or (options and options.dry_run)):
        target = replace(target, scorer=_register(experiment_id, target))
    return backfill(
        experiment_id, [target], start_time=end - timedelta(days=days_back), end_time=end, **run
    )


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
    """
    options = options or ScoringOptions()
    dry_run = dry_run or options.dry_run  # どちらで頼まれても、実行しない
    start, end = _window(start_time, end_time)
    experiment_id = _experiment_id(experiment_id)
    _check_names([target.name for target in targets])
    on_databricks = mlflow.get_tracking_uri().startswith("databricks")
    report = BackfillReport(
        job_id=uuid.uuid4().hex[:12],
        runs="databricks" if on_databricks else "client",
        start=start,
        end=end,
        sample_rates={target.name: target.sample_rate for target in targets},
        dry_run=dry_run,
    )
    if on_databricks and not dry_run:
        return replace(report, job_id=_submit(experiment_id, targets, start, end))
    options = replace(options, dry_run=dry_run)
    return _score_here(experiment_id, targets, report, options, on_progress or show_progress)


def _score_here(
    experiment_id: str,
    targets: Sequence[ScoringTarget],
    report: BackfillReport,
    options: ScoringOptions,
    on_progress: ProgressCallback,
) -> BackfillReport:
    scoring = score_traces(
        experiment_id,
        targets,
        start=report.start,
        end=report.end,
        options=options,
        on_progress=on_progress,
    )
    on_progress(scoring)  # 終わったことも知らせる
    calls, cost_usd, unpriced = judge_bill(scoring, targets, options)
    return replace(report, scoring=scoring, judge_calls=calls, cost_usd=cost_usd, unpriced=unpriced)


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


def _experiment_id(given: str) -> str:
    """ID を確かめる(ないエクスペリメントを検索しても、MLflow はエラーにせず 0 件を返す)。"""
    try:
        return str(MlflowClient().get_experiment(str(given)).experiment_id)
    except MlflowException as error:
        raise BackfillError(f"no experiment with id {given!r}: {error.message}") from error


def _check_names(names: Sequence[str]) -> None:
    if not names:
        raise BackfillError("no scorers to backfill: pass at least one")
    if len(set(names)) != len(names):
        raise BackfillError(f"scorer names must be unique, got {names}")


def _target(config: Mapping[str, Any]) -> ScoringTarget:
    try:
        return ScoringTarget(**config)
    except (ScoringError, TypeError) as error:
        raise BackfillError(str(error)) from error


def _local_days(first: date | str, last: date | str, tz: str) -> tuple[datetime, datetime]:
    try:
        zone = ZoneInfo(tz)
        start = datetime.combine(_day(first, zone), time(), zone)
        return start, datetime.combine(_day(last, zone) + timedelta(days=1), time(), zone)
    except (ValueError, TypeError, KeyError, OSError, OverflowError) as error:
        raise BackfillError(
            f"need dates like 2025-01-31 and a time zone like Asia/Tokyo, "
            f"got {first!r}, {last!r}, {tz!r}: {error}"
        ) from error


def _day(value: date | str, zone: ZoneInfo) -> date:
    if isinstance(value, str):
        return date.fromisoformat(value)
    if isinstance(value, datetime):
        return (value.astimezone(zone) if value.tzinfo else value).date()
    return value


def _not_a_string(names: Sequence[str]) -> Sequence[str]:
    if isinstance(names, str):
        raise BackfillError(f"scorer_names must be a list, got the string {names!r}")
    return names


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
    return ScoringTarget(
        scorer=status.scorer, sample_rate=status.sample_rate, filter_string=status.filter_string
    )


def _register(experiment_id: str, target: ScoringTarget) -> Scorer:
    """登録して開始する(開始していないスコアラーを、Databricks のジョブは採点しない)。"""
    experiment = MlflowClient().get_experiment(experiment_id)
    plan = ScorerPlan(
        scorer=target.scorer, sample_rate=target.sample_rate, filter_string=target.filter_string
    )
    return setup_scorers(experiment.name, [plan])[0].scorer


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
    configs = [
        BackfillScorerConfig(scorer=target.scorer, sample_rate=target.sample_rate)
        for target in targets
    ]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # クライアントは進捗を print する
            job_id: Any = backfill_scorers(
                experiment_id=experiment_id, scorers=configs, start_time=start, end_time=end
            )
    except (ValueError, OSError, MlflowException) as error:  # requests の例外は OSError
        raise BackfillError(
            f"Databricks refused the backfill: {error}; scorers must be registered and started"
        ) from error
    return str(job_id)


def main() -> None:
    """サンプルを実行する。"""
    from mlflow.genai.scorers import Guidelines, Safety

    from chapter8_samples import _lab

    model = "openai:/gpt-4.1-mini"

    @mlflow.trace
    def answer(question: str) -> str:
        return f"{question}については、購入から 30 日以内に承ります。"

    with _lab.sample("ch8-backfill", llm=True) as lab:
        experiment_id = str(lab.experiment_id)
        for i in range(40):
            answer(f"質問 {i}")
        mlflow.flush_trace_async_logging()
        safety = Safety(name="safety_check", model=model).register(experiment_id=experiment_id)
        targets = [ScoringTarget(scorer=safety)]

        since = datetime.now(timezone.utc) - timedelta(days=1)
        plan = backfill(experiment_id, targets, start_time=since, dry_run=True)
        print(
            f"見積もり: {plan.traces} トレース、ジャッジ {plan.judge_calls} 回、"
            f"約 {plan.cost_usd:.4f} USD"
        )
        done = backfill(experiment_id, targets, start_time=since)
        print(
            f"実行: 採点 {done.scored}、済み {done.skipped}、失敗 {done.failed}"
            f"({done.start:%m-%d} から {done.end:%m-%d} まで)"
        )
        again = backfill(experiment_id, targets, start_time=since)
        print(f"もう一度: 採点 {again.scored}、済み {again.skipped}、失敗 {again.failed}")

        tone = Guidelines(name="tone_check", guidelines="回答は丁寧である", model=model)
        new = backfill_new_scorer(experiment_id, tone, sample_rate=0.5)
        print(f"新しいスコアラー {tone.name} を 50% で追加: 採点 {new.scored}、済み {new.skipped}")
        week = backfill_last_week(experiment_id, [tone.name])
        print(f"名前で指定して直近 7 日間: 採点 {week.scored}、済み {week.skipped}")


if __name__ == "__main__":
    main()
