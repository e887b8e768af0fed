"""別のスレッドで動かし、期限まで待つ(OpenTelemetry の ``force_flush`` は期限を守らない)。"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence


def run_in_time(jobs: Sequence[Callable[[], object]], timeout_seconds: float) -> list[bool]:
    """同時に動かして ``timeout_seconds`` 秒まで待ち、それぞれが例外なく終わったかを返す。"""
    finished = [False] * len(jobs)

    def run(number: int, job: Callable[[], object]) -> None:
        job()
        finished[number] = True

    deadline = time.monotonic() + timeout_seconds
    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return list(finished)
