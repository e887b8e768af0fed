"""やり直しの速さ: 採点済みのトレースを、もう一度バックフィルするといくらかかるか。

実行::

    python tests/benchmarks/backfill_rerun.py [トレースの数]

ジャッジは手元のスタブ。スコアラーは 3 つ(LLM ジャッジ 2 つとコード 1 つ)。
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench_report import Headline, print_table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if TYPE_CHECKING:
    from chapter8_samples.quality_monitoring.scoring.plan import ScoringTarget


@dataclass(frozen=True)
class Turn:
    """バックフィル 1 回。"""

    title: str
    scored: int
    skipped: int
    seconds: float


def measure(count: int) -> list[Turn]:
    """最初の 1 回と、やり直し 3 回。やり直しで採点が起きたら失敗する。"""
    import mlflow

    from chapter8_samples import _lab
    from chapter8_samples._lab.llm.server import StubLlm
    from chapter8_samples.quality_monitoring.backfill_scorers import backfill

    _lab.go_offline()
    os.environ["MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"] = "false"
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory() as home, StubLlm() as stub:
        os.environ.update(OPENAI_BASE_URL=stub.base_url, OPENAI_API_KEY="sk-local-stub")
        mlflow.set_tracking_uri(f"sqlite:///{Path(home).as_posix()}/mlflow.db")
        experiment = mlflow.set_experiment("backfill-rerun").experiment_id
        record(count)
        targets = three_scorers()
        for title in ("最初", "やり直し 1", "やり直し 2", "やり直し 3"):
            report = backfill(experiment, targets)
            new = 0 if turns else count * len(targets)
            assert (report.scored, report.skipped) == (new, count * len(targets) - new), report
            turns.append(Turn(title, report.scored, report.skipped, report.seconds))
    return turns


def headline(quick: bool) -> list[Headline]:
    """採点済みのトレース 1 件を飛ばす時間。"""
    count = 10 if quick else 500
    turns = measure(count)
    show(count, turns)
    first, *again = turns
    per_trace = [turn.seconds / count * 1000 for turn in again]
    return [
        Headline(
            f"採点済みのバックフィルのやり直し({count} トレース、スコアラー 3 つ)",
            f"1 トレース {min(per_trace):.2f} ms から {max(per_trace):.2f} ms、採点 0 件",
            f"最初の 1 回の {max(turn.seconds for turn in again) / first.seconds:.1%}",
        )
    ]


def show(count: int, turns: list[Turn]) -> None:
    """表を Markdown で出す。"""
    rows = [
        (t.title, t.scored, t.skipped, f"{t.seconds:.2f}", f"{t.seconds / count * 1000:.2f}",
         f"{t.seconds / turns[0].seconds:.1%}")
        for t in turns
    ]  # fmt: skip
    columns = ("実行", "採点", "済み", "秒", "1 トレース(ms)", "最初との比")
    print_table(f"バックフィル {count} トレース x 3 スコアラー(SQLite)", columns, rows)


def main() -> None:
    """測って表を出す。"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("traces", type=int, nargs="?", default=500, help="トレースの数")
    count = parser.parse_args().traces
    show(count, measure(count))


def record(count: int) -> None:
    """採点するトレースを作る。"""
    import mlflow

    for i in range(count):
        with mlflow.start_span("answer") as span:
            span.set_inputs({"question": f"質問 {i}"})
            span.set_outputs("購入から 30 日以内に承ります。")


def three_scorers() -> list[ScoringTarget]:
    """LLM ジャッジ 2 つと、コード 1 つ。"""
    from mlflow.genai.scorers import Guidelines, PIIDetection, Safety

    from chapter8_samples.quality_monitoring.scoring.plan import ScoringTarget

    model = "openai:/gpt-4.1-mini"
    scorers = (
        Safety(name="safety", model=model),
        Guidelines(name="tone", guidelines="丁寧に答える", model=model),
        PIIDetection(name="pii"),
    )
    return [ScoringTarget(scorer=scorer) for scorer in scorers]


if __name__ == "__main__":
    main()
