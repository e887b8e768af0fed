"""8.1.4 トレーシングの設定値と状態(basic_setup.py の土台)。"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import mlflow
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

Backend = Literal["sqlite", "server", "databricks"]
ExportProfile = Literal["default", "burst", "otlp"]
Text = Annotated[str, Field(pattern=r"\S")]
ResourceValue = Annotated[str, Field(pattern=r"^[^,=]*[^,=\s][^,=]*$")]
Seconds = Annotated[float, Field(gt=0, le=threading.TIMEOUT_MAX)]


class TracingSetupError(RuntimeError):
    """トレーシングを設定できない(設定の誤り、または ``strict=True`` でサーバーに届かない)。"""


@dataclass(frozen=True)
class TracingStatus:
    """いまのトレーシングの状態。"""

    experiment_id: str
    """サーバーに届くまでは空文字列。"""
    experiment_name: str
    tracking_uri: str
    backend: Backend
    export_profile: str
    warnings: tuple[str, ...]
    ready: bool
    """``False`` はサーバーに届かず記録を止めている状態。届きしだい自動で始まる。"""
    backlog: int
    """終わったが、まだサーバーにもディスクにも届いていないトレースの件数。"""
    dropped: int
    """設定してから失った件数(キューの満杯、送信の失敗など)。"""
    spooled: int
    """``TraceSpool`` のディスクで送信を待つ件数。"""


class TracingOptions(BaseModel):
    """``setup_production_tracing`` の引数(意味はそちらを参照)。"""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    experiment_name: Text
    service_name: Text
    tracking_uri: str | None
    enable_async: bool
    deployment_region: ResourceValue | None
    service_version: ResourceValue | None
    environment: ResourceValue
    export_profile: ExportProfile
    strict: bool
    probe_timeout_seconds: Seconds
    retry_seconds: Seconds
    span_processors: Annotated[tuple[Callable[..., None], ...], BeforeValidator(tuple)]


def check_options(**options: Any) -> TracingOptions:
    """引数を確かめる。正しくないものをすべて、1 つの ``ValueError`` にする。"""
    try:
        return TracingOptions(**options)
    except ValidationError as error:
        bad = [f"{e['loc'][0]}={e['input']!r} must be valid: {e['msg']}" for e in error.errors()]
    raise ValueError(hide_secrets("; ".join(bad)))


def hide_secrets(text: str) -> str:
    """URL の中の利用者名とパスワードを隠す(ログと例外の文面に出さないため)。"""
    return re.sub(r"(?<=://)[^\s/]+(?=@)", "***", text)


def backend_of(uri: str) -> Backend:
    """トラッキング URI の種類。使えないものは ``TracingSetupError``。"""
    if re.match(r"https?://[^/]", uri, re.IGNORECASE):
        return "server"
    scheme = uri.partition("://")[0].lower()
    if scheme == "databricks":
        return "databricks"
    if scheme == "sqlite" and hasattr(mlflow, "MlflowClient"):
        return "sqlite"
    raise TracingSetupError(
        f"tracking_uri={hide_secrets(uri)!r} is not supported for production tracing; use "
        "http(s)://, databricks or sqlite:/// (sqlite needs the full package: pip install mlflow)"
    )
