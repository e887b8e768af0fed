"""採点中の Ctrl-C を、採点エンジンと ``concurrent.futures`` のあらゆる行で起こすプログラム。

数百回採点するので、MLflow の読み書きだけを差し替える(本物の保存先での Ctrl-C は、
test_scoring_interrupted.py の端末のテストで確かめる)。
"""

from __future__ import annotations

import faulthandler
import sys
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

from mlflow.genai.scorers import scorer

from chapter8_samples.quality_monitoring import scoring_engine
from chapter8_samples.quality_monitoring.scoring_plan import ScoringOptions, ScoringTarget

FILES = ("scoring_engine.py", "concurrent/futures/_base.py")
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
        return SimpleNamespace(info=info, data=SimpleNamespace(spans=[]))


@scorer
def quick(trace: Any) -> bool:
    judged.append(trace.info.trace_id)
    return True


def interrupt_at(line: int) -> Any:
    """``FILES`` の中で ``line`` 番目に実行する行で Ctrl-C を起こす。"""
    seen = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.replace("\\", "/").endswith(FILES):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    return trace


def interrupted_at(line: int) -> bool:
    judged.clear()
    stored.clear()
    now = datetime.now(timezone.utc)
    targets, options = [ScoringTarget(scorer=quick)], ScoringOptions(concurrency=2)
    sys.settrace(interrupt_at(line))
    try:
        scoring_engine.score_traces(
            "1", targets, start=now, end=now + timedelta(hours=1), options=options
        )
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


if __name__ == "__main__":
    faulthandler.dump_traceback_later(60, exit=True)  # 止まったら、止まった場所を示して終わる
    scoring_engine.MlflowClient = scoring_engine.TracingClient = Client  # type: ignore[misc,assignment]
    scoring_engine._log_once = lambda trace_id, _: stored.append(trace_id)  # pyright: ignore
    line, interrupted = 0, True
    while interrupted:
        line += 1
        interrupted = interrupted_at(line)
        assert len(stored) == len(set(stored)) and set(stored) <= set(judged), (line, stored)
        # 失うのは、書いている途中の 1 件だけ(次の実行で採点し直す)
        assert len(judged) - len(stored) <= 1, (line, judged, stored)
    print(line, len(stored))
