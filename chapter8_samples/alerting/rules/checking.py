"""8.4.1 設定の型を pydantic で検査し、誤りをすべてまとめて、場所と直し方の分かる文にする。"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import field, fields
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import dataclass_transform

from .values import short

Model = TypeVar("Model")
Problem = tuple[str, str]
"""(場所, 誤り)。場所は ``rules[2].window`` のような形で、全体の誤りでは空。"""

CONFIG = ConfigDict(extra="forbid", populate_by_name=True, validate_default=True)
KEYS: set[str] = set()
"""設定のどこかに書けるキー。書き誤りに近いものを勧める。"""
SECRET_LIKE = re.compile(
    r"https?://\S*|\S*sig=\S*|\b(?=\w*\d)[0-9a-z]{32}\b|\bwhsec_\S*|\bxox[bp]-\S*", re.IGNORECASE
)
WANTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dataclass_type": "a mapping",
    "dict_type": "a mapping",
    "model_attributes_type": "a mapping",
    "tuple_type": "a list",
    "sequence_str": "a list",
    "is_instance_of": "a list",
    "string_type": "a string; write it in quotes",
    "string_too_short": "a non-empty string",
    "float_type": "a number",
    "finite_number": "a number",
    "int_type": "a whole number",
    "greater_than_equal": "a whole number from 0 up",
}
"""pydantic の誤りの種類 -> 求める値。"""


class AlertConfigError(ValueError):
    """設定の誤り。見つけたすべてを ``problems`` に持つ。"""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("invalid alert configuration:\n" + "\n".join(f"- {p}" for p in problems))


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def model(cls: type[Model]) -> type[Model]:
    """pydantic で検査する ``dataclass`` にする。作れなければ ``AlertConfigError``。

    項目をまたぐ検査は ``cls.across`` に書く(省略できる)。
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=CONFIG)(cls)
    create = made.__init__

    def checked(self: Any, /, **given: Any) -> None:
        found: list[Problem] = []
        try:
            create(self, **given)
        except ValidationError as error:
            found = [_problem(detail) for detail in error.errors(include_url=False)]
        if hasattr(made, "across"):
            found += made.across(given)
        if found:
            heading = f"rule {short(given['name'])}: " if "name" in given else ""
            raise AlertConfigError([heading + sentence(problem) for problem in found])

    made.__init__ = checked
    KEYS.update(one.name.rstrip("_") for one in fields(made))
    return made


def written(cls: type[Model]) -> type[Model]:
    """pydantic で検査する ``TypedDict`` にする。書かれた項目だけの辞書になる。"""
    made: Any = cls
    made.__pydantic_config__ = CONFIG
    KEYS.update(made.__annotations__)
    return cls


def _problem(detail: Any) -> Problem:
    """pydantic の誤りの、場所と文。"""
    parts = list(detail["loc"])
    if parts[0] in ("rules", "receivers"):
        del parts[2:3]  # どの型として読んだか
    if detail["type"] == "missing":
        return _place(parts[:-1]), f"{parts[-1]} is missing"
    if detail["type"] == "invalid_key":
        return _place(parts[:-1]), f"{short(detail['input'])} is not a string; write it in quotes"
    return _place(parts), _text(detail)


def _place(parts: Iterable[str | int]) -> str:
    place = ""
    for part in parts:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part != "[key]":
            place += f".{part}" if place else part
    return place


def _text(detail: Any) -> str:
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        key = detail["loc"][-1]
        hint = near(key, KEYS - {key})
        return f"unknown key{hint}" + (" (secrets stay out of the file)" if "_env" in hint else "")
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        return f"{short(value)} is not one of {', '.join(choices)}{near(value, choices)}"
    if kind == "too_short":
        return "the list is empty; name at least one"
    if kind == "less_than_equal":
        return f"{short(value)} is too large"
    if kind in WANTED:
        return f"{short(value)} is not {WANTED[kind]}{_without_percent(kind, value)}"
    return str(context.get("error") or f"{short(value)}: {detail['msg']}")


def _without_percent(kind: str, value: Any) -> str:
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", value) if isinstance(value, str) else None
    return f"; write {float(found[1]) / 100:g}" if found and kind == "float_type" else ""


def near(value: object, known: Iterable[object]) -> str:
    """近い名前を勧める文。なければ空。"""
    text = value if isinstance(value, str) else ""
    close = difflib.get_close_matches(text, [name for name in known if isinstance(name, str)], 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def sentence(problem: Problem) -> str:
    """場所と誤りを一つの文にし、秘密らしいところを隠す(キーに書かれていることもある)。"""
    place, text = (SECRET_LIKE.sub("***", part) for part in problem)
    return f"{place}: {text}" if place else text
