"""8.4.2 通知先と経路の設定。秘密は、値ではなく環境変数の名前(``url_env`` など)だけを書く。"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from typing_extensions import NotRequired, TypedDict

from .checking import written
from .values import SECRET_LIKE, Length, Name, Severity


def _variable(name: str) -> str:
    # 値を文に入れない: 変数の名前の代わりに、秘密そのものが書かれているかもしれない
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or SECRET_LIKE.search(name):
        raise ValueError("not the name of an environment variable; secrets stay out of the file")
    return name


def _without_secret(value: str) -> str:
    if SECRET_LIKE.search(value):
        raise ValueError("looks like a secret; secrets stay out of the file")
    return value


Plain = Annotated[Name, AfterValidator(_without_secret)]
Variable = Annotated[str, AfterValidator(_variable)]
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
    port: NotRequired[Annotated[int, Field(ge=1, le=65535)]]
    tls: NotRequired[Literal["starttls", "implicit", "none"]]
    user_env: NotRequired[Variable]
    password_env: NotRequired[Variable]


Receiver = Annotated[
    UrlReceiver | WebhookReceiver | PagerDutyReceiver | EmailReceiver | ConsoleReceiver,
    Field(discriminator="type"),
]
