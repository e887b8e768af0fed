"""2 つのバックフィルを同時に始める。保存先ごとのテストが使う。"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlflow import MlflowClient
from mlflow.genai.scorers import scorer

from chapter8_samples.quality_monitoring import ScoringBusyError, ScoringTarget, backfill


def judge_once_in_two_runs(experiment_id: str, traces: int) -> None:
    """どのトレースも 1 回だけ採点され、もう一方は待つか、持ち主を示して断る。"""
    calls: Counter[str] = Counter()
    together = threading.Barrier(2)

    def run(_: int) -> Any:
        @scorer(name="one")
        def one(trace) -> bool:  # type: ignore[no-untyped-def]
            calls[trace.info.trace_id] += 1
            time.sleep(0.05)
            return True

        together.wait(30)
        try:
            return backfill(experiment_id, [ScoringTarget(scorer=one)]).scored
        except ScoringBusyError as busy:
            return str(busy)

    with ThreadPoolExecutor(2) as pool:
        first, second = sorted(pool.map(run, range(2)), key=str)
    # 待っている間に終われば、することがない。終わらなければ断る
    assert (first, second) == (0, traces) or (
        first == traces and f"process {os.getpid()} on {socket.gethostname()}" in second
    )
    assert len(calls) == traces and set(calls.values()) == {1}
    client = MlflowClient()
    found = client.search_traces(locations=[experiment_id], include_spans=False)
    assert [len(trace.info.assessments) for trace in found] == [1] * traces
    tags = client.get_experiment(experiment_id).tags
    assert not [tag for tag in tags if tag.startswith("scoring.lease.")]  # 終わったら残さない
