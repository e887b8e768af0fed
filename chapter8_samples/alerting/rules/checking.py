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

from .values import SECRET_LIKE, short

Model = TypeVar("Model")

CONFIG = ConfigDict(extra="forbid", populate_by_name=True, validate_default=True)
KEYS: set[str] = set()
"""設定のどこかに書けるキー。書き誤りに近いものを勧める。"""


class AlertConfigError(ValueError):
    """設定の誤り。見つけたすべてを ``problems`` に持つ。秘密らしいところは隠す。"""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(SECRET_LIKE.sub("***", problem) for problem in problems)
        lines = "\n".join(f"- {problem}" for problem in self.problems)
        super().__init__(f"invalid alert configuration:\n{lines}")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def model(cls: type[Model]) -> type[Model]:
    """pydantic で検査する ``dataclass`` にする。作れなければ ``AlertConfigError``。

    項目をまたぐ検査は ``cls.across`` に書く(省略できる)。
    """
    made: Any = dataclass(frozen=True, kw_only=True, config=CONFIG)(cls)
    create = made.__init__

    def checked(self: Any, /, **given: Any) -> None:
        found: list[str] = []
        try:
            create(self, **given)
        except ValidationError as error:
            details = error.errors(include_url=False)
            found = [f"{_place(detail['loc'])}: {_text(detail)}" for detail in details]
        if hasattr(made, "across"):
            found += made.across(given)
        if found:
            heading = f"rule {short(given['name'])}: " if "name" in given else ""
            raise AlertConfigError([heading + problem for problem in found])

    made.__init__ = checked
    KEYS.update(one.name.rstrip("_") for one in fields(made))
    return made


def written(cls: type[Model]) -> type[Model]:
    """pydantic で検査する ``TypedDict`` にする。書かれた項目だけの辞書になる。"""
    made: Any = cls
    made.__pydantic_config__ = CONFIG
    KEYS.update(made.__annotations__)
    return cls


def _place(location: Sequence[str | int]) -> str:
    """``rules[2].window`` のような形。"""
    parts = list(location)
    if parts[0] in ("rules", "receivers"):
        del parts[2:3]  # どの型として読んだか
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".").replace(".[key]", "")


def _text(detail: Any) -> str:
    """pydantic の誤りの文に、書かれた値と、直し方を添える。"""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        key = detail["loc"][-1]
        hint = near(key, KEYS - {key})
        return f"unknown key{hint}" + (" (secrets stay out of the file)" if "_env" in hint else "")
    if expected := context.get("expected") or context.get("expected_tags"):
        choices = re.findall(r"'([^']*)'", expected)
        given = context.get("tag", value)
        return f"{short(given)} is not one of {', '.join(choices)}{near(given, choices)}"
    if kind == "union_tag_not_found":
        return "type is missing"
    if "error" in context:
        return str(context["error"])
    # リストや辞書の中には、秘密があるかもしれない
    found = f"{short(value)}: " if isinstance(value, str | int | float | None) else ""
    share = as_share(value) if kind in ("float_parsing", "less_than") else ""
    return f"{found}{detail['msg']}{share}"


def as_share(value: object) -> str:
    """百分率で書いたらしい割合の、正しい書き方。"""
    try:
        percent = float(str(value).rstrip("% "))
    except ValueError:
        return ""
    return f"; write {percent / 100:g} for {percent:g}%" if 1 <= percent <= 100 else ""


def near(value: object, known: Iterable[object]) -> str:
    """近い名前を勧める文。なければ空。"""
    text = value.lower() if isinstance(value, str) else ""
    names = {name.lower(): name for name in known if isinstance(name, str)}
    close = difflib.get_close_matches(text, names, 1)
    return f"; did you mean {names[close[0]]!r}?" if close else ""
