"""別のスレッドで動かし、期限まで待つ(OpenTelemetry の ``force_flush`` は期限を守らない)。"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence


def run_in_time(jobs: Sequence[Callable[[], object]], timeout_seconds: float) -> list[float | None]:
    """同時に動かし、``timeout_seconds`` 秒までにかかった秒数を返す。間に合わなければ None。"""
    deadline = time.monotonic() + timeout_seconds
    took: list[float | None] = [None for _ in jobs]

    def run(number: int, job: Callable[[], object]) -> None:
        started = time.monotonic()
        job()
        took[number] = time.monotonic() - started

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(took)
