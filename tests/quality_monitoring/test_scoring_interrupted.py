"""採点の途中で: 応答が失われる、Ctrl-C、端末の途中経過。"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
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
from chapter8_samples.quality_monitoring.backfill_scorers import backfill
from chapter8_samples.quality_monitoring.scoring.plan import ScoringOptions, ScoringTarget

@scorer
def slow(outputs):
    time.sleep(0.05)
    return True

faulthandler.dump_traceback_later(120, exit=True)  # 止まったら、止まった場所を画面に出して終わる
mlflow.set_tracking_uri(sys.argv[1])
report = backfill(sys.argv[2], [ScoringTarget(scorer=slow)], options=ScoringOptions(concurrency=2))
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


@pytest.mark.timeout(40)
def test_a_call_cancelled_before_it_began_is_not_waited_for(
    store: str, ask: Any, infos: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 件目を採点し、2 件目が順番を待っているときに Ctrl-C が押される。"""

    judging, cancelled = threading.Event(), threading.Event()

    class Interrupted(ThreadPoolExecutor):
        def __init__(self, _workers: int, **options: Any) -> None:
            super().__init__(1, **options)
            self.submitted = 0

        def submit(self, *arguments: Any, **options: Any) -> Any:
            self.submitted += 1
            if self.submitted == 3:
                assert judging.wait(30)
                raise KeyboardInterrupt
            return super().submit(*arguments, **options)

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            cancelled.set()
            super().shutdown(wait=wait)

    @scorer
    def slow(outputs) -> bool:  # type: ignore[no-untyped-def]
        judging.set()
        return cancelled.wait(30)

    ask(3)
    monkeypatch.setattr(scoring_engine, "ThreadPoolExecutor", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_scoring_cycle(store, [slow], options=ScoringOptions(concurrency=3))
    assert sorted(len(info.assessments) for info in infos().values()) == [0, 0, 1]


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
@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX terminal")
def test_ctrl_c_on_a_terminal_keeps_what_was_scored(
    store: str, ask: Any, infos: Any, tmp_path: Path
) -> None:
    import pty

    ask(30)
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "program.py"), mlflow.get_tracking_uri(), store]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=environment, stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    screen, deadline = "", time.monotonic() + 60
    while "scored 5," not in screen:
        assert time.monotonic() < deadline, screen
        screen += os.read(ours, 4096).decode()
    process.send_signal(signal.SIGINT)
    with os.fdopen(ours, "rb", closefd=True) as rest:
        try:
            while chunk := rest.read1(4096):
                screen += chunk.decode()
        except OSError:  # 相手が閉じた端末は EIO になる
            pass
    assert process.wait(30) != 0 and "KeyboardInterrupt" in screen, screen

    kept = [len(info.assessments) for info in infos().values()]
    assert set(kept) == {0, 1} and sum(kept) >= 5
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    scored, skipped, failed = map(int, again.stdout.split())
    assert (scored + skipped, skipped, failed) == (30, sum(kept), 0)
    assert "traces:" not in again.stderr  # 端末でなければ何も出さない
    assert [len(info.assessments) for info in infos().values()] == [1] * 30
