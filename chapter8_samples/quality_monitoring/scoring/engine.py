"""8.3.5 保存済みのトレースを採点するエンジン(継続的評価とバックフィルの共通部品)。

``mlflow.genai.evaluate()`` は呼ぶたびに実行(run)を作り、同じトレースに評価を重ねて書く。ここでは
スコアラーを直接呼んで結果だけを書き、採点済みは飛ばす。途中で止めても、同じ呼び出しで再開できる。

先に期間のトレースをすべて読み、失敗したことのあるものは後に回す(採点できないトレースがあっても、残りは
採点される)。次にスコアラーを並列に呼び、終わったものから書く。
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import partial
from threading import Event, Lock, Thread
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Assessment, Feedback, Trace, TraceInfo
from mlflow.exceptions import MlflowException
from mlflow.tracing.client import TracingClient

from .identity import Identity, identity_of, is_error
from .judges import (
    Budget,
    BudgetError,
    ScoringError,
    assumed_cost,
    call_cost,
    judge_model,
    require_judges,
)
from .judging import call_scorer
from .lease import RENEW_SECONDS, Lease, patiently
from .plan import (
    ProgressCallback,
    ScorerCounts,
    ScoringOptions,
    ScoringReport,
    ScoringTarget,
    sample,
)

logger = logging.getLogger(__name__)

_PAGE_SIZE = 100
_STALLED_SECONDS = 1800.0  # 何も進まなければ、権利を更新しない(次の実行が、残りを採点する)
_NOT_FROM_EVALUATION = "metadata.`mlflow.sourceRun` IS NULL"
# 探してから読むまでに消された、スパンが保存されていない、壊れている
_UNREADABLE = {"RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "BAD_REQUEST"}
_UNREAD = 3  # ほかの理由で、続けてこの件数が読めなければ、保存先が止まっているとみなす


def score_traces(
    experiment_id: str,
    targets: Sequence[ScoringTarget],
    *,
    start: datetime,
    end: datetime,
    options: ScoringOptions | None = None,
    dry_run: bool = False,
    on_progress: ProgressCallback | None = None,
) -> ScoringReport:
    """期間 ``[start, end)``(タイムゾーン付き)のトレースを採点する。採点済みは飛ばす。

    ``dry_run`` では見積もるだけで、スコアラーを呼ばず、何も書かない。``on_progress`` は、トレースを
    1 件採点するたびに、途中の結果を渡して、採点のスレッドから呼ぶ。

    Raises:
        ScoringBusyError: ほかの実行が、同じスコアラーで採点している。
        JudgeNotConfiguredError: ジャッジの API キーなどがない。
        BudgetError: 予算があるのに、ジャッジのコストが分からない。
        ScoringError: 引数が正しくない、保存先を読み書きできない。
    """
    names = [target.name for target in targets]
    if start.tzinfo is None or end.tzinfo is None or start >= end:
        raise ScoringError(f"need timezone-aware start < end, got {start!r} and {end!r}")
    if not targets:
        raise ScoringError("no scorers to run: pass at least one")
    if len(set(names)) < len(names):
        raise ScoringError(f"a scorer is listed twice: {names}")
    if not dry_run:
        require_judges([target.scorer for target in targets])
    report = ScoringReport(experiment_id=experiment_id, start=start, end=end)
    report.scorers = {name: ScorerCounts() for name in names}
    run = _Run(report, targets, options or ScoringOptions(), on_progress)
    began = time.perf_counter()
    try:
        _run_apart(run.estimate if dry_run else run.score, run.interrupted)
    except MlflowException as error:
        raise ScoringError(f"cannot score experiment {experiment_id}: {error.message}") from error
    report.seconds = time.perf_counter() - began
    return report


def _run_apart(work: Callable[[], None], interrupted: Event) -> None:
    """別のスレッドで行い、終わるのを待つ。

    Ctrl-C はメインスレッドに届く。そこで保存先を読み書きしていると、トランザクションの途中で
    中断し、ロックが残って、始めた採点の結果を書けなくなる。
    """
    done: Future[None] = Future()

    def run() -> None:
        if done.set_running_or_notify_cancel():
            try:
                work()
                done.set_result(None)
            except BaseException as error:  # 呼んだ側のスレッドで投げ直す
                done.set_exception(error)

    try:
        Thread(target=run, name="scoring-run").start()
        while not done.done():
            wait([done], timeout=0.1)  # 期限がないと、Windows では Ctrl-C が届かない
    except BaseException:
        interrupted.set()
        # スレッドを作る途中で中断すると join() できないので、結果が出るのを待つ
        if not done.cancel():
            wait([done])
        raise
    done.result()


@dataclass
class _Run:
    """採点 1 回。"""

    report: ScoringReport
    targets: Sequence[ScoringTarget]
    options: ScoringOptions
    on_progress: ProgressCallback | None
    interrupted: Event = field(default_factory=Event)  # 呼んだ側が Ctrl-C などで中断した
    identities: dict[str, Identity] = field(default_factory=dict[str, Identity])
    failures: Counter[str] = field(default_factory=Counter[str])  # 続けて失敗した回数
    unread: int = 0  # 続けて読めなかったトレースの数
    moved_at: float = field(default_factory=time.monotonic)  # 最後に進んだ時刻
    lock: Lock = field(default_factory=Lock)  # 書くのと数えるのは 1 件ずつ(SQLite はその方が速い)

    def __post_init__(self) -> None:
        self.lease = Lease(self.report.experiment_id, list(self.report.scorers))
        self.budget = Budget(self.options.budget_usd)

    def estimate(self) -> None:
        """採点することになる件数と、ジャッジのコスト(1 回の標準的な長さから)。"""
        for _, targets in self.todo():
            for target in targets:
                counts = self.report.scorers[target.name]
                counts.scored += 1
                if judge_model(target.scorer) is not None:
                    counts.charge(assumed_cost(target.scorer, self.options.judge_price))

    def score(self) -> None:
        """採点する。途中で例外になっても、始めた採点は、書き終わるまで待つ。"""
        with self.lease:
            todo = self.todo()
            with ThreadPoolExecutor(self.options.concurrency, "scoring") as pool:
                running: set[Future[None]] = set()
                for trace_id, targets in todo:
                    running.add(pool.submit(self.score_trace, trace_id, targets))
                    while len(running) >= self.options.concurrency:
                        running = self.still_running(running)
                while running:
                    running = self.still_running(running)

    def still_running(self, running: set[Future[None]]) -> set[Future[None]]:
        done, running = wait(running, timeout=RENEW_SECONDS, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        self.check_in(moved=bool(done))
        return running

    def check_in(self, *, moved: bool = True) -> None:
        """続けてよいことを確かめる。"""
        if self.interrupted.is_set():
            raise KeyboardInterrupt  # 呼んだ側には、中断した例外が届く
        if moved:
            self.moved_at = time.monotonic()
        if time.monotonic() - self.moved_at < _STALLED_SECONDS:
            self.lease.renew()

    # 計画 ------------------------------------------------------------------

    def todo(self) -> list[tuple[str, list[ScoringTarget]]]:
        """失敗したことのない仕事、失敗した仕事(古い順)。それぞれの中は、時期の偏らない順。"""
        experiment_id = self.report.experiment_id
        self.identities = {t.name: identity_of(t.scorer, experiment_id) for t in self.targets}
        found: dict[tuple[int, str, str], list[ScoringTarget]] = defaultdict(list)
        seen: set[str] = set()
        for filter_string in {target.filter_string for target in self.targets}:
            group = [t for t in self.targets if t.filter_string == filter_string]
            read: set[str] = set()
            for info in self.trace_infos(filter_string):
                self.check_in()
                if info.trace_id in read:
                    continue
                read.add(info.trace_id)
                spread = hashlib.sha256(info.trace_id.encode()).hexdigest()
                for target in self.unscored(info, group):
                    failed_at = self.identities[target.name].failed_at_ms(info.assessments)
                    found[failed_at, spread, info.trace_id].append(target)
            seen |= read
        self.report.traces = len(seen)
        return [(key[-1], found[key]) for key in sorted(found)]

    def trace_infos(self, filter_string: str | None) -> Iterator[TraceInfo]:
        start = math.floor(self.report.start.timestamp() * 1000)
        end = math.ceil(self.report.end.timestamp() * 1000)  # MLflow の時刻はミリ秒で切り捨て
        window = f"timestamp_ms >= {start} AND timestamp_ms < {end} AND {_NOT_FROM_EVALUATION}"
        search = partial(
            MlflowClient().search_traces,
            locations=[self.report.experiment_id],
            filter_string=f"{window} AND {filter_string}" if filter_string else window,
            max_results=_PAGE_SIZE,
            order_by=["timestamp_ms ASC"],  # 新しいトレースが増えても、ページはずれない
            include_spans=False,
        )
        page = patiently(search)
        yield from (trace.info for trace in page)
        while page.token:
            page = patiently(partial(search, page_token=page.token))
            yield from (trace.info for trace in page)

    def unscored(self, info: TraceInfo, group: list[ScoringTarget]) -> Iterator[ScoringTarget]:
        chosen = {target.name for target in sample(info.trace_id, group)}
        for target in group:
            counts = self.report.scorers[target.name]
            if target.name not in chosen:
                counts.sampled_out += 1
            elif self.identities[target.name].has_scored(info.assessments):
                counts.skipped += 1
            else:
                yield target

    # 1 件の採点(並列) -----------------------------------------------------

    def score_trace(self, trace_id: str, targets: list[ScoringTarget]) -> None:
        trace = self.read(trace_id)
        if trace is None:
            with self.lock:
                for target in targets:
                    self.report.scorers[target.name].failed += 1
            return
        for target in targets:
            self.score_one(trace, target)
        with self.lock:
            if self.on_progress:
                self.on_progress(self.report)

    def read(self, trace_id: str) -> Trace | None:
        """読めないトレースが 1 件あっても、残りの採点は続ける。"""
        reason: object = "it has no spans"  # アーカイブに届かないときも、MLflow はこう返す
        try:
            trace = patiently(lambda: TracingClient().get_trace(trace_id))
            self.unread = 0
            if trace.data.spans:
                return trace
        except Exception as error:  # 壊れたスパンは、SQLite では MlflowException にならない
            told = getattr(error, "error_code", None) in _UNREADABLE
            self.unread = 0 if told else self.unread + 1
            if self.unread >= _UNREAD:
                raise ScoringError(f"{_UNREAD} traces in a row cannot be read: {error}") from error
            reason = error
        logger.warning("trace %s cannot be scored: %s", trace_id, reason)
        return None

    def score_one(self, trace: Trace, target: ScoringTarget) -> None:
        name = target.name
        counts = self.report.scorers[name]
        self.moved_at = time.monotonic()
        expected_usd = self.may_start(name)
        if expected_usd is None:
            with self.lock:
                counts.not_started += 1
            return
        cost_usd: Decimal | None = expected_usd
        try:
            feedbacks = call_scorer(target.scorer, trace)
            cost_usd = call_cost(target.scorer, feedbacks, self.options.judge_price)
        finally:  # 何が起きても。ほかのスレッドは、最初の 1 回のコストを待っている
            self.budget.settle(name, expected_usd, cost_usd or Decimal(0))
        with self.lock:
            if feedbacks and judge_model(target.scorer) is not None:
                counts.charge(cost_usd)
            self.record(trace.info, name, feedbacks)
        if cost_usd is None and self.options.budget_usd is not None:
            raise BudgetError(
                f"the cost of {name!r} is unknown, so budget_usd={self.options.budget_usd} "
                "cannot be kept: pass judge_price=JudgePrice(...)"
            )

    def may_start(self, name: str) -> Decimal | None:
        """見込みのコスト(USD)を確保する。続けて失敗したか、予算が足りなければ ``None``。"""
        if self.failures[name] >= self.options.max_consecutive_failures:
            return None
        expected_usd = self.budget.reserve(name)
        if expected_usd is None:
            self.report.stopped_by = "budget"
        return expected_usd

    def record(self, info: TraceInfo, name: str, feedbacks: Sequence[Feedback]) -> None:
        """書いて、数える。書けない 1 件のために、残りの採点を止めない。"""
        counts = self.report.scorers[name]
        # 一部だけ失敗したら、成功した分も次に採点し直す(残すと、採点済みとして飛ばされる)
        errors = [feedback for feedback in feedbacks if is_error(feedback)][:1]
        try:
            self.write(info, name, errors or feedbacks)
        except MlflowException as error:
            logger.warning("%r of %s is not stored: %s", name, info.trace_id, error.message)
            self.fail(name)
            return
        if errors:
            self.fail(name)
        elif feedbacks:
            counts.scored += 1
            self.failures[name] = 0
        else:
            counts.empty += 1

    def write(self, info: TraceInfo, name: str, feedbacks: Sequence[Feedback]) -> None:
        identity, trace_id = self.identities[name], info.trace_id
        for old in filter(identity.is_stale, info.assessments):
            patiently(partial(mlflow.delete_assessment, trace_id, str(old.assessment_id)))
        stamp = identity.stamp(len(feedbacks))
        for part, feedback in enumerate(feedbacks):
            feedback.metadata = {**(feedback.metadata or {}), **stamp}
            if not mlflow.get_tracking_uri().startswith("databricks"):
                told = repr((trace_id, sorted(stamp.items()), part, is_error(feedback)))
                feedback.assessment_id = f"a-{hashlib.sha256(told.encode()).hexdigest()[:32]}"
            patiently(partial(_log_once, trace_id, feedback))

    def fail(self, name: str) -> None:
        self.report.scorers[name].failed += 1
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
