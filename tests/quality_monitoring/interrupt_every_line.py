"""採点中の Ctrl-C を、採点エンジンのあらゆる行で起こすプログラム。

呼んだ側のスレッドの行ではそこで、採点のスレッドの行では、その間に待っている呼んだ側で起こす。
数百回採点するので、MLflow の読み書きだけを差し替える(本物の保存先での Ctrl-C は、
test_scoring_interrupted.py のバックフィルのテストで確かめる)。
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from mlflow.genai.scorers import scorer

from chapter8_samples.quality_monitoring import ScoringOptions, ScoringTarget
from chapter8_samples.quality_monitoring.scoring import engine as scoring_engine

INFOS = [SimpleNamespace(trace_id=f"tr-{i}", assessments=[]) for i in range(6)]
judged: list[str] = []
stored: list[str] = []


class Page(list[Any]):
    token = None


class Client:
    def search_traces(self, **_: Any) -> Page:
        return Page(SimpleNamespace(info=info) for info in INFOS)

    def get_trace(self, trace_id: str) -> Any:
        info = next(info for info in INFOS if info.trace_id == trace_id)
        root = SimpleNamespace(parent_id=None, inputs={}, outputs="x")
        return SimpleNamespace(info=info, data=SimpleNamespace(spans=[root]))


@scorer
def quick(trace: Any) -> bool:
    judged.append(trace.info.trace_id)
    return True


class Interrupter:
    """採点エンジンで ``line`` 番目に実行する行で Ctrl-C を起こす。"""

    def __init__(self, line: int) -> None:
        self.remaining = line
        self.delivered = threading.Event()

    def on_signal(self, *_: Any) -> None:
        self.delivered.set()
        raise KeyboardInterrupt

    def trace(self, frame: Any, event: str, _: Any) -> Any:
        thread = threading.current_thread()
        ours = frame.f_code.co_filename == scoring_engine.__file__
        if not ours or thread.name.startswith("scoring_"):  # ジャッジのスレッド
            return None
        if event == "line":
            self.remaining -= 1
            if self.remaining == 0 and thread is threading.main_thread():
                raise KeyboardInterrupt
            if self.remaining == 0:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                assert self.delivered.wait(30)
        return self.trace


def interrupted_at(line: int) -> bool:
    judged.clear()
    stored.clear()
    now = datetime.now(timezone.utc)
    targets, options = [ScoringTarget(scorer=quick)], ScoringOptions(concurrency=2)
    interrupter = Interrupter(line)
    signal.signal(signal.SIGINT, interrupter.on_signal)
    threading.settrace(interrupter.trace)
    sys.settrace(interrupter.trace)
    try:
        scoring_engine.score_traces(
            "1", targets, start=now, end=now + timedelta(hours=1), options=options
        )
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]
    return False


if __name__ == "__main__":
    faulthandler.dump_traceback_later(200, exit=True)  # 止まったら、止まった場所を示して終わる
    scoring_engine.MlflowClient = scoring_engine.TracingClient = Client  # type: ignore[misc,assignment]
    scoring_engine.Lease = MagicMock()  # type: ignore[misc]
    scoring_engine._log_once = lambda trace_id, _: stored.append(trace_id)  # pyright: ignore
    line, interrupted = 0, True
    while interrupted:
        line += 1
        interrupted = interrupted_at(line)
        assert sorted(stored) == sorted(judged), (line, judged, stored)
    print(line, len(stored))
