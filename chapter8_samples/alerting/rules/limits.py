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
from .checking import near

COUNTS = ("trace_count", "assessment_count")
OWN_KEYS = ("name", "severity", "metric")
Fields = Mapping[str, Any]
"""同じルールの、先に読めた項目。"""


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
        raise ValueError(f"{own[0]!r} is a key of the rule, not a label; write {own[0]}: there")
    return labels


def check_compare(compare: Duration, info: ValidationInfo) -> Duration:
    """比べる二つの期間が重ならないか。"""
    window = info.data.get("window", "0s")
    if parse_duration(compare) < parse_duration(window):
        raise ValueError(f"{compare} is shorter than window {window}; the two would overlap")
    return compare


def check_by(by: str) -> str:
    """分けられるラベルか。"""
    known = ("model", "prompt_version")
    if by not in known and not (by.startswith("tag:") and by[4:]):
        raise ValueError(f"{by!r} is not model, prompt_version or tag:<name>{near(by, known)}")
    return by


def check_threshold(value: float, info: ValidationInfo) -> float:
    """その指標が取りうる範囲にあるか。外なら、決して越えないか、いつも越えている。"""
    rule = info.data
    if not {"metric", "op", "compare"} <= rule.keys():
        return value
    op = rule["op"]
    low, high = _range(rule)
    never = value >= high if op == ">" else value <= low
    always = value < low if op == ">" else value > high
    if never or always:
        verdict = "can never be true" if never else "is always true"
        said = f"{rule['metric']} {op} {value:g}{_condition(rule)} {verdict}"
        reason = "it lies between 0 and 1" if high == 1 else f"it is never below {low:g}"
        if rule["compare"] is not None:
            reason = "a ratio of 1 is no change"
        raise ValueError(f"{said}: {reason}{_meant(value, rule)}")
    return value


def _range(rule: Fields) -> tuple[float, float]:
    """しきい値と比べる値の、下限と上限。比べる比が 1 なら、何も変わっていない。"""
    kind, least = rule["metric"].partition(":")[0], rule.get("min_samples", 0)
    if rule["compare"] is not None:
        return (1, math.inf) if rule["op"] == ">" else (0, 1)
    if kind in RATE_METRICS:
        return 0, 1
    if kind in COUNTS:  # min_samples がそのまま値の下限になる
        return least, math.inf
    return (1 if kind.endswith("_ms") else 0), math.inf


def _condition(rule: Fields) -> str:
    if rule["compare"] is not None:
        return f" x the value {rule['compare']} ago"
    if rule["metric"].partition(":")[0] in COUNTS and rule.get("min_samples"):
        return f" with min_samples {rule['min_samples']}"
    return ""


def _meant(value: float, rule: Fields) -> str:
    """書きたかったはずの値。"""
    metric = rule["metric"]
    if share := _as_share(value, rule):
        return share
    if rule["compare"] is not None:
        return f"; write {1 + max(value, 0):g} or more" if rule["op"] == ">" else ""
    if metric.endswith("_ms") and 0 < value < 1:
        return f"; the unit is milliseconds, write {value * 1000:g}"
    if "min_samples" in _condition(rule):
        return "; remove min_samples"
    if metric == "trace_count" and rule["op"] == "<":
        return "; write 1 for none at all"
    return ""


def _as_share(value: float, rule: Fields) -> str:
    """百分率で書いたらしい割合の、正しい書き方。"""
    drop = rule["compare"] is not None and rule["op"] == "<"
    share = drop or rule["metric"].partition(":")[0] in RATE_METRICS
    return f"; write {value / 100:g} for {value:g}%" if share and 1 <= value <= 100 else ""


def check_clear(value: float, info: ValidationInfo) -> float:
    """発報のしきい値の手前にあり、指標が届く値か。"""
    rule = info.data
    if not {"metric", "op", "compare", "threshold"} <= rule.keys():
        return value
    op, threshold = rule["op"], rule["threshold"]
    low, high = _range(rule) if rule["compare"] is None else (0, math.inf)
    beyond = value > threshold if op == ">" else value < threshold
    if beyond:
        nearest = f"; write {threshold:g} or {'less' if op == '>' else 'more'}"
        meant = _as_share(value, rule) or nearest
        raise ValueError(f"{value:g} is beyond threshold {threshold:g} with {op!r}{meant}")
    if not low <= value <= high:
        problem = f"{value:g} would never clear: {rule['metric']} never gets there"
        raise ValueError(problem + _as_share(value, rule))
    return value


def check_confidence(value: float, info: ValidationInfo) -> float:
    """割合の検定に使える確率か。"""
    if not 0.5 < value < 1:
        meant = f"; write {value / 100:g}" if 50 < value < 100 else ""
        raise ValueError(f"{value:g} is not between 0.5 and 1{meant}")
    if problem := metric_problem(info.data.get("metric", "error_rate"), rate_for="confidence"):
        raise ValueError(problem)
    return value


def check_objective(value: float) -> float:
    """目標は割合で書かれているか。"""
    if not 0 < value < 1:
        meant = f"; write {value / 100:g}" if 1 < value < 100 else ""
        raise ValueError(f"{value:g} is not between 0 and 1{meant}")
    return value


def check_factor(value: float, info: ValidationInfo) -> float:
    """その速さに、割合が届くか。"""
    objective = info.data.get("objective", 1)
    if value <= 0:
        raise ValueError(f"{value:g} is not above 0; write 14.4, 6 or 1")
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
