"""8.4.1 設定の中の参照を確かめる: ルール、ラベル、通知先の名前が、どこかを指しているか。

どこも指さない条件は、障害の夜に「経路に合わない」「抑制が効かない」という形で初めて現れる。
読む前の項目(辞書)をそのまま見るので、ほかの誤りと一度に知らせられる。
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .checking import near
from .values import SEVERITIES, short

WATCHDOG = "alert_evaluation_failed"
"""指標を求められないルールがあることを知らせる、組み込みのアラートの名前。"""
ANY = "*"
"""評価してみないと分からないラベルの値(``by``)。"""
SELECTORS = {"inhibit": ("when", "mute"), "mute": ("match",), "routes": ("match",)}
"""条件を書くところ。"""
Labels = Mapping[str, Any]


def reference_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    """名前の重複と、どこも指さない参照。"""
    rules = [*_items(fields, "rules").values(), *_items(fields, "burn_rates").values()]
    yield from _name_problems([rule.get("name") for rule in rules])
    yield from _route_problems(fields)
    if not rules:
        return
    known = _known_values(fields, rules)
    for key, parts in SELECTORS.items():
        for place, item in _items(fields, key).items():
            for part in parts:
                for problem in _selector_problems(_mapping(item.get(part)), known):
                    yield f"{place}.{part}: {problem}"
    labels = known.keys() - {"name", "severity", "metric"}
    for place, inhibit in _items(fields, "inhibit").items():
        for key in _list(inhibit.get("equal")):
            if key not in list(labels):
                yield f"{place}.equal: no alert has the label {short(key)}{_hint(key, labels)}"


def _items(fields: Mapping[str, Any], key: str) -> dict[str, Labels]:
    """リストの項目の、場所 -> 中身。読めないものは飛ばす(型の検査が知らせる)。"""
    found: dict[str, Labels] = {}
    for i, item in enumerate(_list(fields.get(key))):
        if isinstance(item, Mapping):
            found[f"{key}[{i}]"] = item
        elif hasattr(item, "__dataclass_fields__"):
            found[f"{key}[{i}]"] = vars(item)
    return found


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _mapping(value: Any) -> Labels:
    return value if isinstance(value, Mapping) else {}


def _name_problems(names: Sequence[Any]) -> Iterator[str]:
    for name in sorted({short(name) for name in names if name and names.count(name) > 1}):
        yield f"rules: duplicate name {name}"
    if WATCHDOG in names:
        yield f"rules: {WATCHDOG!r} is a built-in alert; rename the rule"


def _route_problems(fields: Mapping[str, Any]) -> Iterator[str]:
    known = list(_mapping(fields.get("receivers"))) or ["console"]
    routes = _items(fields, "routes")
    for place, route in routes.items():
        for name in _list(route.get("to")):
            if name not in known:
                yield f"{place}.to: unknown receiver {short(name)}{_hint(name, known)}"
        is_last = place == list(routes)[-1]
        if is_last and route.get("match"):
            yield "routes: the last route must match everything; add {match: {}, to: [...]}"
        elif not is_last and not route.get("match"):
            yield f"{place}: matches everything, so later routes are never used; move it last"


def _known_values(fields: Mapping[str, Any], rules: Sequence[Labels]) -> dict[str, list[Any]]:
    """照合に使えるもの -> 起こりうる値。重大度は、いまのルールにないものでもよい。"""
    known: dict[str, list[Any]] = {"name": [WATCHDOG], "severity": [*SEVERITIES], "metric": []}
    for labels in (fields.get("labels"), *(rule.get("labels") for rule in rules)):
        for key, value in _mapping(labels).items():
            known.setdefault(key, []).append(value)
    for rule in rules:
        known["name"].append(rule.get("name"))
        known["metric"].append(rule.get("metric", "error_rate"))
        if isinstance(by := rule.get("by"), str):
            known.setdefault(by.removeprefix("tag:"), []).append(ANY)
    return known


def _selector_problems(selector: Labels, known: Mapping[str, list[Any]]) -> Iterator[str]:
    """条件に合うアラートが起こりえない理由。"""
    for key, value in selector.items():
        if not isinstance(value, str):
            continue  # 型の検査が知らせる
        if key not in known:
            yield f"no alert has the label {short(key)}{_hint(key, known)}"
        elif value not in known[key] and ANY not in known[key]:
            yield f"no alert has {key} {short(value)}{_hint(value, known[key])}"


def _hint(value: object, known: Iterable[Any]) -> str:
    names = dict.fromkeys(name for name in known if isinstance(name, str))
    return near(value, names) or f"; known: {', '.join(names) or 'none'}"
