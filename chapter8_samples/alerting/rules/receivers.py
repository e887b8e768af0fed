"""8.4.2 通知先と経路の設定。秘密は、値ではなく環境変数の名前(``url_env`` など)だけを書く。"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .checking import SECRET_LIKE, AlertConfigError, Problem, keys_of, model, read
from .values import Length, Name, Severity, Some, near, short

NO_SECRET = "secrets stay out of the file"


def _variable(value: Any) -> Any:
    # 値を文に入れない: 変数の名前の代わりに、秘密そのものが書かれているかもしれない
    named = isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII)
    if not named or SECRET_LIKE.search(value):
        raise ValueError(f"not the name of an environment variable; {NO_SECRET}")
    return value


Variable = Annotated[str, BeforeValidator(_variable)]


@model
class Route:
    """条件に合うアラートを、どの通知先へ送るか。"""

    match: Mapping[Name, Name] = field(default_factory=dict[str, str])
    to: tuple[Name, ...]
    repeat: Length | None = None


@model
class Receiver:
    """どの通知先にもある項目。"""

    type: Name
    send_resolved: bool = True
    min_severity: Severity = "info"


@model
class UrlReceiver(Receiver):
    """URL を知っていれば送れる通知先。"""

    url_env: Variable


@model
class WebhookReceiver(UrlReceiver):
    """署名付きの Webhook。"""

    secret_env: Variable


@model
class PagerDutyReceiver(Receiver):
    """PagerDuty。"""

    routing_key_env: Variable
    region: Literal["us", "eu"] = "us"
    source: Name | None = None


@model
class EmailReceiver(Receiver):
    """SMTP。"""

    host: Name
    sender: Name
    to: Annotated[tuple[Name, ...], Some]
    port: Annotated[int, Field(strict=True, ge=1, le=65535)] = 587
    tls: Literal["starttls", "implicit", "none"] = "starttls"
    user_env: Variable | None = None
    password_env: Variable | None = None


RECEIVERS: Mapping[str, type[Receiver]] = {
    "slack": UrlReceiver,
    "pagerduty": PagerDutyReceiver,
    "teams": UrlReceiver,
    "webhook": WebhookReceiver,
    "email": EmailReceiver,
    "alertmanager": UrlReceiver,
    "console": Receiver,
}


def read_route(value: Any) -> dict[str, Any]:
    """経路を検査する。書かれた項目だけの辞書になる。"""
    return _written(read(Route, value), value)


def read_receiver(value: Any) -> dict[str, Any]:
    """通知先を検査する。書かれた項目だけの辞書になる。"""
    if not isinstance(value, Mapping):
        raise ValueError(f"{short(value)} is not a mapping")
    kind = value.get("type")
    if not isinstance(kind, str) or kind not in RECEIVERS:
        raise ValueError(f"type must be one of {', '.join(RECEIVERS)}{near(kind, RECEIVERS)}")
    keys = keys_of(RECEIVERS[kind])
    literal = [key for key, item in value.items() if _is_literal(f"{key}", item, keys)]
    found: list[Problem] = [
        (key, f"{NO_SECRET}; write {_variable_key(key, keys)}: NAME") for key in literal
    ]
    public = {key: item for key, item in value.items() if key not in literal}
    stand_ins = {f"{key}_env": "NAME" for key in literal if f"{key}_env" in keys}
    try:
        receiver = read(RECEIVERS[kind], {**stand_ins, **public})
    except AlertConfigError as error:
        raise AlertConfigError([], [*found, *error.places]) from None
    if found:
        raise AlertConfigError([], found)
    return _written(receiver, public)


def _written(made: Any, value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key in value if (item := getattr(made, key)) is not None}


def _is_literal(key: str, item: Any, keys: list[str]) -> bool:
    """``url_env`` の代わりに ``url`` と書いたか、値そのものが秘密らしいか。"""
    looks_secret = isinstance(item, str) and bool(SECRET_LIKE.search(item))
    return f"{key}_env" in keys or (looks_secret and not key.endswith("_env"))


def _variable_key(key: str, keys: list[str]) -> str:
    names = [name for name in keys if name.endswith("_env")]
    return (difflib.get_close_matches(key, names, 1) or names or [f"{key}_env"])[0]
