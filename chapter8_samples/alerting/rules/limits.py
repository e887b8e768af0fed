"""8.4.1 項目の検査: 決して鳴らない、または鳴りやまないルールを、書いたときに見つける。

割合は 0 から 1、ほかの指標は 0 以上の値しかとらない。百分率や符号の誤りが、ここで分かる。
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationInfo

from ..durations import Duration, parse_duration
from ..metrics import metric_problem
from ..metrics.measures import RATE_METRICS
from .checking import as_share

COUNTS = ("trace_count", "assessment_count")
OWN_KEYS = ("name", "severity", "metric")


def check_metric(metric: str) -> str:
    """知っている指標か。"""
    if problem := metric_problem(metric):
        raise ValueError(problem)
    return metric


def check_failure_rate(metric: str) -> str:
    """悪いほうを数える割合か(エラー予算を使うのは、悪いほう)。"""
    if problem := metric_problem(metric, rate_for="a burn rate"):
        raise ValueError(problem)
    kind, _, name = metric.partition(":")
    if kind == "pass_rate":
        raise ValueError(f"{metric!r} does not count failures; write fail_rate:{name}")
    return metric


def check_labels(labels: Mapping[str, str]) -> Mapping[str, str]:
    """ルールの項目をラベルに書いていないか。"""
    if own := [key for key in labels if key in OWN_KEYS]:
        raise ValueError(f"{own[0]!r} is a key of a rule, not a label; write {own[0]}: there")
    return labels


def check_compare(compare: Duration, info: ValidationInfo) -> Duration:
    """比べる二つの期間が重ならないか。"""
    window = info.data.get("window", "0s")
    if parse_duration(compare) < parse_duration(window):
        raise ValueError(f"{compare} is shorter than window {window}; the two would overlap")
    return compare


def check_threshold(value: float, info: ValidationInfo) -> float:
    """その指標が取りうる範囲にあるか。外なら、決して越えないか、いつも越えている。"""
    rule = info.data
    if not {"metric", "op", "compare"} <= rule.keys():
        return value
    low, high, why = _range(rule)
    upward = rule["op"] == ">"
    never = value >= high if upward else value <= low
    always = value < low if upward else value > high
    if never or always:
        said = f"{rule['metric']} {rule['op']} {value:g}"
        verdict = "can never be true" if never else "is always true"
        raise ValueError(f"{said} {verdict}: {why}{as_share(value) if high == 1 else ''}")
    return value


def _range(rule: Mapping[str, Any]) -> tuple[float, float, str]:
    """しきい値と比べる値の、下限と上限と、その理由。"""
    kind, least = rule["metric"].partition(":")[0], rule.get("min_samples", 0)
    upward = rule["op"] == ">"
    if rule["compare"] is not None:
        why = f"a ratio of 1 is no change from {rule['compare']} ago"
        return (1, math.inf, why) if upward else (0, 1, why)
    if kind in RATE_METRICS:
        return 0, 1, "a rate lies between 0 and 1"
    if kind in COUNTS and least:
        return least, math.inf, f"it is judged from min_samples {least} up; remove min_samples"
    none = "; write 1 for none at all" if kind in COUNTS and not upward else ""
    low = 1 if kind.endswith("_ms") else 0
    if kind == "trace_count" and rule.get("by") and not upward and rule.get("no_data") != "alert":
        return 1, math.inf, "a label without traces is not seen; write compare or no_data: alert"
    return low, math.inf, f"it is never below {low}{none}"


def check_clear(value: float, info: ValidationInfo) -> float:
    """発報のしきい値の手前にあり、指標が届く値か。"""
    rule = info.data
    if not {"metric", "op", "compare", "threshold"} <= rule.keys():
        return value
    op, threshold = rule["op"], rule["threshold"]
    low, high = (0, math.inf) if rule["compare"] is not None else _range(rule)[:2]
    share = as_share(value) if high == 1 else ""
    if value > threshold if op == ">" else value < threshold:
        raise ValueError(f"{value:g} is beyond threshold {threshold:g} with {op!r}{share}")
    if not low <= value <= high:
        raise ValueError(f"{value:g} would never clear: {rule['metric']} never gets there{share}")
    return value


def check_is_rate(value: float, info: ValidationInfo) -> float:
    """検定できる指標か。"""
    if problem := metric_problem(info.data.get("metric", "error_rate"), rate_for="confidence"):
        raise ValueError(problem)
    return value


def check_factor(value: float, info: ValidationInfo) -> float:
    """その速さに、割合が届くか。"""
    objective = info.data.get("objective", 1)
    if (limit := round(value * (1 - objective), 12)) >= 1:
        said = f"{value:g} x (1 - {objective:g}) = {limit:g}"
        raise ValueError(f"{said}, a rate can never exceed it; lower the factor")
    return value


def check_short(value: Duration, info: ValidationInfo) -> Duration:
    """短い期間のほうが短いか。"""
    long = info.data.get("long")
    if long and parse_duration(value) >= parse_duration(long):
        raise ValueError(f"{value} is not shorter than long: {long}")
    return value
