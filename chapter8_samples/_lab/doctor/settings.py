"""環境変数の食い違い: 1 つずつは正しくても、トレースが消えたり遅くなったりする組み合わせ。"""

from __future__ import annotations

import locale
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .finding import Finding
from .setup_problems import address_of

Environment = Mapping[str, str]
QUEUE_LIMITS = (
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE",
    "MLFLOW_TRACE_BUFFER_MAX_SIZE",
)
_OTLP = "OTEL_EXPORTER_OTLP_"


def conflicts(environment: Environment) -> list[Finding]:
    """すべての食い違い。なければ OK が 1 件。"""
    found = [finding for rule in _RULES for finding in rule(environment)]
    return found or [Finding("設定の食い違い", "ok", "見つかりませんでした")]


def otlp_endpoint(environment: Environment) -> str:
    """MLflow が使う OTLP のトレースの送り先。送らない設定なら空。"""
    if environment.get("MLFLOW_ENABLE_OTLP_EXPORTER", "").lower() == "false":
        return ""
    if traces := environment.get(f"{_OTLP}TRACES_ENDPOINT"):
        return traces
    general = environment.get(f"{_OTLP}ENDPOINT", "").rstrip("/")
    return f"{general}/v1/traces" if general else ""


def otlp_setting(environment: Environment, name: str, default: str = "") -> str:
    """``OTEL_EXPORTER_OTLP_TRACES_<name>``、なければ全体の ``OTEL_EXPORTER_OTLP_<name>``。"""
    return environment.get(f"{_OTLP}TRACES_{name}") or environment.get(f"{_OTLP}{name}") or default


def _true(environment: Environment, name: str) -> bool:
    return environment.get(name, "").strip().lower() in ("true", "1")


def _export_mode(environment: Environment) -> Iterator[Finding]:
    """OTLP だけに送られて、MLflow に 1 件も残らない。"""
    real = "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT"
    dual = _true(environment, real)
    if otlp_endpoint(environment) and not dual:
        yield Finding(
            "OTLP と MLflow",
            "error",
            "OTLP の送り先だけがあるので、トレースは MLflow に 1 件も残りません。",
            f"{real}=true にするか、setup_otlp_export(..., mode='dual') を呼んでください。",
        )
    if "MLFLOW_ENABLE_DUAL_EXPORT" in environment and not dual:
        yield Finding(
            "二重送信の名前",
            "warning",
            "MLFLOW_ENABLE_DUAL_EXPORT は、OSS の MLflow では読まれません。",
            f"{real}=true を使ってください。",
        )
    theirs = address_of(environment.get("MLFLOW_TRACKING_URI", ""))
    ours = address_of(otlp_endpoint(environment))
    if dual and ours and theirs and ours == theirs:
        yield Finding(
            "OTLP の送り先",
            "error",
            "MLflow サーバー自身に二重に送るので、入力や出力が上書きされます。",
            f"{real}=false にするか、OTLP を別の送り先にしてください。",
        )


def _otlp_values(environment: Environment) -> Iterator[Finding]:
    """値の誤り。MLflow では、エラーにならずにトレースが全部消える。"""
    endpoint = otlp_endpoint(environment)
    if not endpoint:
        return
    protocol = otlp_setting(environment, "PROTOCOL", "grpc")
    if protocol not in ("grpc", "http/protobuf"):
        yield _otlp_error(
            f"プロトコル {protocol!r} は使えず、トレースがすべて無効になります。",
            f"{_OTLP}TRACES_PROTOCOL を grpc か http/protobuf にしてください。",
        )
    if "://" not in endpoint:
        yield _otlp_error(
            "送り先に http:// か https:// がありません。",
            "http://HOST:4317 (gRPC)か http://HOST:4318/v1/traces (HTTP)の形で書いてください。",
        )
    elif protocol != "grpc" and not endpoint.split("?")[0].endswith("/v1/traces"):
        yield _otlp_error(
            "HTTP の送り先が /v1/traces で終わっていないので、404 で失われます。",
            f"{_OTLP}TRACES_ENDPOINT の最後に /v1/traces を付けてください。",
        )
    if protocol == "grpc" and otlp_setting(environment, "COMPRESSION") == "deflate":
        yield _otlp_error(
            "gRPC では deflate を使えず、トレースがすべて無効になります。",
            f"{_OTLP}COMPRESSION を gzip にしてください。",
        )
    timeout = otlp_setting(environment, "TIMEOUT")
    if timeout and _number(timeout) is None:
        yield _otlp_error(
            f"期限 {timeout!r} は数ではなく、トレースがすべて無効になります。",
            f"{_OTLP}TIMEOUT=10 のように、秒で書いてください。",
        )
    yield from _certificate(environment, protocol)
    yield from _otlp_cautions(environment)


