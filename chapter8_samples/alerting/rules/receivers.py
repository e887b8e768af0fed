"""8.4.2 通知先と経路の設定。秘密は、値ではなく環境変数の名前(``url_env`` など)だけを書く。"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, create_model

from .checking import SECRET_LIKE, Mistakes, Problem, read
from .values import Length, Name, Severity, Some, near, short

NO_SECRET = "secrets stay out of the file"


def _variable(value: Any) -> Any:
    # 値を文に入れない: 変数の名前の代わりに、秘密そのものが書かれているかもしれない
    named = isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII)
    if not named or SECRET_LIKE.search(value):
        raise ValueError(f"not the name of an environment variable; {NO_SECRET}")
    return value


Variable = Annotated[str, PlainValidator(_variable)]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Names = tuple[Name, ...]


class Receiver(BaseModel):
    """どの通知先にもある項目。"""

    model_config = ConfigDict(extra="forbid")
    type: str
    send_resolved: bool = True
    min_severity: Severity = "info"


class Route(BaseModel):
    """条件に合うアラートを、どの通知先へ送るか。"""

    model_config = ConfigDict(extra="forbid")
    match: Mapping[Name, Name] = Field(default_factory=dict)
    to: Names
    repeat: Length | None = None


def _kind(**fields: Any) -> type[Receiver]:
    return create_model("Receiver", __base__=Receiver, **fields)


RECEIVERS: Mapping[str, type[Receiver]] = {
    "slack": _kind(url_env=Variable),
    "pagerduty": _kind(
        routing_key_env=Variable,
        region=(Literal["us", "eu"], "us"),
        source=(Name, ""),
    ),
    "teams": _kind(url_env=Variable),
    "webhook": _kind(url_env=Variable, secret_env=Variable),
    "email": _kind(
        host=Name,
        port=(Port, 587),
        tls=(Literal["starttls", "implicit", "none"], "starttls"),
        sender=Name,
        to=Annotated[Names, Some],
        user_env=(Variable, ""),
        password_env=(Variable, ""),
    ),
    "alertmanager": _kind(url_env=Variable),
    "console": _kind(),
}
"""``type`` -> 書ける項目。既定値のない項目は、必ず書く。"""


def read_route(value: Any) -> dict[str, Any]:
    """経路を検査する。書かれた項目だけの辞書になる。"""
    return read(Route, value).model_dump(exclude_unset=True)


def read_receiver(value: Any) -> dict[str, Any]:
    """通知先を検査する。書かれた項目だけの辞書になる。"""
    if not isinstance(value, Mapping):
        raise ValueError(f"{short(value)} is not a mapping")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in RECEIVERS:
        raise ValueError(f"type must be one of {', '.join(RECEIVERS)}{near(kind, RECEIVERS)}")
    keys = RECEIVERS[kind].model_fields
    literal = [key for key, item in value.items() if _is_literal(f"{key}", item, keys)]
    found: list[Problem] = [
        (key, f"{NO_SECRET}; write {_variable_key(key, keys)}: NAME") for key in literal
    ]
    public = {key: item for key, item in value.items() if key not in literal}
    public |= {f"{key}_env": "WRITTEN_AS_LITERAL" for key in literal if f"{key}_env" in keys}
    try:
        receiver = read(RECEIVERS[kind], public)
    except Mistakes as error:
        raise Mistakes([*found, *error.found]) from None
    if found:
        raise Mistakes(found)
    return receiver.model_dump(exclude_unset=True)


def _is_literal(key: str, item: Any, keys: Iterable[str]) -> bool:
    """``url_env`` の代わりに ``url`` と書いたか、値そのものが秘密らしいか。"""
    looks_secret = isinstance(item, str) and bool(SECRET_LIKE.search(item))
    return f"{key}_env" in keys or (looks_secret and not key.endswith("_env"))


def _variable_key(key: str, keys: Iterable[str]) -> str:
    names = [name for name in keys if name.endswith("_env")]
    return (difflib.get_close_matches(key, names, 1) or names or [f"{key}_env"])[0]
