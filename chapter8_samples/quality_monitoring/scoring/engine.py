"""8.3.5 保存済みのトレースを採点するエンジン(継続的評価とバックフィルの共通部品)。

``mlflow.genai.evaluate()`` は呼ぶたびに実行(run)を作り、同じトレースに評価を重ねて書く。ここでは
スコアラーを直接呼んで結果だけを書き、採点済みは飛ばす。途中で止めても、同じ呼び出しで再開できる。

先に期間のトレースをすべて読み、失敗したことのあるものは後に回す(採点できないトレースがあっても、残りは
採点される)。ジャッジは並列に呼び、書き込みは 1 スレッドで行う(SQLite はその方が速い)。
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import copy_context
from datetime import datetime
from decimal import Decimal
from functools import partial
from threading import Thread
from typing import Any, Literal, NamedTuple

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Assessment, Feedback, Trace, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import Scorer
from mlflow.tracing.client import TracingClient

from .identity import Identity, identity_of, is_error
from .judges import BudgetError, ScoringError, assumed_cost, judge_cost, judge_model, require_judges
from .judging import call_scorer
from .lease import RENEW_SECONDS, Lease, patiently
from .limits import Budget, Throttle
from .plan import (
    ProgressCallback,
    ScorerCounts,
    ScoringOptions,
    ScoringReport,
    ScoringTarget,
    sample,
)

logger = logging.getLogger(__name__)

_NOT_FROM_EVALUATION = "metadata.`mlflow.sourceRun` IS NULL"
# 探してから読むまでに消された、スパンが保存されていない、壊れている
_UNREADABLE = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "BAD_REQUEST"}


def score_traces(
    experiment_id: str,
    targets: Sequence[ScoringTarget],
    *,
    start: datetime,
    end: datetime,
    options: ScoringOptions | None = None,
    on_progress: ProgressCallback | None = None,
) -> ScoringReport:
    """期間 ``[start, end)``(タイムゾーン付き)のトレースを採点する。採点済みは飛ばす。

    ``on_progress`` は、トレースを 1 件処理するたびに、途中の結果を渡して、採点のスレッドから呼ぶ。

    Raises:
        ScoringBusyError: ほかの実行が、同じスコアラーで採点している。
        JudgeNotConfiguredError: ジャッジの API キーなどがない。
        BudgetError: 予算があるのに、ジャッジのコストが分からない。
        ScoringError: 引数が正しくない、保存先を読み書きできない。
    """
    options, names = options or ScoringOptions(), [target.name for target in targets]
    if start.tzinfo is None or end.tzinfo is None or start >= end:
        raise ScoringError(f"need timezone-aware start < end, got {start!r} and {end!r}")
    if not targets:
        raise ScoringError("no scorers to run: pass at least one")
    if len(set(names)) < len(names):
        raise ScoringError(f"a scorer is listed twice: {names}")
    if not options.dry_run:
        require_judges([target.scorer for target in targets])
    report = ScoringReport(experiment_id=experiment_id, start=start, end=end)
    report.scorers = {name: ScorerCounts() for name in names}
    began = time.perf_counter()
    try:
        _run_apart(_Run(report, targets, options, on_progress or (lambda _: None)))
    except MlflowException as error:
        raise ScoringError(f"cannot score experiment {experiment_id}: {error.message}") from error
    finally:
        report.seconds = time.perf_counter() - began
    return report


def _run_apart(run: _Run) -> None:
    """採点を別のスレッドで行い、終わるのを待つ。

    Ctrl-C はメインスレッドに届く。そこで保存先を読み書きしていると、トランザクションの途中で
    中断し、ロックが残って、始めた採点の結果を書けなくなる。
    """
    done: Future[None] = Future()

    def work() -> None:
        if done.set_running_or_notify_cancel():
            try:
                run.run()
                done.set_result(None)
            except BaseException as error:  # 呼んだ側のスレッドで投げ直す
                done.set_exception(error)

    try:
        Thread(target=copy_context().run, args=(work,), name="scoring").start()
        while not done.done():
            wait([done], timeout=0.1)  # 期限がないと、Windows では Ctrl-C が届かない
    except BaseException:
        run.stopping = True
        if not done.cancel():  # もう始めている
            wait([done])
        raise
    done.result()


class _Outcome(NamedTuple):
    """1 件のトレースに、1 つのスコアラーを使った結果。"""

    target: ScoringTarget
    kind: Literal["scored", "failed", "empty", "not_started"]
    feedbacks: Sequence[Feedback] = ()
    cost_usd: Decimal | None = Decimal(0)
    stale: Sequence[Assessment] = ()  # 書く前に消す、前のエラーと途中までの評価


_Judged = tuple[str, list[_Outcome]]
_Todo = tuple[str, list[ScoringTarget]]


class _Interrupted(Exception):
    """呼んだ側には、中断した例外(KeyboardInterrupt など)が届く。"""


class _Run:
    """採点 1 回。"""

    def __init__(
        self,
        report: ScoringReport,
        targets: Sequence[ScoringTarget],
        options: ScoringOptions,
        on_progress: ProgressCallback,
    ) -> None:
        self.report, self.targets, self.options = report, targets, options
        self.on_progress = on_progress
        self.lease = Lease(report.experiment_id, list(report.scorers))
        self.throttle, self.budget = Throttle(options.calls_per_second), Budget(options.budget_usd)
        self.identities: dict[str, Identity] = {}
        self.failures: dict[str, int] = defaultdict(int)
        self.running: set[Future[_Judged]] = set()
        self.stopping = False  # 呼んだ側が Ctrl-C などで中断した

    def run(self) -> None:
        experiment_id = self.report.experiment_id
        self.identities = {t.name: identity_of(t.scorer, experiment_id) for t in self.targets}
        if self.options.dry_run:
            self.estimate(self.todo())
        else:
            with self.lease:
                self.score(self.todo())

    def checkpoint(self) -> None:
        if self.stopping:
            raise _Interrupted
        if not self.options.dry_run:
            self.lease.renew()

    # 計画 ------------------------------------------------------------------

    def todo(self) -> list[_Todo]:
        """失敗したことのない仕事、失敗した仕事(古い順)。それぞれの中は、時期の偏らない順。"""
        found: dict[tuple[int, str, str], list[ScoringTarget]] = defaultdict(list)
        seen: set[str] = set()
        for filter_string in dict.fromkeys(target.filter_string for target in self.targets):
            group = [t for t in self.targets if t.filter_string == filter_string]
            for info in self.trace_infos(filter_string):
                self.checkpoint()
                seen.add(info.trace_id)
                self.report.traces = len(seen)
                spread = hashlib.sha256(info.trace_id.encode()).hexdigest()
                for failed_at, target in self.unscored(info, group):
                    found[failed_at, spread, info.trace_id].append(target)
        return [(key[-1], found[key]) for key in sorted(found)]

    def trace_infos(self, filter_string: str | None) -> Iterator[TraceInfo]:
        start = math.floor(self.report.start.timestamp() * 1000)
        end = math.ceil(self.report.end.timestamp() * 1000)  # MLflow の時刻はミリ秒で切り捨て
        window = f"timestamp_ms >= {start} AND timestamp_ms < {end} AND {_NOT_FROM_EVALUATION}"
        search = partial(
            MlflowClient().search_traces,
            locations=[self.report.experiment_id],
            filter_string=f"{window} AND {filter_string}" if filter_string else window,
            max_results=self.options.page_size,
            order_by=["timestamp_ms ASC"],  # 読む間にトレースが増えても、ページがずれない
            include_spans=False,
        )
        page = patiently(search)
        yield from (trace.info for trace in page)
        while page.token:
            page = patiently(partial(search, page_token=page.token))
            yield from (trace.info for trace in page)

    def unscored(
        self, info: TraceInfo, group: list[ScoringTarget]
    ) -> Iterator[tuple[int, ScoringTarget]]:
        chosen = {target.name for target in sample(info.trace_id, group)}
        for target in group:
            counts, identity = self.report.scorers[target.name], self.identities[target.name]
            if target.name not in chosen:
                counts.sampled_out += 1
            elif verdicts := identity.verdicts(info.assessments):
                counts.skipped += 1
                if (cost := judge_cost(verdicts, self.options.judge_price)) is not None:
                    counts.past_costs.append(cost)
            else:
                yield identity.failed_at_ms(info.assessments), target

    def estimate(self, todo: Sequence[_Todo]) -> None:
        """件数と、ジャッジのコスト(同じスコアラーの過去の平均か、1 回の標準的な長さから)。"""
        for target in (target for _, targets in todo for target in targets):
            counts = self.report.scorers[target.name]
            counts.scored += 1
            if judge_model(target.scorer) is not None:
                past = counts.past_costs
                assumed = assumed_cost(target.scorer, self.options.judge_price)
                self.charge(counts, sum(past, Decimal(0)) / len(past) if past else assumed)

    def charge(self, counts: ScorerCounts, cost_usd: Decimal | None) -> None:
        counts.judge_calls += 1
        counts.unpriced += cost_usd is None
        counts.cost_usd += cost_usd or 0

    # 採点 ------------------------------------------------------------------

    def score(self, todo: Sequence[_Todo]) -> None:
        pool = ThreadPoolExecutor(self.options.concurrency, thread_name_prefix="scoring")
        try:
            for trace_id, targets in todo:
                self.running.add(pool.submit(self.judge, trace_id, targets))
                if len(self.running) >= self.options.concurrency:
                    self.collect()
            while self.running:
                self.collect()
        except BaseException:  # 中断も含む: 始めた採点の結果を書いてから終わる
            pool.shutdown(cancel_futures=True)
            for future in self.running:
                with suppress(BudgetError):  # 書いたあとに送出される。残りも書く
                    if not future.cancelled():
                        self.write(*future.result())
            raise
        finally:
            pool.shutdown()

    def collect(self) -> None:
        done, _ = wait(self.running, timeout=RENEW_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            self.running.discard(future)
            self.write(*future.result())
            self.on_progress(self.report)
        self.checkpoint()

    def judge(self, trace_id: str, targets: list[ScoringTarget]) -> _Judged:
        try:
            trace = patiently(lambda: TracingClient().get_trace(trace_id))
        except MlflowException as error:
            if error.error_code not in _UNREADABLE:
                raise
            # 読めない 1 件のために、残りのトレースを何度やり直しても採点できない、とはしない
            logger.warning("trace %s cannot be scored: %s", trace_id, error.message)
            return trace_id, [_Outcome(target, "failed") for target in targets]
        return trace_id, [self.judge_one(trace, target) for target in targets]

    def judge_one(self, trace: Trace, target: ScoringTarget) -> _Outcome:
        if self.failures[target.name] >= self.options.max_consecutive_failures:
            return _Outcome(target, "not_started")
        expected = self.budget.reserve(target.name)
        if expected is None:
            self.report.stopped_by = "budget"
            return _Outcome(target, "not_started")
        self.throttle.wait()
        feedbacks = call_scorer(target.scorer, trace)
        cost = self.cost(target.scorer, feedbacks)
        self.budget.settle(target.name, expected, cost or Decimal(0))
        stale = self.identities[target.name].stale(trace.info.assessments)
        # 一部だけ失敗したら、成功した分も次に採点し直す(残すと、採点済みとして飛ばされる)
        if errors := [feedback for feedback in feedbacks if is_error(feedback)]:
            return _Outcome(target, "failed", errors[:1], cost, stale)
        return _Outcome(target, "scored" if feedbacks else "empty", feedbacks, cost, stale)

    def cost(self, scorer: Scorer, feedbacks: Sequence[Feedback]) -> Decimal | None:
        """ジャッジのコスト(USD)。答えを読めなかった呼び出しにも、プロバイダーは課金する。"""
        price = self.options.judge_price
        if judge_model(scorer) is None or not feedbacks:
            return Decimal(0)
        known = judge_cost(feedbacks, price)
        unread = known is None and any(map(is_error, feedbacks))
        return assumed_cost(scorer, price) if unread else known

    # 記録 ------------------------------------------------------------------

    def write(self, trace_id: str, outcomes: Sequence[_Outcome]) -> None:
        for outcome in outcomes:
            name, counts = outcome.target.name, self.report.scorers[outcome.target.name]
            kind = outcome.kind if self.stored(trace_id, outcome) else "failed"
            setattr(counts, kind, getattr(counts, kind) + 1)
            if kind == "scored":
                self.failures[name] = 0
            elif kind == "failed" and outcome.feedbacks:
                self.fail(name)
            if outcome.feedbacks and judge_model(outcome.target.scorer) is not None:
                self.charge(counts, outcome.cost_usd)
            if outcome.cost_usd is None and self.options.budget_usd is not None:
                raise BudgetError(
                    f"the cost of {name!r} is unknown, so budget_usd={self.options.budget_usd} "
                    "cannot be kept: pass judge_price=JudgePrice(...)"
                )

    def stored(self, trace_id: str, outcome: _Outcome) -> bool:
        """評価を書く。書けない 1 件のために、残りの採点を止めない。"""
        identity = self.identities[outcome.target.name]
        try:
            for old in outcome.stale:
                patiently(partial(mlflow.delete_assessment, trace_id, str(old.assessment_id)))
            for part, feedback in enumerate(outcome.feedbacks, 1):
                stamp = identity.stamp(part, len(outcome.feedbacks))
                feedback.metadata = {**(feedback.metadata or {}), **stamp}
                if not mlflow.get_tracking_uri().startswith("databricks"):
                    told = repr((trace_id, sorted(stamp.items()), is_error(feedback)))
                    feedback.assessment_id = f"a-{hashlib.sha256(told.encode()).hexdigest()[:32]}"
                patiently(partial(_log_once, trace_id, feedback))
        except MlflowException as error:
            logger.warning("%r of %s is not stored: %s", identity.name, trace_id, error.message)
            return False
        return True

    def fail(self, name: str) -> None:
        self.failures[name] += 1
        if self.failures[name] == self.options.max_consecutive_failures:
            self.report.stopped_by = self.report.stopped_by or "failures"
            logger.error("scorer %r failed %d times in a row: stopped", name, self.failures[name])


def _log_once(trace_id: str, assessment: Assessment) -> None:
    """評価を 1 件だけ書く。ID は中身から決めてあるので、同じ評価を二度送っても増えない。"""
    try:
        mlflow.log_assessment(trace_id, assessment)
    except MlflowException:  # 書けたのに応答だけが失われ、再試行が「同じ ID がある」と拒否された
        store: Any = TracingClient().store  # 書き出している途中のトレースでも、手元のコピーを見ない
        stored = store.get_trace_info(trace_id).assessments
        if assessment.assessment_id not in {a.assessment_id for a in stored}:
            raise
