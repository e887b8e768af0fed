"""8.4.2 通知先と経路の設定。秘密は、値ではなく環境変数の名前(``url_env`` など)だけを書く。"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from typing_extensions import NotRequired, TypedDict

from .checking import SECRET_LIKE, near, written
from .values import Length, Name, Severity


def _variable(value: Any) -> Any:
    # 値を文に入れない: 変数の名前の代わりに、秘密そのものが書かれているかもしれない
    named = isinstance(value, str) and re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII)
    if not named or SECRET_LIKE.search(value):
        raise ValueError("not the name of an environment variable; secrets stay out of the file")
    return value


def _without_secret(value: str) -> str:
    if SECRET_LIKE.search(value):
        raise ValueError("looks like a secret; secrets stay out of the file")
    return value


def _without_nulls(value: Any) -> Any:
    """値のない項目(``repeat:``)は、書かれていないものとみなす。"""
    if not isinstance(value, Mapping):
        return value
    return {key: item for key, item in value.items() if item is not None}


Plain = Annotated[Name, AfterValidator(_without_secret)]
Variable = Annotated[str, BeforeValidator(_variable)]
Addresses = Annotated[Sequence[Name], Field(min_length=1)]


@written
class Route(TypedDict):
    """条件(``match``)に合うアラートを、どの通知先へ、どの間隔(``repeat``)で送るか。"""

    match: NotRequired[Mapping[Name, Name]]
    to: Sequence[Name]
    repeat: NotRequired[Length]


class Common(TypedDict):
    """どの通知先にもある項目。"""

    send_resolved: NotRequired[bool]
    min_severity: NotRequired[Severity]


@written
class ConsoleReceiver(Common):
    """標準出力。"""

    type: Literal["console"]


@written
class UrlReceiver(Common):
    """URL を知っていれば送れる通知先。"""

    type: Literal["slack", "teams", "alertmanager"]
    url_env: Variable


@written
class WebhookReceiver(Common):
    """署名付きの Webhook。"""

    type: Literal["webhook"]
    url_env: Variable
    secret_env: Variable


@written
class PagerDutyReceiver(Common):
    """PagerDuty。"""

    type: Literal["pagerduty"]
    routing_key_env: Variable
    region: NotRequired[Literal["us", "eu"]]
    source: NotRequired[Plain]


@written
class EmailReceiver(Common):
    """SMTP。"""

    type: Literal["email"]
    host: Plain
    sender: Plain
    to: Addresses
    port: NotRequired[Annotated[int, Field(strict=True, ge=1, le=65535)]]
    tls: NotRequired[Literal["starttls", "implicit", "none"]]
    user_env: NotRequired[Variable]
    password_env: NotRequired[Variable]


TYPES = ("slack", "pagerduty", "teams", "webhook", "email", "alertmanager", "console")


def _known_type(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, Mapping) else "console"
    if kind not in TYPES:
        raise ValueError(f"type must be one of {', '.join(TYPES)}{near(kind, TYPES)}")
    return value


Receiver = Annotated[
    UrlReceiver | WebhookReceiver | PagerDutyReceiver | EmailReceiver | ConsoleReceiver,
    Field(discriminator="type"),
    BeforeValidator(_known_type),
    BeforeValidator(_without_nulls),
]
AnyRoute = Annotated[Route, BeforeValidator(_without_nulls)]
