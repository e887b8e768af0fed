"""標準のルールが、通信量ごとに、誤って何回鳴り、障害を何分で見つけるか。

実行::

    python tests/benchmarks/alert_traffic.py --seeds 5

平穏な日は、通信量と真のエラー率ごとに 20 日(合わせて 360 日、1 億 4,400 万リクエスト)。障害は
10 種類を 4 回ずつ、でたらめな時刻に起こす。どれも評価は 1 分ごと。
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench_report import markdown

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from alerting.traffic_levels import (
    ERROR_RATES,
    INCIDENTS,
    LEVELS,
    RULES,
    Incident,
    delay,
    false_alarms,
    moments,
    pages,
    quiet_days,
)

from chapter8_samples.alerting import AlertRule


def alarms(seed: int, level: float) -> Counter[str]:
    """平穏な 60 日の、ルールごとの発報の数。"""
    found: Counter[str] = Counter()
    for rate in ERROR_RATES:
        found.update(false_alarms(quiet_days(seed, level, rate)))
    return found


def cell(found: Sequence[int | None]) -> str:
    """「見つけた数/起こした数 中央値(最大)分」。"""
    known = [minutes for minutes in found if minutes is not None]
    middle = f" {statistics.median(known):g}({max(known)}) 分" if known else ""
    return f"{len(known)}/{len(found)}{middle}"


def main(argv: list[str] | None = None) -> None:
    """2 つの表を出す。"""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5, help="乱数の数")
    parser.add_argument("--first", type=int, default=1, help="最初の乱数")
    options = parser.parse_args(argv)
    seeds = range(options.first, options.first + options.seeds)
    quiet = {(seed, level): alarms(seed, level) for seed in seeds for level in LEVELS}
    totals = [sum(pages(quiet[seed, level]) for level in LEVELS) for seed in seeds]
    print(f"平穏な 360 日の誤った呼び出し({len(seeds)} 通りの乱数): ", end="")
    print(f"平均 {statistics.mean(totals):.2f}、最大 {max(totals)}\n")
    head = ["60 日の誤報の平均", *(f"{level:g} 件/秒" for level in LEVELS)]
    print(markdown(head, [_quiet_row(quiet, rule, seeds) for rule in RULES]), end="\n\n")
    head = ["障害", *head[1:]]
    print(markdown(head, [_incident_row(incident, seeds) for incident in INCIDENTS]))


def _quiet_row(
    quiet: dict[tuple[int, float], Counter[str]], rule: AlertRule, seeds: Sequence[int]
) -> list[str]:
    means = (statistics.mean(quiet[seed, level][rule.name] for seed in seeds) for level in LEVELS)
    return [f"{rule.name} ({rule.severity})", *(f"{mean:.2f}" for mean in means)]


def _incident_row(incident: Incident, seeds: Sequence[int]) -> list[str]:
    found = ([delay(incident, s, level, at) for s, at in moments(seeds)] for level in LEVELS)
    return [incident.title, *(cell(delays) for delays in found)]


if __name__ == "__main__":
    main()