def _otlp_error(detail: str, fix: str) -> Finding:
    return Finding("OTLP の値", "error", detail, fix)


def _certificate(environment: Environment, protocol: str) -> Iterator[Finding]:
    certificate = otlp_setting(environment, "CERTIFICATE")
    if certificate and not Path(certificate).is_file():
        yield _otlp_error(
            "証明書のファイルがありません。", f"{_OTLP}CERTIFICATE のパスを直してください。"
        )
    bundle = next((n for n in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if environment.get(n)), "")
    if certificate and bundle and protocol != "grpc":
        yield Finding(
            "OTLP の証明書",
            "warning",
            f"HTTP では {bundle} が優先され、OTLP 用の証明書は使われません。",
            f"{bundle} を消すか、gRPC で送ってください。",
        )


def _otlp_cautions(environment: Environment) -> Iterator[Finding]:
    if environment.get(f"{_OTLP}ENDPOINT"):
        yield Finding(
            "OTLP のメトリクス",
            "warning",
            "全体の送り先を使うと、利用者やセッションの ID がラベルのメトリクスも送られます。",
            f"{_OTLP}ENDPOINT の代わりに {_OTLP}TRACES_ENDPOINT を使ってください。",
        )
    seconds = _number(otlp_setting(environment, "TIMEOUT"))
    if seconds is not None and seconds >= 1000:
        yield Finding(
            "OTLP の期限",
            "warning",
            f"Python の SDK では単位が秒なので、{seconds:g} 秒待ちます(仕様ではミリ秒)。",
            f"{_OTLP}TIMEOUT=10 のように、秒で書いてください。",
        )


def _opentelemetry(environment: Environment) -> Iterator[Finding]:
    if _true(environment, "OTEL_SDK_DISABLED"):
        yield Finding(
            "OpenTelemetry",
            "error",
            "OTEL_SDK_DISABLED=true で、MLflow のトレースもすべて止まっています。",
            "OTEL_SDK_DISABLED を消してください。",
        )
    for name in ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_EXPORTER"):
        if environment.get(name):
            yield Finding(
                name,
                "warning",
                "MLflow はこの設定を読みません。",
                "サンプリングは 8.1 の sampling_strategies、送信は 8.5 の otlp_setup で決めます。",
            )
    items = environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    if items and any(
        "=" not in item or not item.split("=")[0].strip() for item in items.split(",")
    ):
        yield Finding(
            "リソース属性",
            "warning",
            "OTEL_RESOURCE_ATTRIBUTES に壊れた項目があり、すべての属性が捨てられます。",
            "k=v をコンマで区切り、最後のコンマを消し、値の , と = は %2C と %3D にしてください。",
        )


def _experiment_by_environment(environment: Environment) -> Iterator[Finding]:
    names = [n for n in ("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME") if environment.get(n)]
    if names:
        yield Finding(
            "エクスペリメントの指定",
            "warning",
            f"{names[0]} だけに頼ると、トレース 1 件ごとにサーバーへの問い合わせを待ちます。",
            "起動時に一度、setup_production_tracing か mlflow.set_experiment を呼んでください。",
        )


def _sampling(environment: Environment) -> Iterator[Finding]:
    name = "MLFLOW_TRACE_SAMPLING_RATIO"
    text = environment.get(name)
    if not text:
        return
    ratio = _number(text)
    if ratio is None or not 0 <= ratio <= 1:
        yield Finding(
            name, "error", "0 から 1 の数ではありません。", f"{name}=0.1 のように直してください。"
        )
    elif ratio < 1:
        yield Finding(
            "サンプリング",
            "warning",
            f"先頭で {ratio:.0%} に間引くので、テールサンプリングはエラーの多くを見られません。",
            f"{name} を消すか、TailSampler に head_probability={ratio:g} を渡してください。",
        )


