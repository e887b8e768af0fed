"""8.4.1 項目の検査: 決して鳴らない、または鳴りやまないルールを、書いたときに見つける。

割合は 0 から 1、ほかの指標は 0 以上の値しかとらない。百分率や符号の誤りが、ここで分かる。
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..metrics import metric_problem
from ..metrics.measures import RATE_METRICS
from .values import near, parse_duration

COUNTS = ("trace_count", "request_rate", "assessment_count")
GOOD_RATES = ("pass_rate", "feedback_rate")
"""高いほどよい割合。"""
OWN_KEYS = ("name", "severity", "metric")
Fields = Mapping[str, Any]
"""同じルールの、先に読めた項目。"""


def check_metric(metric: str, rule: Fields) -> None:
    """知っている指標か。"""
    if problem := metric_problem(metric):
        raise ValueError(problem)
    kind, _, name = metric.partition(":")
    if name != name.strip():
        raise ValueError(f"{metric!r} has a space around the name; write {kind}:{name.strip()}")


def check_labels(labels: Mapping[str, str], rule: Fields) -> None:
    """ルールの項目をラベルに書いていないか。"""
    if own := [key for key in labels if key in OWN_KEYS]:
        raise ValueError(f"{own[0]!r} is a key of the rule, not a label; write {own[0]}: there")


def check_compare(compare: Any, rule: Fields) -> None:
    """比べる二つの期間が重ならないか。"""
    window = rule.get("window", "0s")
    if compare is not None and parse_duration(compare) < parse_duration(window):
        raise ValueError(f"{compare} is shorter than window {window}; the two would overlap")


def check_by(by: str | None, rule: Fields) -> None:
    """分けられるラベルか。"""
    known = ("model", "prompt_version")
    if by is not None and by not in known and not (by.startswith("tag:") and by[4:]):
        raise ValueError(f"{by!r} is not model, prompt_version or tag:<name>{near(by, known)}")


def check_threshold(value: float, rule: Fields) -> None:
    """その指標が取りうる値に対して、意味のあるしきい値か。"""
    if not {"metric", "op", "compare"} <= rule.keys():
        return
    metric, op = rule["metric"], rule["op"]
    said = f"{metric} {op} {value:g}"
    if rule["compare"] is not None:
        _check_ratio(value, op, f"{said} x the value {rule['compare']} ago")
        return
    _check_percent(value, metric)
    if op == "<" and value <= 0:
        meant = "write 1 for none at all" if metric == "trace_count" else "write a value above 0"
        raise ValueError(f"{said} can never be true: it is never below 0; {meant}")
    if op == ">" and value == 1 and _is_rate(metric):
        raise ValueError(f"{said} can never be true: a rate is at most 1; write 0.01 for 1%")
    if op == ">" and value < 0:
        raise ValueError(f"{said} is always true: it is never below 0; write {-value:g}")
    if op == ">" and value < 1 and metric.endswith("_ms"):
        meant = f"; the unit is milliseconds, write {value * 1000:g}" if value else ""
        raise ValueError(f"{said} is always true: every request takes longer{meant}")
    _check_samples(value, rule, said)


def _is_rate(metric: str) -> bool:
    return metric.partition(":")[0] in RATE_METRICS


def _check_percent(value: float, metric: str) -> None:
    if _is_rate(metric) and value > 1:
        meant = f"; write {value / 100:g} for {value:g}%" if value <= 100 else ""
        raise ValueError(f"{value:g} is not a rate: rates lie between 0 and 1{meant}")


def _check_ratio(value: float, op: str, said: str) -> None:
    if op == "<" and value <= 0:
        raise ValueError(f"{said} can never be true: a ratio is never below 0; write 0.05 for 5%")
    if op == "<" and value > 1:
        meant = f"; write {value / 100:g} for {value:g}%" if value <= 100 else ""
        raise ValueError(f"{said} is true without any change{meant}")
    if op == ">" and value < 1:
        raise ValueError(f"{said} is true without any change; write {1 + max(value, 0):g} or more")


def _check_samples(value: float, rule: Fields, said: str) -> None:
    """件数の指標では、``min_samples`` がそのまま値の下限になる。"""
    kind, least = rule["metric"].partition(":")[0], rule.get("min_samples", 0)
    if kind not in COUNTS or not least or "window" not in rule:
        return
    said += f" with min_samples {least}"
    if kind == "request_rate":
        least /= parse_duration(rule["window"]).total_seconds()
    if rule["op"] == "<" and value <= least:
        raise ValueError(f"{said} can never be true; remove min_samples")
    if rule["op"] == ">" and value < least:
        raise ValueError(f"{said} is always true; remove min_samples")


def check_clear(value: float | None, rule: Fields) -> None:
    """発報のしきい値の手前にあり、指標が届く値か。"""
    if value is None or not {"metric", "op", "compare", "threshold"} <= rule.keys():
        return
    metric, op, threshold = rule["metric"], rule["op"], rule["threshold"]
    if rule["compare"] is None:
        _check_percent(value, metric)
    if value > threshold if op == ">" else value < threshold:
        meant = f"{threshold:g} or {'less' if op == '>' else 'more'}"
        raise ValueError(f"{value:g} is beyond threshold {threshold:g} with {op!r}; write {meant}")
    if op == ">" and (value < 0 or (value == 0 and metric.endswith("_ms"))):
        raise ValueError(f"{value:g} would never clear: {metric} never gets that low")


def check_confidence(value: float | None, rule: Fields) -> None:
    """割合の検定に使える確率か。"""
    if value is None:
        return
    if not 0.5 < value < 1:
        meant = f"; write {value / 100:g}" if 50 < value < 100 else ""
        raise ValueError(f"{value} is not between 0.5 and 1{meant}")
    if problem := metric_problem(rule.get("metric", "error_rate"), rate_for="confidence"):
        raise ValueError(problem)


def check_bad_rate(metric: str) -> None:
    """悪いほうを数える割合か(エラー予算を使うのは、悪いほう)。"""
    if problem := metric_problem(metric, rate_for="a burn rate"):
        raise ValueError(problem)
    kind, _, name = metric.partition(":")
    if kind in GOOD_RATES:
        raise ValueError(f"{metric!r} does not count failures; write fail_rate:{name}")


def check_objective(value: float, rule: Fields) -> None:
    """目標は割合で書かれているか。"""
    if not 0 < value < 1:
        meant = f"; write {value / 100:g}" if 1 < value < 100 else ""
        raise ValueError(f"{value} is not between 0 and 1{meant}")


def check_factor(value: float, rule: Fields) -> None:
    """その速さに、割合が届くか。"""
    objective = rule.get("objective", 1)
    if value <= 0:
        raise ValueError(f"{value} is not above 0; write 14.4, 6 or 1")
    if (limit := round(value * (1 - objective), 12)) >= 1:
        said = f"{value} x (1 - {objective}) = {limit:g}"
        raise ValueError(f"{said}, a rate can never exceed it; lower the factor")


def check_short(value: Any, rule: Fields) -> None:
    """短い期間のほうが短いか。"""
    if "long" in rule and parse_duration(value) >= parse_duration(rule["long"]):
        raise ValueError(f"{value} is not shorter than long: {rule['long']}")


CHECKS: Mapping[str, Callable[[Any, Fields], None]] = {
    "metric": check_metric,
    "labels": check_labels,
    "compare": check_compare,
    "by": check_by,
    "threshold": check_threshold,
    "clear_threshold": check_clear,
    "confidence": check_confidence,
    "low_traffic_confidence": check_confidence,
    "objective": check_objective,
    "factor": check_factor,
    "short": check_short,
}
