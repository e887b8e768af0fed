"""標準のエラー率のルールが、通信量ごとに、誤って何回呼び出し、障害を何分で見つけるか。

実行::

    python tests/benchmarks/alert_traffic.py --seeds 12

誤報は、平穏な 20 日(真のエラー率ごと)の発報の数。障害は 20 回ずつ起こし、見つけた数と、
見つけるまでの分数の中央値を出す(評価は 1 分ごと)。
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from bench_report import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alerting.traffic_levels import ERROR_RATES, ERRORS, LEVELS, delay, false_pages

INCIDENTS = (0.08, 0.15, 0.25, 0.5, 1.0)
ROUNDS = 20


def found(level: float, error_rate: float) -> str:
    """「見つけた数/起こした数 分」。"""
    delays = [delay(ERRORS, seed, level, error_rate) for seed in range(ROUNDS)]
    known = [minutes for minutes in delays if minutes is not None]
    middle = f"{statistics.median(known):g} 分" if known else "-"
    return f"{len(known)}/{ROUNDS} {middle}"


def main() -> None:
    """2 つの表を出す。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=12)
    seeds = parser.parse_args().seeds
    pages = {
        (level, rate): [false_pages(ERRORS, 1000 + seed, level, rate) for seed in range(seeds)]
        for level in LEVELS
        for rate in ERROR_RATES
    }
    totals = [sum(counts[seed] for counts in pages.values()) for seed in range(seeds)]
    print(f"平穏な 360 日の誤報({seeds} 通りの乱数): 平均 {statistics.mean(totals):.2f}、", end="")
    print(f"最大 {max(totals)}\n")
    head = ["件/秒", *(f"エラー率 {rate:.1%} の 20 日" for rate in ERROR_RATES)]
    rows = [
        [f"{level:g}", *(f"{statistics.mean(pages[level, rate]):.2f}" for rate in ERROR_RATES)]
        for level in LEVELS
    ]
    print(markdown(head, rows), end="\n\n")
    head = ["件/秒", *(f"エラー率 {rate:.0%}" for rate in INCIDENTS)]
    print(markdown(head, [[f"{v:g}", *(found(v, rate) for rate in INCIDENTS)] for v in LEVELS]))


if __name__ == "__main__":
    main()