def _queues(environment: Environment) -> Iterator[Finding]:
    name = "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"
    if name in environment and not _true(environment, name):
        why = "空の値は false と同じで、" if not environment[name].strip() else ""
        yield Finding(
            "非同期の記録",
            "warning",
            f"{why}リクエストのスレッドで書き込みます(1 件およそ 40 ms)。",
            f"本番では {name} を消すか true にしてください。",
        )
    given = {name: _number(environment[name]) for name in QUEUE_LIMITS if environment.get(name)}
    for name, value in given.items():
        if value is None or value < 1 or value % 1:
            yield Finding(
                name,
                "error",
                "1 以上の整数ではありません。",
                f"{name}=20000 のように直してください。",
            )
    if given and len(given) < len(QUEUE_LIMITS):
        missing = "、".join(name for name in QUEUE_LIMITS if name not in given)
        yield Finding(
            "キューの上限",
            "warning",
            "上限は 3 つあり、1 つでも既定値のままだと、バーストのトレースがそこで消えます。",
            f"{missing} も設定するか、setup_production_tracing に任せてください。",
        )
    if environment.get("MLFLOW_TRACE_TIMEOUT_SECONDS"):
        yield Finding(
            "終わらないトレース",
            "warning",
            "MLFLOW_TRACE_TIMEOUT_SECONDS は、既定のバッチ処理では働きません。",
            "ストリームは 8.1 の traced_stream で囲み、必ず終わるようにしてください。",
        )


def _jobs(environment: Environment) -> Iterator[Finding]:
    if environment.get("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "").lower() == "false":
        yield Finding(
            "サーバーのジョブ",
            "warning",
            "この環境で起動したサーバーは、開始したスコアラーを動かさず、採点しません。",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION を true にするか、run_scoring_cycle で採点します。",
        )


def _credentials(environment: Environment) -> Iterator[Finding]:
    user, password = (environment.get(f"MLFLOW_TRACKING_{n}") for n in ("USERNAME", "PASSWORD"))
    if bool(user) != bool(password):
        missing = "PASSWORD" if user else "USERNAME"
        yield Finding(
            "サーバーの認証",
            "error",
            f"MLFLOW_TRACKING_{missing} がないので、認証なしで接続します。",
            f"MLFLOW_TRACKING_{missing} も設定してください。",
        )
    if _true(environment, "MLFLOW_TRACKING_INSECURE_TLS"):
        yield Finding(
            "サーバーの証明書",
            "warning",
            "MLFLOW_TRACKING_INSECURE_TLS=true で、証明書を検証していません。",
            "MLFLOW_TRACKING_SERVER_CERT_PATH に、社内の CA の証明書を指定してください。",
        )
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    place = address_of(uri)
    secret = bool(password or environment.get("MLFLOW_TRACKING_TOKEN") or "@" in uri)
    if uri.startswith("http://") and secret and place and place[0] not in _LOOPBACK:
        yield Finding(
            "サーバーの認証",
            "warning",
            "暗号化されていない http:// で、鍵を送ります。",
            "https:// の URL を使ってください。",
        )


_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _proxy(environment: Environment) -> Iterator[Finding]:
    lowered = {name.lower(): value for name, value in environment.items()}
    if not (lowered.get("http_proxy") or lowered.get("all_proxy")):
        return
    excluded = {part.strip() for part in lowered.get("no_proxy", "").split(",")}
    if not excluded & {*_LOOPBACK, "*"}:
        yield Finding(
            "プロキシ",
            "warning",
            "手元(127.0.0.1)のサーバーへの通信もプロキシに送られ、失敗することがあります。",
            "NO_PROXY=127.0.0.1,localhost を設定してください。",
        )


def _console(environment: Environment) -> Iterator[Finding]:
    encoding = (sys.stdout.encoding or locale.getpreferredencoding(False)).lower()
    if encoding.replace("-", "") != "utf8" and environment.get("PYTHONUTF8") != "1":
        yield Finding(
            "端末の文字コード",
            "warning",
            f"{encoding} なので、絵文字などを含む LLM の答えを print すると失敗します。",
            "PYTHONUTF8=1 を設定してください(このサンプルの表示は cp932 でも読めます)。",
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_RULES: tuple[Callable[[Environment], Iterator[Finding]], ...] = (
    _export_mode,
    _otlp_values,
    _opentelemetry,
    _experiment_by_environment,
    _sampling,
    _queues,
    _jobs,
    _credentials,
    _proxy,
    _console,
)
