"""8.3.5 過去のトレースをさかのぼって採点する(バックフィル)。

スコアラーを追加・変更しても、それより前のトレースには評価が付かない。
期間を決め、さかのぼって採点する。
先に ``dry_run=True`` で件数とコストを見てから実行する。途中で止めても、同じ呼び出しで再開できる。

実行::

    $ python chapter8_samples/03_quality_monitoring/backfill_scorers.py
    safety_check で 40 件のトレースを採点する
    見積もり(入力の長さを多めに仮定): 採点 40、済み 0、0.0134 USD
    予算 0.002 USD で実行: 採点 ...、済み 0、0.00... USD
    残りを実行: 採点 ...、済み ...、0.00... USD
    もう一度: 採点 0、済み 40、0.0000 USD
    新しい tone_check を登録し、50% で: 採点 ...、済み 0
    名前で直近 7 日間: 採点 0、済み ...

期間を省くと「全期間」ではなく直近 7 日間になる(Databricks の実際の動作と同じにした)。
Databricks では、同じ関数が ``databricks-agents`` のバックフィルジョブを登録し、ジョブ ID を返す。
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from typing import Any

import mlflow
from mlflow.genai.scorers import Scorer

from chapter8_samples.quality_monitoring import (
    BackfillError,
    ScorerPlan,
    ScorerSetupError,
    ScoringOptions,
    ScoringReport,
    ScoringTarget,
    setup_scorers,
)
from chapter8_samples.quality_monitoring.scoring.backfills import (
    check_window,
    experiment_of,
    registered_targets,
    submit_backfill,
    target_of,
    whole_days,
)
from chapter8_samples.quality_monitoring.scoring.engine import score_traces
from chapter8_samples.quality_monitoring.scoring.plan import ProgressCallback


def backfill_with_scorer_names(
    experiment_id: str,
    scorer_names: Sequence[str],
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    **run: Any,
) -> ScoringReport:
    """登録済みのスコアラーを名前で指定し、いまの割合でさかのぼって採点する。

    期間と ``run`` は ``backfill()`` を参照。停止中のスコアラーは、割合がないので例外になる。
    """
    targets = registered_targets(experiment_id, scorer_names)
    return backfill(experiment_id, targets, start_time=start_time, end_time=end_time, **run)


def backfill_with_custom_sample_rates(
    experiment_id: str,
    scorer_configs: Sequence[ScoringTarget | Mapping[str, Any]],
    start_time: datetime | None = None,
    end_time: datetime | None = None,
    **run: Any,
) -> ScoringReport:
    """``{"scorer": ..., "sample_rate": 0.8}`` か ``ScoringTarget`` で、割合を決めて採点する。"""
    targets = [c if isinstance(c, ScoringTarget) else target_of(**c) for c in scorer_configs]
    return backfill(experiment_id, targets, start_time=start_time, end_time=end_time, **run)


def backfill_last_week(
    experiment_id: str, scorer_names: Sequence[str], **run: Any
) -> ScoringReport:
    """直近 7 日間(168 時間)を採点する。"""
    start = datetime.now(timezone.utc) - timedelta(days=7)
    return backfill_with_scorer_names(experiment_id, scorer_names, start, **run)


def backfill_date_range(
    experiment_id: str,
    scorer_names: Sequence[str],
    start_date: date | str,
    end_date: date | str,
    *,
    tz: str = "Asia/Tokyo",
    **run: Any,
) -> ScoringReport:
    """``date`` か ``"2025-01-31"`` の形の、両端の日を含めて採点する。"""
    start, end = whole_days(start_date, end_date, tz)
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
) -> ScoringReport:
    """新しいスコアラーを登録・開始し、``days_back`` 日前までさかのぼって採点する。"""
    end = datetime.now(timezone.utc)
    start, _ = check_window(end - timedelta(days=days_back), end)
    target = target_of(scorer=new_scorer, sample_rate=sample_rate)
    experiment = experiment_of(experiment_id)
    if not dry_run:
        # 開始していないスコアラーを、Databricks のジョブは採点しない
        plan = ScorerPlan(scorer=new_scorer, sample_rate=sample_rate)
        try:
            target = replace(target, scorer=setup_scorers(experiment.name, [plan])[0].scorer)
        except ScorerSetupError as error:
            raise BackfillError(str(error)) from error
    return backfill(
        experiment.experiment_id,
        [target],
        start_time=start,
        end_time=end,
        dry_run=dry_run,
        options=options,
        on_progress=on_progress,
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
) -> ScoringReport:
    """期間 ``[start_time, end_time)`` のトレースを、さかのぼって採点する。

    時刻はタイムゾーン付き。終了を省くと現在、開始を省くと終了の 7 日前(警告をログに出す)。
    ``dry_run`` では、件数とコストを見積もるだけ。``options`` は Databricks のジョブには効かない。

    Raises:
        BackfillError: 期間やスコアラーが正しくない、Databricks が拒否した、など。
        ScoringBusyError: ほかの実行が、同じスコアラーで採点している。
    """
    start, end = check_window(start_time, end_time)
    names = [target.name for target in targets]
    if not names or len(set(names)) < len(names):
        raise BackfillError(f"need at least one scorer, with unique names, got {names}")
    experiment_id = experiment_of(experiment_id).experiment_id
    if mlflow.get_tracking_uri().startswith("databricks") and not dry_run:
        job_id = submit_backfill(experiment_id, targets, start, end)
        return ScoringReport(experiment_id=experiment_id, start=start, end=end, job_id=job_id)
    return score_traces(
        experiment_id,
        targets,
        start=start,
        end=end,
        options=options,
        dry_run=dry_run,
        on_progress=on_progress,
    )


def main() -> None:
    """見積もり、予算、再開、やり直し、新しいスコアラーを試す。"""
    from mlflow.genai.scorers import Guidelines, Safety

    from chapter8_samples import _lab

    def show(title: str, **run: Any) -> None:
        report = backfill(experiment_id, [ScoringTarget(scorer=safety)], **window, **run)
        print(f"{title}: 採点 {report.scored}、済み {report.skipped}、{report.cost_usd:.4f} USD")

    answer = mlflow.trace(lambda question: f"{question}は、30 日以内に承ります。", name="answer")
    with _lab.sample("ch8-backfill", llm=True) as lab:
        experiment_id = str(lab.experiment_id)
        for number in range(40):
            answer(f"質問 {number}")
        mlflow.flush_trace_async_logging()
        window = {"start_time": datetime.now(timezone.utc) - timedelta(days=1)}
        safety = Safety(name="safety_check", model="openai:/gpt-4.1-mini")
        print(f"{safety.name} で 40 件のトレースを採点する")
        show("見積もり(入力の長さを多めに仮定)", dry_run=True)
        show("予算 0.002 USD で実行", options=ScoringOptions(budget_usd=0.002))
        show("残りを実行")
        show("もう一度")
        tone = Guidelines(name="tone_check", guidelines="丁寧である", model=safety.model)
        new = backfill_new_scorer(experiment_id, tone, sample_rate=0.5)
        week = backfill_last_week(experiment_id, [tone.name])
        print(f"新しい {tone.name} を登録し、50% で: 採点 {new.scored}、済み {new.skipped}")
        print(f"名前で直近 7 日間: 採点 {week.scored}、済み {week.skipped}")


if __name__ == "__main__":
    main()
