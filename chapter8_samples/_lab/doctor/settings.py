"""環境変数の診断: 値の誤りと、1 つずつは正しくても、トレースが消えたり遅くなったりする組み合わせ。

値の誤りは ``VALUES`` の型が、組み合わせは ``conflicts`` が見つける。
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, PositiveInt, TypeAdapter, ValidationError

from .setup_problems import Finding

Environment = Mapping[str, str]
OTLP = "OTEL_EXPORTER_OTLP_"
DUAL, ASYNC = "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"
QUEUE_LIMITS = (
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE",
    "MLFLOW_TRACE_BUFFER_MAX_SIZE",
)

_RATIO = (Annotated[float, Field(ge=0, le=1)], "0 から 1 の数(例: 0.1)")
_LIMIT = (PositiveInt, "1 以上の整数(例: 20000)")
_PROTOCOL = (Literal["grpc", "http/protobuf"], "grpc か http/protobuf")
_SECONDS = (Annotated[float, Field(gt=0, lt=1000)], "秒数(例: 10。ミリ秒ではありません)")
VALUES: dict[str, tuple[Any, str]] = {
    "MLFLOW_TRACE_SAMPLING_RATIO": _RATIO,
    **dict.fromkeys(QUEUE_LIMITS, _LIMIT),
    f"{OTLP}TRACES_PROTOCOL": _PROTOCOL,
    f"{OTLP}PROTOCOL": _PROTOCOL,
    f"{OTLP}TRACES_TIMEOUT": _SECONDS,
    f"{OTLP}TIMEOUT": _SECONDS,
}
"""変数 -> (型, 正しい値)。"""


def is_true(environment: Environment, name: str) -> bool:
    """MLflow が真とみなす値か。"""
    return environment.get(name, "").strip().lower() in ("true", "1")


def otlp_value(environment: Environment, name: str) -> str:
    """トレースだけの設定。なければ全体の設定。"""
    return environment.get(f"{OTLP}TRACES_{name}") or environment.get(f"{OTLP}{name}", "")


def otlp_endpoint(environment: Environment) -> str:
    """MLflow が使う OTLP のトレースの送り先。送らない設定なら空。"""
    if environment.get("MLFLOW_ENABLE_OTLP_EXPORTER", "").lower() == "false":
        return ""
    general = environment.get(f"{OTLP}ENDPOINT", "").rstrip("/")
    return environment.get(f"{OTLP}TRACES_ENDPOINT") or (general and f"{general}/v1/traces")


def is_grpc(environment: Environment) -> bool:
    """OTLP を gRPC で送るか(MLflow の既定)。"""
    return otlp_value(environment, "PROTOCOL") in ("", "grpc")


def wrong_values(environment: Environment) -> Iterator[Finding]:
    """型の合わない値。"""
    for name, (kind, right) in VALUES.items():
        value = environment.get(name)
        if not value or (name.startswith(OTLP) and not otlp_endpoint(environment)):
            continue
        traces = name.replace(OTLP, f"{OTLP}TRACES_")
        if traces != name and environment.get(traces):
            continue  # トレースだけの値が先に使われる
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError:
            detail, fix = f"値 {value!r} は正しくありません。", f"{right}に直してください。"
            yield Finding(name, "error", detail, fix)


# 組み合わせ ----------------------------------------------------------------


def _otlp_address(environment: Environment, endpoint: str) -> Iterator[Finding]:
    """OTLP の送り先の誤り。どれも、トレースが 1 件も届かない。"""
    name = "OTLP の送り先"
    if "://" not in endpoint:
        detail = "送り先に http:// か https:// がありません。"
        fix = "http://HOST:4317 (gRPC)か http://HOST:4318/v1/traces (HTTP)の形で書いてください。"
        yield Finding(name, "error", detail, fix)
    elif not is_grpc(environment) and not endpoint.split("?")[0].endswith("/v1/traces"):
        detail = "HTTP の送り先が /v1/traces で終わっていないので、404 で失われます。"
        fix = f"{OTLP}TRACES_ENDPOINT の最後に /v1/traces を付けてください。"
        yield Finding(name, "error", detail, fix)
    if is_grpc(environment) and otlp_value(environment, "COMPRESSION") == "deflate":
        detail = "gRPC では deflate を使えず、トレースがすべて無効になります。"
        yield Finding("OTLP の圧縮", "error", detail, f"{OTLP}COMPRESSION を gzip にしてください。")


def _otlp_and_mlflow(environment: Environment, endpoint: str) -> Iterator[Finding]:
    """OTLP に送るときの、MLflow の側の食い違い。"""
    name, server = "OTLP と MLflow", _host(environment.get("MLFLOW_TRACKING_URI", ""))
    if not is_true(environment, DUAL):
        detail = "OTLP の送り先だけがあるので、トレースは MLflow に 1 件も残りません。"
        fix = f"{DUAL}=true にするか、setup_otlp_export(..., mode='dual') を呼んでください。"
        yield Finding(name, "error", detail, fix)
        if environment.get("MLFLOW_ENABLE_DUAL_EXPORT"):
            detail = "MLFLOW_ENABLE_DUAL_EXPORT は、OSS の MLflow では読まれません。"
            yield Finding(name, "warning", detail, f"{DUAL}=true を使ってください。")
    elif server and server == _host(endpoint):
        detail = "MLflow サーバー自身に二重に送るので、入力や出力が上書きされます。"
        fix = f"{DUAL}=false にするか、OTLP を別の送り先にしてください。"
        yield Finding(name, "error", detail, fix)
    if environment.get(f"{OTLP}ENDPOINT"):
        detail = "全体の送り先を使うと、利用者やセッションの ID がラベルのメトリクスも送られます。"
        fix = f"{OTLP}ENDPOINT の代わりに {OTLP}TRACES_ENDPOINT を使ってください。"
        yield Finding("OTLP のメトリクス", "warning", detail, fix)


def _host(url: str) -> str:
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:
        return ""


def _open_telemetry(environment: Environment) -> Iterator[Finding]:
    if is_true(environment, "OTEL_SDK_DISABLED"):
        detail = "OTEL_SDK_DISABLED=true で、MLflow のトレースもすべて止まっています。"
        yield Finding("OpenTelemetry", "error", detail, "OTEL_SDK_DISABLED を消してください。")
    if attributes := environment.get("OTEL_RESOURCE_ATTRIBUTES"):
        pairs = [item.partition("=") for item in attributes.split(",")]
        if not all(key.strip() and equals for key, equals, _ in pairs):
            detail = "OTEL_RESOURCE_ATTRIBUTES に壊れた項目があり、すべての属性が捨てられます。"
            fix = "k=v をコンマで区切り、最後のコンマを消し、値の , は %2C にしてください。"
            yield Finding("リソース属性", "warning", detail, fix)


def _mlflow(environment: Environment) -> Iterator[Finding]:
    login = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
    if len([name for name in login if environment.get(name)]) == 1:
        detail = "利用者の名前とパスワードの片方しかないので、認証なしで接続します。"
        fix = f"{login[0]} と {login[1]} の両方を設定してください。"
        yield Finding("サーバーの認証", "error", detail, fix)
    if ASYNC in environment and not is_true(environment, ASYNC):
        detail = "値が空か false なので、リクエストのスレッドで書き込みます(1 件およそ 40 ms)。"
        fix = f"本番では {ASYNC} を消すか true にしてください。"
        yield Finding("非同期の記録", "warning", detail, fix)
    default = [name for name in QUEUE_LIMITS if not environment.get(name)]
    if 0 < len(default) < len(QUEUE_LIMITS):
        detail = "上限は 3 つあり、1 つでも既定値のままだと、バーストのトレースがそこで消えます。"
        fix = f"{'、'.join(default)} も設定するか、setup_production_tracing に任せてください。"
        yield Finding("キューの上限", "warning", detail, fix)


def conflicts(environment: Environment) -> list[Finding]:
    """値の誤りと食い違いのすべて。なければ OK が 1 件。"""
    found = [*wrong_values(environment), *_open_telemetry(environment), *_mlflow(environment)]
    if endpoint := otlp_endpoint(environment):
        found += _otlp_address(environment, endpoint)
        found += _otlp_and_mlflow(environment, endpoint)
    return found or [Finding("設定の食い違い", "ok", "見つかりませんでした")]
