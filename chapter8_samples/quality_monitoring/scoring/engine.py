"""8.3.5 保存済みのトレースを採点するエンジン(継続的評価とバックフィルの共通部品)。

``mlflow.genai.evaluate()`` は呼ぶたびに実行(run)を作り、同じトレースに評価を重ねて書く。ここでは
スコアラーを直接呼んで結果だけを書き、採点済みは飛ばす。途中で止めても、同じ呼び出しで再開できる。

Databricks では、登録したスコアラーを Databricks 自身が採点するので、このエンジンは要らない。
"""

from __future__ import annotations

import json
import logging
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, cast

import mlflow
from mlflow import MlflowClient
from mlflow.entities import (
    Assessment,
    AssessmentError,
    AssessmentSource,
    AssessmentSourceType,
    Feedback,
    Trace,
    TraceInfo,
)
from mlflow.exceptions import MlflowException
from mlflow.genai.scorers import Scorer
from mlflow.tracing.client import TracingClient

from .limits import Budget, Throttle
from .plan import (
    SCORER_NAME,
    BudgetError,
    ProgressCallback,
    ScorerCounts,
    ScoringError,
    ScoringOptions,
    ScoringReport,
    ScoringTarget,
    error_of,
    identity,
    judge_cost,
    judge_model,
    require_judges,
    sample,
    scored_by,
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
    """期間 ``[start, end)`` のトレースを採点する。採点済みは飛ばすので、続きから再開できる。

    Args:
        experiment_id: エクスペリメントの ID。
        targets: 使うスコアラー。
        start: この時刻以降に始まったトレースを対象にする(タイムゾーン付き)。
        end: この時刻より前に始まったトレースを対象にする(タイムゾーン付き)。
        on_progress: トレースを 1 件処理するたびに、途中の結果を渡して、採点のスレッドから呼ぶ。

    Raises:
        JudgeNotConfiguredError: ジャッジの API キーなどがない。
        BudgetError: 予算があるのに、ジャッジのコストが分からない。
        ScoringError: 引数が正しくない。
    """
    options = options or ScoringOptions()
    if start.tzinfo is None or end.tzinfo is None or start >= end:
        raise ScoringError(f"need timezone-aware start < end, got {start!r} and {end!r}")
    if not targets:
        raise ScoringError("no scorers to run: pass at least one")
    if not options.dry_run:
        require_judges([target.scorer for target in targets])
    report = ScoringReport(
        experiment_id=experiment_id, start=start, end=end, dry_run=options.dry_run
    )
    began = time.perf_counter()
    try:
        _run_apart(_Run(report, targets, options, on_progress or (lambda _: None)))
    finally:
        report.seconds = time.perf_counter() - began
    return report


def _run_apart(run: _Run) -> None:
    """採点を別のスレッドで行い、終わるのを待つ。

    Ctrl-C はメインスレッドに届く。そこで保存先を読み書きしていると、トランザクションの途中で
    中断し、ロックが残って、始めた採点の結果を書けなくなる。
    """
    try:
        Thread(target=copy_context().run, args=(run.guarded,), name="scoring").start()
        run.wait()
    except BaseException:
        run.stopping = True
        if run.started:  # スレッドを始める前に中断したのなら、待っても終わらない
            run.wait()
        if run.error is not None and not isinstance(run.error, _Interrupted):
            logger.error("scoring failed while it was being stopped: %s", run.error)
        raise
    if run.error is not None:
        raise run.error


@dataclass(frozen=True)
class _Outcome:
    target: ScoringTarget
    feedbacks: list[Feedback]
    started: bool = True
    readable: bool = True

    @property
    def failed(self) -> bool:
        return bool(self.errors)

    @property
    def errors(self) -> list[Feedback]:
        return [feedback for feedback in self.feedbacks if error_of(feedback) is not None]


class _Run:
    """採点 1 回。ジャッジは並列に呼び、書き込みは 1 スレッドで行う(SQLite はその方が速い)。"""

    def __init__(
        self,
        report: ScoringReport,
        targets: Sequence[ScoringTarget],
        options: ScoringOptions,
        on_progress: ProgressCallback,
    ) -> None:
        self.report, self.options, self.on_progress = report, options, on_progress
        self.throttle = Throttle(options.calls_per_second)
        self.budget = Budget(options.budget_usd)
        self.failures: dict[str, int] = defaultdict(int)
        self.identities = {target.name: identity(target.scorer) for target in targets}
        self.groups: dict[str | None, list[ScoringTarget]] = defaultdict(list)
        self.seen: set[str] = set()
        self.results: SimpleQueue[_Scored | BaseException] = SimpleQueue()
        self.running = 0
        self.stopping = False  # 呼んだ側が Ctrl-C などで中断した
        self.error: BaseException | None = None
        self.started = self.finished = False
        self.ended = Lock()
        self.ended.acquire()
        for target in targets:
            if target.name in report.scorers:
                raise ScoringError(f"scorer {target.name!r} is listed twice")
            report.scorers[target.name] = ScorerCounts()
            self.groups[target.filter_string].append(target)

    def guarded(self) -> None:
        self.started = True
        try:
            self.run()
        except BaseException as error:  # 呼んだ側のスレッドで投げ直す
            self.error = error
        finally:
            self.finished = True
            self.ended.release()

    def wait(self) -> None:
        """終わるのを待つ。

        ``Thread.join()`` は、Ctrl-C で中断するとスレッドが終わったことになる(Python 3.12 まで)。
        """
        while not self.finished:
            self.ended.acquire(timeout=0.1)  # 期限がないと、Windows では Ctrl-C が届かない

    def run(self) -> None:
        pool = ThreadPoolExecutor(self.options.concurrency, thread_name_prefix="scoring")
        try:
            for info, targets in self.pending():
                if self.options.dry_run:
                    for target in targets:
                        self.report.scorers[target.name].scored += 1
                    continue
                pool.submit(self.work, info, targets)
                self.running += 1
                if self.running >= self.options.concurrency:
                    self.collect()
            while self.running:
                self.collect()
        except BaseException:  # 中断も含む: 始めた採点の結果を書いてから終わる
            pool.shutdown(cancel_futures=True)
            self.drain()
            raise
        finally:
            pool.shutdown()

    def pending(self) -> Iterator[tuple[TraceInfo, list[ScoringTarget]]]:
        for filter_string, group in self.groups.items():
            for info in self.trace_infos(filter_string):
                self.check_stopping()
                self.seen.add(info.trace_id)
                self.report.traces = len(self.seen)
                todo = self.unscored(info, group)
                if todo:
                    yield info, todo

    def trace_infos(self, filter_string: str | None) -> Iterator[TraceInfo]:
        start = math.floor(self.report.start.timestamp() * 1000)
        end = math.ceil(self.report.end.timestamp() * 1000)  # MLflow の時刻はミリ秒で切り捨て
        window = f"timestamp_ms >= {start} AND timestamp_ms < {end} AND {_NOT_FROM_EVALUATION}"
        token: str | None = None
        while True:
            # 時刻の古い順なら、評価を書きながら読み進めてもページがずれない
            page = MlflowClient().search_traces(
                locations=[self.report.experiment_id],
                filter_string=f"{window} AND {filter_string}" if filter_string else window,
                max_results=self.options.page_size,
                order_by=["timestamp_ms ASC"],
                page_token=token,
                include_spans=False,
            )
            yield from (trace.info for trace in page)
            token = cast("str | None", page.token)
            if not token:
                return

    def unscored(self, info: TraceInfo, group: list[ScoringTarget]) -> list[ScoringTarget]:
        chosen = {target.name for target in sample(info.trace_id, group)}
        todo: list[ScoringTarget] = []
        for target in group:
            counts = self.report.scorers[target.name]
            if target.name not in chosen:
                counts.sampled_out += 1
            elif found := scored_by(info.assessments, self.identities[target.name]):
                counts.skipped += 1
                if known := self.costs(found):
                    counts.seen_calls += 1
                    counts.seen_cost_usd += sum(known, Decimal(0))
            else:
                todo.append(target)
        return todo

    def work(self, info: TraceInfo, targets: list[ScoringTarget]) -> None:
        try:
            self.results.put(self.judge(info, targets))
        except BaseException as error:  # 書き込むスレッドで投げ直す
            self.results.put(error)

    def judge(self, info: TraceInfo, targets: list[ScoringTarget]) -> _Scored:
        try:
            trace = TracingClient().get_trace(info.trace_id)
        except MlflowException as error:
            if error.error_code not in _UNREADABLE:
                raise
            # 読めない 1 件のために、残りのトレースを何度やり直しても採点できない、とはしない
            logger.warning("trace %s cannot be scored: %s", info.trace_id, error.message)
            return info, [_Outcome(target, [], readable=False) for target in targets]
        return info, [self.judge_one(trace, target) for target in targets]

    def judge_one(self, trace: Trace, target: ScoringTarget) -> _Outcome:
        if self.failures[target.name] >= self.options.max_consecutive_failures:
            return _Outcome(target, [], started=False)
        expected = self.budget.reserve(target.name)
        if expected is None:
            self.report.stopped_by = "budget"
            return _Outcome(target, [], started=False)
        self.throttle.wait()
        outcome = _Outcome(target, call_scorer(target.scorer, trace))
        self.budget.settle(target.name, expected, sum(self.costs(outcome.feedbacks), Decimal(0)))
        return outcome

    def costs(self, assessments: Sequence[Assessment]) -> list[Decimal]:
        """分かっているコストだけ。"""
        costs = [judge_cost(assessment, self.options.judge_price) for assessment in assessments]
        return [cost for cost in costs if cost is not None]

    def collect(self) -> None:
        scored = self.results.get()
        self.running -= 1
        if isinstance(scored, BaseException):
            raise scored
        self.write(*scored)
        self.check_stopping()
        self.on_progress(self.report)

    def check_stopping(self) -> None:
        if self.stopping:
            raise _Interrupted

    def drain(self) -> None:
        while not self.results.empty():
            scored = self.results.get()
            if isinstance(scored, BaseException):  # 次の実行で採点し直す
                logger.warning("one more trace could not be scored: %s", scored)
                continue
            with suppress(BudgetError):  # 書いたあとに送出される。残りも書く
                self.write(*scored)

    def write(self, info: TraceInfo, outcomes: list[_Outcome]) -> None:
        for outcome in outcomes:
            self.record(info, outcome)

    def record(self, info: TraceInfo, outcome: _Outcome) -> None:
        name = outcome.target.name
        counts = self.report.scorers[name]
        if not outcome.readable:
            counts.failed += 1
            return
        # 一部だけ失敗したら、成功した分も次の実行で採点し直す(残すと、採点済みとして飛ばされる)
        for feedback in outcome.errors or outcome.feedbacks:
            feedback.metadata = {**(feedback.metadata or {}), **self.identities[name]}
            _log_once(info.trace_id, feedback)
        if not outcome.started:
            counts.not_started += 1
        elif outcome.failed:
            counts.failed += 1
            self.fail(name)
        elif outcome.feedbacks:
            counts.scored += 1
            self.failures[name] = 0
        else:
            counts.empty += 1
        if outcome.started:
            self.forget_errors(info, name)
            self.charge(outcome)

    def forget_errors(self, info: TraceInfo, name: str) -> None:
        """採点し直したので、前回のエラーを消す(書いてから消すので、途中で止まっても失わない)。"""
        for old in info.assessments:
            same = (old.metadata or {}).get(SCORER_NAME) == name
            if same and error_of(old) is not None and old.assessment_id:
                mlflow.delete_assessment(info.trace_id, old.assessment_id)

    def fail(self, name: str) -> None:
        self.failures[name] += 1
        if self.failures[name] == self.options.max_consecutive_failures:
            self.report.stopped_by = self.report.stopped_by or "failures"
            logger.error("scorer %r failed %d times in a row: stopped", name, self.failures[name])

    def charge(self, outcome: _Outcome) -> None:
        if judge_model(outcome.target.scorer) is None or not outcome.feedbacks or outcome.failed:
            return
        counts, known = self.report.scorers[outcome.target.name], self.costs(outcome.feedbacks)
        counts.cost_usd += sum(known, Decimal(0))
        counts.unpriced += not known
        if not known and self.options.budget_usd is not None:
            raise BudgetError(
                f"the cost of {outcome.target.name!r} is unknown, so budget_usd="
                f"{self.options.budget_usd} cannot be kept: pass judge_price=JudgePrice(...)"
            )


class _Interrupted(Exception):
    """呼んだ側には、中断した例外(KeyboardInterrupt など)が届く。"""


_Scored = tuple[TraceInfo, list[_Outcome]]


def call_scorer(scorer: Scorer, trace: Trace) -> list[Feedback]:
    """スコアラーを 1 回呼ぶ。例外はエラーの付いた評価として返す。トレースは残さない。"""
    root = next((span for span in trace.data.spans if span.parent_id is None), None)
    expected = [a for a in trace.info.assessments if a.expectation is not None]
    # スコアラーの中で traced な関数が呼ばれても、監視対象のトレースに混ざらないようにする
    call: Callable[..., Any] = scorer.run  # pyright: ignore
    run = mlflow.trace(call, sampling_ratio_override=0.0)
    source = AssessmentSource(AssessmentSourceType.CODE, scorer.name)
    try:
        result = run(
            inputs=root.inputs if root else None,
            outputs=root.outputs if root else None,
            expectations={a.name: a.expectation.value for a in expected if a.expectation},
            trace=trace,
        )
        items = cast("list[Any]", result) if isinstance(result, list) else [result]
        feedbacks = [
            item
            if isinstance(item, Feedback)
            else Feedback(name=scorer.name, value=item, source=source)
            for item in items
            if item is not None
        ]
        for feedback in feedbacks:
            _check_storable(feedback)
    except Exception as error:  # スコアラーは利用者のコードも含む。1 件の失敗で全体を止めない
        logger.warning("scorer %r failed on %s: %s", scorer.name, trace.info.trace_id, error)
        reason = AssessmentError(error_code="SCORER_ERROR", error_message=str(error))
        return [Feedback(name=scorer.name, error=reason, source=source)]
    return feedbacks


def _check_storable(feedback: Feedback) -> None:
    """NaN や、対になっていないサロゲートは、HTTP で送れない(SQLite には入る)。"""
    told = [feedback.value, feedback.rationale]
    try:
        json.dumps(told, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{feedback.name} = {feedback.value!r} cannot be stored: {error}"
        ) from error


def _log_once(trace_id: str, assessment: Assessment) -> None:
    """評価を 1 件だけ書く。ID をこちらで決めるので、HTTP の再試行が同じ内容を送っても増えない。"""
    if not mlflow.get_tracking_uri().startswith("databricks"):
        assessment.assessment_id = f"a-{uuid.uuid4().hex}"
    try:
        mlflow.log_assessment(trace_id, assessment)
    except MlflowException:  # 書けたのに応答だけが失われ、再試行が「同じ ID がある」と断られた
        store: Any = TracingClient().store  # 書き出している途中のトレースでも、手元の写しを見ない
        stored = store.get_trace_info(trace_id).assessments
        if assessment.assessment_id not in {a.assessment_id for a in stored}:
            raise
