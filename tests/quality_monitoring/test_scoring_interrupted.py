"""採点の途中で: 応答が失われる、Ctrl-C。"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import Assessment, Trace
from mlflow.genai.scorers import PIIDetection, Safety, scorer
from sqlalchemy import event
from sqlalchemy.engine import Engine

from chapter8_samples.quality_monitoring import (
    BudgetError,
    ScoringOptions,
    ScoringTarget,
    run_scoring_cycle,
)
from chapter8_samples.quality_monitoring.scoring import engine as scoring_engine
from chapter8_samples.quality_monitoring.scoring.engine import score_traces

ROOT = Path(__file__).parents[2]
PROGRAM = """
import faulthandler, sys, time
import mlflow
from mlflow.genai.scorers import scorer
from chapter8_samples.quality_monitoring import ScoringOptions, ScoringTarget, backfill

@scorer
def slow(outputs):
    time.sleep(0.05)
    return True

def told(report):
    print(report.scored, flush=True)

faulthandler.dump_traceback_later(120, exit=True)  # 止まったら、止まった場所を画面に出して終わる
mlflow.set_tracking_uri(sys.argv[1])
two = ScoringOptions(concurrency=2)
report = backfill(sys.argv[2], [ScoringTarget(scorer=slow)], options=two, on_progress=told)
print(report.scored, report.skipped, report.failed)
"""


def test_a_repeated_write_is_stored_once(
    store: str, ask: Any, infos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """書けたのに応答だけが失われ、HTTP の再試行が同じ評価をもう一度送る。"""
    ask(3)
    write = mlflow.log_assessment

    def twice(trace_id: str, assessment: Assessment) -> Assessment:
        write(trace_id, assessment)
        return write(trace_id, assessment)

    monkeypatch.setattr(mlflow, "log_assessment", twice)
    report = run_scoring_cycle(store, [PIIDetection(name="pii")])
    assert (report.scored, report.failed) == (3, 0)
    assert [len(info.assessments) for info in infos().values()] == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_on_any_line_neither_hangs_nor_loses_a_result(tmp_path: Path) -> None:
    program = str(Path(__file__).with_name("interrupt_every_line.py"))
    done = subprocess.run(
        [sys.executable, program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines, stored = map(int, done.stdout.split())
    assert lines > 100 and stored == 6  # 最後の 1 回は中断していない


def test_ctrl_c_while_the_thread_starts_waits_for_what_it_began(
    store: str, ask: Any, infos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[str] = []
    judging = threading.Event()

    class Interrupted(threading.Thread):
        def start(self) -> None:
            super().start()
            assert judging.wait(30)
            raise KeyboardInterrupt

    @scorer
    def quick(trace) -> bool:  # type: ignore[no-untyped-def]
        judged.append(trace.info.trace_id)
        judging.set()
        return True

    ask(3)
    monkeypatch.setattr(scoring_engine, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_scoring_cycle(store, [quick])
    stored = [trace_id for trace_id, info in infos().items() if info.assessments]
    assert sorted(stored) == sorted(judged)
    assert not [t for t in threading.enumerate() if t.name.startswith("scoring")]


def test_ctrl_c_cannot_stop_a_transaction(store: str, ask: Any, infos: Any) -> None:
    """中断した接続が SQLite のロックを持ったまま残ると、始めた採点の結果を書けない。"""
    ask(3)
    caller = threading.current_thread()

    def interrupt(*_: Any) -> None:
        if threading.current_thread() is caller:
            pytest.fail("Ctrl-C could arrive here")

    event.listen(Engine, "after_cursor_execute", interrupt)
    now = datetime.now(timezone.utc)
    hour = timedelta(hours=1)
    try:
        score_traces(
            store,
            [ScoringTarget(scorer=PIIDetection(name="pii"))],
            start=now - hour,
            end=now + hour,
        )
    finally:
        event.remove(Engine, "after_cursor_execute", interrupt)
    assert [len(info.assessments) for info in infos().values()] == [1] * 3


@pytest.mark.slow
def test_results_of_running_judges_are_kept_when_the_budget_cannot_be(
    store: str, ask: Any, infos: Any, stub_llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(4)
    started, read = threading.Barrier(4), scoring_engine.TracingClient.get_trace

    def all_at_once(client: Any, trace_id: str) -> Trace:
        started.wait(30)
        return read(client, trace_id)

    monkeypatch.setattr(scoring_engine.TracingClient, "get_trace", all_at_once)
    unknown = Safety(name="s", model="openai:/my-own-model")
    with pytest.raises(BudgetError):
        run_scoring_cycle(store, [unknown], options=ScoringOptions(concurrency=4, budget_usd=1.0))
    assert [len(info.assessments) for info in infos().values()] == [1] * 4


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_keeps_what_a_backfill_scored(
    store: str, ask: Any, infos: Any, tmp_path: Path
) -> None:
    ask(30)
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program.py"), mlflow.get_tracking_uri(), store]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, env=environment, text=True, **pipes)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 5:
        pass
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in errors, errors

    kept = [len(info.assessments) for info in infos().values()]
    assert set(kept) == {0, 1} and sum(kept) >= 5
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    scored, skipped, failed = map(int, again.stdout.splitlines()[-1].split())
    assert (scored + skipped, skipped, failed) == (30, sum(kept), 0)
    assert [len(info.assessments) for info in infos().values()] == [1] * 30
