"""8.4.1 設定の型を pydantic で検査し、誤りをすべてまとめて、場所と直し方の分かる文にする。"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from .values import near, short

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform
else:  # 型検査のためのもので、実行時には何もしない

    def dataclass_transform(**_):
        return lambda decorator: decorator


Model = TypeVar("Model")
Problem = tuple[str, str]
"""(場所, 誤り)。場所は ``rules[2].window`` のような形で、全体の誤りでは空。"""

CONFIG = ConfigDict(extra="forbid", populate_by_name=True, validate_default=True)
SECRET_LIKE = re.compile(
    r"https?://\S*|\S*sig=\S*|\b(?=\w*\d)[0-9a-z]{32}\b|\bwhsec_\S*|\bxox[bp]-\S*", re.IGNORECASE
)
WANTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "tuple_type": "a list",
    "sequence_str": "a list",
    "is_instance_of": "a list",
    "string_type": "a string; write it in quotes",
    "string_too_short": "a non-empty string",
}
"""pydantic の誤りの種類 -> 求める値。"""


class AlertConfigError(ValueError):
    """設定の誤り。見つけたすべてを ``problems`` に持つ。"""

    def __init__(self, problems: Sequence[str], places: Sequence[Problem] = ()) -> None:
        self.problems = tuple(problems)
        self.places = tuple(places)
        """設定の一部だけを読んだときの、その中での場所と誤り。"""
        super().__init__("invalid alert configuration:\n" + "\n".join(f"- {p}" for p in problems))


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def model(cls: type[Model]) -> type[Model]:
    """pydantic で検査する ``dataclass`` にする。作れなければ ``AlertConfigError``。

    ``cls.heading`` は文の前に付ける言葉、``cls.across`` は項目をまたぐ検査(どちらも省略できる)。
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=CONFIG)(cls)
    create = made.__init__

    def checked(self: Any, /, **fields: Any) -> None:
        found: list[Problem] = []
        try:
            create(self, **fields)
        except ValidationError as error:
            found = _problems(error, keys_of(made))
        if hasattr(made, "across"):
            found += made.across(fields)
        if found:
            heading = made.heading(fields) if hasattr(made, "heading") else ""
            raise AlertConfigError([heading + sentence(problem) for problem in found], found)

    made.__init__ = checked
    return made


def read(cls: type[Model], value: Any) -> Model:
    """設定の一部を読む。``cls`` のものは、そのまま返す。"""
    if isinstance(value, cls):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{short(value)} is not a mapping")
    return cls(**{str(key): item for key, item in value.items()})


def keys_of(cls: type[Any]) -> list[str]:
    """設定に書けるキー。"""
    return [name.rstrip("_") for name in cls.__dataclass_fields__]


def _problems(error: ValidationError, known: Iterable[str]) -> list[Problem]:
    found: list[Problem] = []
    for detail in error.errors(include_url=False):
        place = ""
        for part in detail["loc"]:
            place = place if part == "[key]" else _within(place, part)
        inner = detail.get("ctx", {}).get("error")
        if isinstance(inner, AlertConfigError):
            found += [(_within(place, where), text) for where, text in inner.places]
        elif detail["type"] == "missing":
            parent, _, key = place.rpartition(".")
            found.append((parent, f"{key} is missing"))
        else:
            found.append((place, _text(detail, inner, known)))
    return found


def _within(place: str, part: str | int) -> str:
    if isinstance(part, int):
        return f"{place}[{part}]"
    return f"{place}.{part}" if place and part else place + part


def _text(detail: Any, inner: Exception | None, known: Iterable[str]) -> str:
    kind, value = detail["type"], detail["input"]
    if kind == "unexpected_keyword_argument":
        return f"unknown key{near(detail['loc'][-1], known)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", detail["ctx"]["expected"])
        return f"{short(value)} is not one of {', '.join(choices)}{near(value, choices)}"
    if kind in WANTED:
        return f"{short(value)} is not {WANTED[kind]}"
    return str(inner) if inner else f"{short(value)}: {detail['msg']}"


def sentence(problem: Problem) -> str:
    """場所と誤りを一つの文にし、秘密らしいところを隠す(キーに書かれていることもある)。"""
    place, text = (SECRET_LIKE.sub("***", part) for part in problem)
    return f"{place}: {text}" if place else text
