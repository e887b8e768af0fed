"""8.4.1 設定の中の参照を確かめる: ルール、ラベル、通知先の名前が、どこかを指しているか。

どこも指さない条件は、障害の夜に「経路に合わない」「抑制が効かない」という形で初めて現れる。
読む前の項目(辞書)をそのまま見るので、ほかの誤りと一度に知らせられる。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .checking import Problem
from .values import SEVERITIES, near, short

WATCHDOG = "alert_evaluation_failed"
"""指標を求められないルールがあることを知らせる、組み込みのアラートの名前。"""
ANY = "*"
"""評価してみないと分からないラベルの値(``by``)。"""
OWN = {"name": "", "severity": "warning", "metric": "error_rate"}
"""ラベルのほかに照合できるものと、書かないときの値。"""
Labels = Mapping[str, Any]


def reference_problems(fields: Mapping[str, Any]) -> list[Problem]:
    """名前の重複と、どこも指さない参照。"""
    rules = [rule for key in ("rules", "burn_rates") for _, rule in _items(fields, key)]
    found = [*_name_problems(rules), *_receiver_problems(fields)]
    if not rules:
        return found
    alerts = _possible_alerts(fields, rules)
    for place, selector in _selectors(fields):
        found += _selector_problems(place, selector, alerts)
    labels = {key for alert in alerts for key in alert if key not in OWN}
    for place, inhibit in _items(fields, "inhibit"):
        if inhibit.get("when") and inhibit.get("when") == inhibit.get("mute"):
            found.append((place, "when and mute are the same; alerts never mute each other"))
        unknown = [key for key in _names(inhibit.get("equal")) if key not in list(labels)]
        found += [(f"{place}.equal", _no_label(key, labels)) for key in unknown]
    return found


def _items(fields: Mapping[str, Any], key: str) -> list[tuple[str, Labels]]:
    """リストの項目の(場所, 中身)。読めないものは飛ばす(型の検査が知らせる)。"""
    pairs = ((f"{key}[{i}]", item) for i, item in enumerate(_names(fields.get(key))))
    return [
        (place, item if isinstance(item, Mapping) else vars(item))
        for place, item in pairs
        if isinstance(item, Mapping) or hasattr(item, "__dataclass_fields__")
    ]


def _names(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _mapping(value: Any) -> Labels:
    return value if isinstance(value, Mapping) else {}


def _name_problems(rules: Sequence[Labels]) -> list[Problem]:
    names = [rule["name"] for rule in rules if "name" in rule]
    twice = sorted({short(name) for name in names if names.count(name) > 1})
    found = [("rules", f"duplicate name {name}") for name in twice]
    if WATCHDOG in names:
        found.append(("rules", f"{WATCHDOG!r} is a built-in alert; rename the rule"))
    return found


def _receiver_problems(fields: Mapping[str, Any]) -> Iterator[Problem]:
    known = _mapping(fields.get("receivers")) or ("console",)
    routes = _items(fields, "routes")
    for place, route in routes:
        for name in _names(route.get("to")):
            if name not in list(known):
                yield f"{place}.to", f"unknown receiver {short(name)}{near(name, known)}"
    if routes and routes[-1][1].get("match"):
        yield "routes", "the last route must match everything; add {match: {}, to: [...]}"
    for place, route in routes[:-1]:
        if not route.get("match"):
            yield place, "matches everything, so the routes after it are never used; move it last"


def _possible_alerts(fields: Mapping[str, Any], rules: Sequence[Labels]) -> list[Labels]:
    """起こりうるアラートの、照合に使えるラベル。"""
    shared = _mapping(fields.get("labels"))
    watchdog = {"name": WATCHDOG, "severity": fields.get("watchdog_severity", "critical")}
    alerts: list[Labels] = [{**shared, **watchdog}]
    for rule in rules:
        by = str(rule.get("by") or "").removeprefix("tag:")
        split = {by: ANY} if by else {}
        own = {key: rule.get(key, usual) for key, usual in OWN.items()}
        alerts.append({**shared, **_mapping(rule.get("labels")), **split, **own})
    return alerts


def _selectors(fields: Mapping[str, Any]) -> Iterator[tuple[str, Labels]]:
    for key, parts in (("inhibit", ("when", "mute")), ("mute", ("match",)), ("routes", ("match",))):
        for place, item in _items(fields, key):
            for part in parts:
                selector = _mapping(item.get(part)).items()
                yield f"{place}.{part}", {k: v for k, v in selector if isinstance(v, str)}


def _selector_problems(place: str, selector: Labels, alerts: Sequence[Labels]) -> list[Problem]:
    """条件に合うアラートが起こりえない理由。起こりうるなら空。"""
    found: list[Problem] = []
    for key, value in selector.items():
        values = [alert[key] for alert in alerts if key in alert]
        if not values:
            found.append((place, _no_label(key, {name for alert in alerts for name in alert})))
        elif not any(_fits(key, value, known) for known in values):
            found.append((place, f"no alert has {key} {short(value)}{near(value, values)}"))
    whole = (all(_fits(k, v, alert.get(k)) for k, v in selector.items()) for alert in alerts)
    if not found and not any(whole):
        found.append((place, f"no single alert has all of {short(dict(selector))}"))
    return found


def _fits(key: str, value: Any, known: Any) -> bool:
    """その値になりうるか。重大度は、いまのルールにないものでもよい。"""
    return known in (value, ANY) or (key == "severity" and value in SEVERITIES)


def _no_label(key: Any, known: set[str]) -> str:
    return f"no alert has the label {short(key)}{near(key, known)}"
