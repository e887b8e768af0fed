"""ジャッジの速さ: 1 秒に何トレースを採点できるか。

実行::

    python tests/benchmarks/judge_speed.py [トレースの数]

ジャッジは手元のスタブで、1 回の応答に 0.2 秒かかる設定にする(本物の LLM は 0.5 から 3 秒)。
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

from bench_report import Headline, machine, markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LATENCY_SECONDS = 0.2
CONCURRENCY = (1, 8, 16, 32)
DEFAULT = 8


def measure(count: int) -> dict[int, float]:
    """同時に採点する数 -> 秒。"""
    import mlflow

    from chapter8_samples import _lab
    from chapter8_samples._lab.llm.server import StubLlm

    _lab.go_offline()
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    with tempfile.TemporaryDirectory() as home, StubLlm() as stub:
        stub.set_faults(latency_seconds=LATENCY_SECONDS)
        os.environ.update(OPENAI_BASE_URL=stub.base_url, OPENAI_API_KEY="sk-local-stub")
        mlflow.set_tracking_uri(f"sqlite:///{Path(home).as_posix()}/mlflow.db")
        experiment_id = mlflow.set_experiment("judge-speed").experiment_id
        record(count)
        return {number: score(experiment_id, number, count) for number in CONCURRENCY}


def score(experiment_id: str, concurrency: int, count: int) -> float:
    """全部のトレースを採点し、かかった秒数を返す。"""
    from mlflow.genai.scorers import Safety

    from chapter8_samples.quality_monitoring.scoring.engine import score_traces
    from chapter8_samples.quality_monitoring.scoring.plan import ScoringOptions, ScoringTarget

    now = datetime.now(timezone.utc)
    safety = Safety(name=f"safety_{concurrency}", model="openai:/gpt-4.1-mini")
    began = time.perf_counter()
    report = score_traces(
        experiment_id,
        [ScoringTarget(scorer=safety)],
        start=now - timedelta(hours=1),
        end=now + timedelta(hours=1),
        options=ScoringOptions(concurrency=concurrency),
    )
    assert report.scored == count, report
    return time.perf_counter() - began


def record(count: int) -> None:
    """採点するトレースを作る。"""
    import mlflow

    for i in range(count):
        with mlflow.start_span("answer") as span:
            span.set_inputs({"question": f"質問 {i}"})
            span.set_outputs("購入から 30 日以内に承ります。")


def headline(quick: bool) -> list[Headline]:
    """同時に採点する数ごとの速さ。"""
    count = 8 if quick else 60
    found = measure(count)
    show(count, found)
    rates = {number: count / seconds for number, seconds in found.items()}
    return [
        Headline(
            f"LLM ジャッジの採点(判定 {LATENCY_SECONDS} 秒、{count} トレース)",
            "、".join(f"並行 {number} で毎秒 {rate:.1f} 件" for number, rate in rates.items()),
            f"並行 {DEFAULT} は 1 の {rates[DEFAULT] / rates[1]:.1f} 倍",
        )
    ]


def show(count: int, found: dict[int, float]) -> None:
    """表を Markdown で出す。"""
    print(f"{machine()}、SQLite、{count} トレース、ジャッジの応答 {LATENCY_SECONDS} 秒\n")
    rows = [
        (f"{number}{'(既定)' * (number == DEFAULT)}", f"{seconds:.1f}", f"{count / seconds:.1f}")
        for number, seconds in found.items()
    ]
    print(markdown(("同時に採点する数", "秒", "トレース/秒"), rows))


def main() -> None:
    """測って表を出す。"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("traces", type=int, nargs="?", default=100, help="トレースの数")
    count = parser.parse_args().traces
    show(count, measure(count))


if __name__ == "__main__":
    main()
