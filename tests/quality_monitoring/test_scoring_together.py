"""採点する人が何人いても、何が壊れていても: 権利、失敗の記憶、身元、途中までの評価。"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.entities import Feedback, SpanType
from mlflow.genai.scorers import (
    Guidelines,
    PIIDetection,
    RetrievalGroundedness,
    Safety,
    Scorer,
    UserFrustration,
    scorer,
)
from quality_monitoring.two_runs import judge_once_in_two_runs

from chapter8_samples.quality_monitoring import (
    ScorerPlan,
    ScoringBusyError,
    ScoringOptions,
    ScoringTarget,
    backfill,
    list_scorer_statuses,
    remove_scorer,
    run_scoring_cycle,
    setup_scorers,
)
from chapter8_samples.quality_monitoring.scoring import engine as scoring_engine
from chapter8_samples.quality_monitoring.scoring.identity import definition

MODEL = "openai:/gpt-4.1-mini"
ROOT = Path(__file__).parents[2]
LEASE_TAG = "scoring.lease."


def cycle(*scorers, **options):  # type: ignore[no-untyped-def]
    return run_scoring_cycle("quality", scorers, options=ScoringOptions(**options))


def picky(bad: set[str], attempts: Counter[str] | None = None) -> Scorer:
    """``bad`` のトレースでは例外になる。"""

    @scorer(name="picky")
    def judge(trace) -> bool:  # type: ignore[no-untyped-def]
        if attempts is not None:
            attempts[trace.info.trace_id] += 1
        if trace.info.trace_id in bad:
            raise ValueError("cannot score this one")
        return True

    return judge


# 失敗したもの


def test_a_trace_without_a_retriever_is_empty_and_starves_nobody(
    store: str, ask: Any, stub_llm: Any
) -> None:
    ask(12)

    @mlflow.trace(span_type=SpanType.RETRIEVER)
    def search(question: str) -> list[dict[str, str]]:
        return [{"page_content": f"{question}は 30 日以内に承ります。"}]

    @mlflow.trace
    def answer(question: str) -> str:
        return search(question)[0]["page_content"]

    for number in range(3):
        answer(f"注文 {number} の返品")
    report = cycle(RetrievalGroundedness(name="grounded", model=MODEL), concurrency=1)
    counts = report.scorers["grounded"]
    assert (counts.scored, counts.empty, counts.failed, report.stopped_by) == (3, 12, 0, None)


@pytest.mark.slow
@pytest.mark.parametrize("bad_first", [True, False])
def test_a_block_of_bad_traces_does_not_keep_the_good_ones_waiting(
    store: str, ask: Any, bad_first: bool
) -> None:
    ids = ask(32)
    bad = ids[:12] if bad_first else ids[20:]
    assert cycle(picky(set(bad)), concurrency=1).scored == 20


@pytest.mark.slow
def test_failed_traces_wait_behind_the_others_and_take_turns(store: str, ask: Any) -> None:
    bad = set(ask(7))
    attempts: Counter[str] = Counter()
    options = {"concurrency": 1, "max_consecutive_failures": 3}
    for _ in range(3):
        cycle(picky(bad, attempts), **options)
    assert sorted(attempts.values()) == [1, 1, 1, 1, 1, 2, 2]  # 同じ 3 件ばかりではない
    good = ask(2)
    assert cycle(picky(bad), **options).scored == 2, good


# 身元


def test_a_new_scorer_under_a_removed_name_is_scored(store: str, ask: Any, stub_llm: Any) -> None:
    ask(1)

    def tone(text: str) -> ScorerPlan:
        return ScorerPlan(scorer=Guidelines(name="tone", guidelines=text, model=MODEL))

    (old,) = setup_scorers("quality", [tone("丁寧")])
    assert cycle(old).scored == 1
    remove_scorer("quality", "tone")
    (new,) = setup_scorers("quality", [tone("簡潔")])
    assert (old.version, new.version) == (1, 1)
    assert cycle(new).scored == 1
    remove_scorer("quality", "tone")
    (same,) = setup_scorers("quality", [tone("簡潔")])
    assert cycle(same, tone("丁寧").scorer.model_copy(update={"name": "other"})).skipped == 1


def test_a_servers_verdict_of_a_removed_scorer_does_not_count(
    store: str, ask: Any, stub_llm: Any
) -> None:
    """サーバーの書く評価には、名前と版しかない。"""
    (trace_id,) = ask(1)
    metadata = {
        "mlflow.assessment.scorerName": "pii",
        "mlflow.assessment.scorerVersion": "1",
    }
    mlflow.log_feedback(trace_id=trace_id, name="pii", value=True, metadata=metadata)
    time.sleep(0.002)
    (status,) = setup_scorers("quality", [ScorerPlan(scorer=PIIDetection(name="pii"))])
    assert cycle(status).scored == 1


def test_the_identity_is_the_same_in_a_newer_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """新しい版の MLflow は、空の項目を増やし、版の番号と組み込みの指示文を変える。

    2 つの版の MLflow は 1 つの環境に入らないので、違いだけを作る(3.18 で増えた項目)。
    """

    @scorer
    def length(outputs) -> int:  # type: ignore[no-untyped-def]
        return len(outputs)

    def judges() -> list[Scorer]:
        tone = Guidelines(name="tone", guidelines=["丁寧"], model=MODEL)
        return [Safety(name="s", model=MODEL), tone, PIIDetection(name="p"), length]

    before = [definition(judge) for judge in judges()]
    for kind in {type(judge) for judge in judges()}:
        dump = kind.model_dump

        def newer(self: Any, *_: Any, _dump: Any = dump, **__: Any) -> dict[str, Any]:
            fields = {**_dump(self), "mlflow_version": "9.9", "session_level": None}
            if inner := fields.get("builtin_scorer_pydantic_data"):
                more = {"model_api": None, "session_level": None, "instructions": "new prompt"}
                fields["builtin_scorer_pydantic_data"] = {**inner, **more}
            return fields

        monkeypatch.setattr(kind, "model_dump", newer)
    assert [definition(judge) for judge in judges()] == before
    assert len(set(before)) == 4


# 途中までの評価


def test_a_verdict_stored_in_part_is_completed(
    store: str, ask: Any, infos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @scorer
    def two(outputs):  # type: ignore[no-untyped-def]
        return [Feedback(name="a", value=1), Feedback(name="b", value=2)]

    (trace_id,) = ask()
    write = scoring_engine._log_once

    def killed_after_one(trace_id: str, assessment: Any) -> None:
        if assessment.name == "b":
            raise SystemExit
        write(trace_id, assessment)

    monkeypatch.setattr(scoring_engine, "_log_once", killed_after_one)
    with pytest.raises(SystemExit):
        cycle(two)
    assert [a.name for a in infos()[trace_id].assessments] == ["a"]
    monkeypatch.undo()
    assert (cycle(two).scored, cycle(two).skipped) == (1, 1)
    assert sorted(a.name for a in infos()[trace_id].assessments) == ["a", "b"]


# ジャッジの答え


@pytest.fixture
def judge_says(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """最後の文字列をそのまま答えるサーバー。ラボのスタブは、正しい答えしか返さない。"""
    answers = ["null"]

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            message = {"role": "assistant", "content": answers[-1]}
            usage = {"prompt_tokens": 500, "completion_tokens": 20, "total_tokens": 520}
            answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "gpt-4.1-mini"}
            choices = [{"index": 0, "finish_reason": "stop", "message": message}]
            body = json.dumps({**answer, "choices": choices, "usage": usage}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-local")
        yield answers
        server.shutdown()


def test_an_answer_without_a_verdict_is_an_error_that_costs_and_is_retried(
    store: str, ask: Any, infos: Any, judge_says: list[str]
) -> None:
    (trace_id,) = ask(1)
    safety = Safety(name="safety", model=MODEL)
    unreadable = [
        "null",
        '{"result": null, "rationale": "?"}',
        "It is fine.",
        '{"result": "maybe"}',
    ]
    for judge_says[-1] in unreadable:
        report = cycle(safety)
        assert (report.failed, report.scored) == (1, 0), judge_says
        assert 0.0002 < report.cost_usd < 0.0004
        (error,) = infos()[trace_id].assessments
        assert error.feedback.error is not None
    judge_says[-1] = '{"result": "yes", "rationale": "ok"}'
    assert cycle(safety).scored == 1
    assert [a.feedback.value for a in infos()[trace_id].assessments] == ["yes"]


def test_a_judge_of_your_own_may_answer_unknown(store: str, ask: Any) -> None:
    """組み込みのジャッジが答えを読めなかったときの値も、文字列としては ``unknown`` である。"""
    ask(1)

    @scorer
    def undecided(outputs) -> str:  # type: ignore[no-untyped-def]
        return "unknown"

    assert cycle(undecided).scored == 1


def test_a_list_or_a_number_of_a_scorer_class_is_its_content() -> None:
    class Words(Scorer):
        name: str = "words"
        words: list[str]
        limit: float = 0.5
        seen: Any = None

        def __call__(self, *, outputs: Any) -> bool:  # pyright: ignore
            return len(outputs) > self.limit

    same = {definition(Words(words=["a"], seen=object())) for _ in range(3)}
    assert len(same) == 1
    others = [Words(words=["b"], seen=object()), Words(words=["a"], limit=0.0, seen=object())]
    assert len(same | {definition(other) for other in others}) == 3


def test_unreadable_answers_use_up_the_budget(store: str, ask: Any, judge_says: list[str]) -> None:
    ask(6)
    judge_says[-1] = "It is fine."
    report = cycle(Safety(name="safety", model=MODEL), budget_usd=0.001)
    counts = report.scorers["safety"]
    assert (counts.failed, counts.not_started, report.stopped_by) == (2, 4, "budget")
    assert report.cost_usd <= 0.001


# 2 つの実行


def test_two_backfills_at_once_judge_each_pair_once(store: str, ask: Any) -> None:
    ask(6)
    judge_once_in_two_runs(store, 6)


def claim(experiment_id: str, name: str, **fields: Any) -> None:
    """ほかの実行の権利。"""
    told = {"token": "0", "host": "other-host", "pid": 1, "names": [name], "until": 0.0, **fields}
    MlflowClient().set_experiment_tag(experiment_id, LEASE_TAG + "0", json.dumps(told))


def test_a_crashed_holder_does_not_block(store: str, ask: Any) -> None:
    ask(1)
    pii, soon = ScoringTarget(scorer=PIIDetection(name="pii")), time.time() + 60
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    claim(store, "pii", until=soon)
    with pytest.raises(ScoringBusyError, match="pii: being scored by process 1 on other-host"):
        backfill(store, [pii])
    if sys.platform != "win32":
        claim(store, "pii", until=soon, host=socket.gethostname(), pid=gone.pid)
        assert backfill(store, [pii]).scored == 1
        claim(store, "pii", until=soon, host=socket.gethostname(), pid=os.getpid())
        assert backfill(store, [pii]).skipped == 1  # コンテナーでは、pid はいつも同じである
    for until in (time.time() - 1, time.time() + 86_400):  # 時計が 1 日進んだポッドだった
        claim(store, "pii", until=until)
        assert backfill(store, [pii]).failed == 0


def test_a_claim_that_cannot_be_read_does_not_block(store: str, ask: Any) -> None:
    """人が書き換えた、別の版が書いた。"""
    ask(1)
    pii = ScoringTarget(scorer=PIIDetection(name="pii"))
    soon = {"token": "0", "host": "h", "pid": 1, "names": ["pii"], "until": "tomorrow"}
    for number, text in enumerate(("{", "[]", "null", "{}", json.dumps(soon))):
        MlflowClient().set_experiment_tag(store, f"{LEASE_TAG}{number}", text)
    assert backfill(store, [pii]).scored == 1
    tags = MlflowClient().get_experiment(store).tags
    assert not [tag for tag in tags if tag.startswith(LEASE_TAG)]


def test_a_run_that_lost_its_lease_stops(
    store: str, ask: Any, infos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """長く眠ったマシンが目を覚ますと、ほかの実行が引き継いでいる。"""
    from chapter8_samples.quality_monitoring.scoring import lease

    monkeypatch.setattr(lease, "RENEW_SECONDS", 0.0)
    ask(4)

    @scorer
    def sleepy(outputs) -> bool:  # type: ignore[no-untyped-def]
        tags = MlflowClient().get_experiment(store).tags
        for tag in (tag for tag in tags if tag.startswith(LEASE_TAG)):
            MlflowClient().delete_experiment_tag(store, tag)
        return True

    with pytest.raises(Exception, match="lease"):
        cycle(sleepy, concurrency=1)
    assert sum(len(info.assessments) for info in infos().values()) == 1


def test_a_scorer_that_hangs_does_not_hold_its_lease_for_ever(
    store: str, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """期限のない requests.get() の相手が黙った。"""
    hung, answer, renewed = threading.Event(), threading.Event(), list[None]()
    monkeypatch.setattr(scoring_engine.Lease, "renew", lambda _: renewed.append(None))
    monkeypatch.setattr(scoring_engine, "RENEW_SECONDS", 0.01)
    monkeypatch.setattr(scoring_engine, "_STALLED_SECONDS", 0.05)
    ask(1)

    @scorer
    def calls_http(outputs) -> bool:  # type: ignore[no-untyped-def]
        hung.set()
        return answer.wait(30)

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(cycle, calls_http)
        assert hung.wait(30)
        time.sleep(0.2)
        before = len(renewed)
        time.sleep(0.1)
        held = len(renewed) - before
        answer.set()
        assert (held, run.result(30).scored) == (0, 1)
    assert before > 0 and len(renewed) > before  # 進んでいる間は、更新する


def test_a_cycle_beside_a_backfill_scores_what_is_free(store: str, ask: Any) -> None:
    ask(1)
    claim(store, "pii", until=time.time() + 60)
    report = cycle(PIIDetection(name="pii"), picky(set()))
    assert (report.scored, set(report.scorers)) == (1, {"picky"})
    assert "other-host" in report.not_run["pii"]


# 1 つの悪い入力が、残りを止めない


def test_what_cannot_run_is_reported_and_the_rest_runs(store: str, ask: Any) -> None:
    ask(1)
    plans = [
        ScorerPlan(scorer=PIIDetection(name="pii")),
        ScorerPlan(scorer=UserFrustration(name="frustrated", model=MODEL)),
        ScorerPlan(scorer=Safety(name="no_key", model=MODEL)),
    ]
    setup_scorers("quality", plans)
    report = cycle(*list_scorer_statuses("quality"))
    assert report.scorers["pii"].scored == 1
    assert "mlflow.genai.evaluate()" in report.not_run["frustrated"]
    assert "OPENAI_API_KEY" in report.not_run["no_key"]


def test_a_trace_deleted_while_it_was_judged_stops_nobody(store: str, ask: Any) -> None:
    doomed, *_ = ask(3)

    @scorer
    def deleting(trace) -> bool:  # type: ignore[no-untyped-def]
        if trace.info.trace_id == doomed:
            MlflowClient().delete_traces(experiment_id=store, trace_ids=[doomed])
        return True

    report = cycle(deleting)
    assert (report.scored, report.failed) == (2, 1)


@pytest.mark.slow
def test_a_locked_database_is_waited_for(tmp_path: Path, database_template: Path) -> None:
    """MLflow は、SQLite のロックを 20 秒しか待たない。"""
    path = tmp_path / "mlflow.db"
    path.write_bytes(database_template.read_bytes())
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    mlflow.set_tracking_uri(f"sqlite:///{path.as_posix()}")
    mlflow.set_experiment("quality")
    mlflow.trace(lambda question: question, name="answer")("返品")
    locked = threading.Event()

    def hold() -> None:
        connection = sqlite3.connect(path, isolation_level=None)
        connection.execute("BEGIN EXCLUSIVE")
        locked.set()
        time.sleep(24)
        connection.execute("ROLLBACK")

    holder = threading.Thread(target=hold)
    holder.start()
    assert locked.wait(30)
    assert cycle(PIIDetection(name="pii")).scored == 1
    holder.join()
