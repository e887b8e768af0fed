"""環境変数の診断: 値の誤りと、1 つずつは正しくても、トレースが消えたり遅くなったりする組み合わせ。

値の誤りは ``Values`` の型が、組み合わせは ``ERRORS`` と ``WARNINGS`` の表が見つける。
"""

from __future__ import annotations

import locale
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Literal

from pydantic import AliasChoices, BaseModel, Field, FilePath, ValidationError

from .finding import Finding, Level
from .setup_problems import address_of

QUEUE_LIMITS = (
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_SPAN_BATCH_SIZE",
    "MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE",
    "MLFLOW_TRACE_BUFFER_MAX_SIZE",
)
OTLP_VALUE = "OTLP の値"
DUAL, ASYNC = "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "MLFLOW_ENABLE_ASYNC_TRACE_LOGGING"
_OTLP, _LOOPBACK = "OTEL_EXPORTER_OTLP_", ("127.0.0.1", "localhost", "::1")
_PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
_MUST_BE = {
    "ratio": "0 から 1 の数(例: 0.1)",
    "protocol": "grpc か http/protobuf",
    "timeout": "秒数(例: 10)",
    "certificate": "あるファイルのパス",
}


def _otlp(name: str) -> AliasChoices:
    """トレースだけの設定。なければ全体の設定。"""
    return AliasChoices(f"{_OTLP}TRACES_{name}", f"{_OTLP}{name}")


Limit = Annotated[int, Field(ge=1)]


class Values(BaseModel):
    """型と範囲のある値。"""

    ratio: float = Field(1.0, ge=0, le=1, alias="MLFLOW_TRACE_SAMPLING_RATIO")
    batch_size: Limit | None = Field(None, alias=QUEUE_LIMITS[0])
    queue_size: Limit | None = Field(None, alias=QUEUE_LIMITS[1])
    buffer_size: Limit | None = Field(None, alias=QUEUE_LIMITS[2])
    protocol: Literal["grpc", "http/protobuf"] = Field("grpc", validation_alias=_otlp("PROTOCOL"))
    timeout: float = Field(10, validation_alias=_otlp("TIMEOUT"))
    certificate: FilePath | None = Field(None, validation_alias=_otlp("CERTIFICATE"))


class Settings:
    """環境変数。``settings["X"]`` は、なければ空。"""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment
        given = {name: value for name, value in environment.items() if value}
        if not self.endpoint:  # 送らないなら、OTLP の値は使われない
            given = {name: value for name, value in given.items() if not name.startswith(_OTLP)}
        self.wrong: list[Finding] = []
        """値の誤り。誤った値は、既定値に置き換える。"""
        try:
            self.values = Values.model_validate(given)
        except ValidationError as error:
            names = [str(item["loc"][0]) for item in error.errors()]
            self.wrong = [_wrong(name, given[name]) for name in names]
            rest = {name: value for name, value in given.items() if name not in names}
            self.values = Values.model_validate(rest)

    def __getitem__(self, name: str) -> str:
        return self.environment.get(name, "")

    def true(self, name: str) -> bool:
        """MLflow が真とみなす値か。"""
        return self[name].strip().lower() in ("true", "1")

    def otlp(self, name: str) -> str:
        """トレースだけの設定。なければ全体の設定。"""
        return self[f"{_OTLP}TRACES_{name}"] or self[f"{_OTLP}{name}"]

    @property
    def endpoint(self) -> str:
        """MLflow が使う OTLP のトレースの送り先。送らない設定なら空。"""
        if self["MLFLOW_ENABLE_OTLP_EXPORTER"].lower() == "false":
            return ""
        general = self[f"{_OTLP}ENDPOINT"].rstrip("/")
        return self[f"{_OTLP}TRACES_ENDPOINT"] or (f"{general}/v1/traces" if general else "")

    @property
    def missing_limits(self) -> str:
        """既定値のままの上限。1 つも設定していなければ空。"""
        missing = [name for name in QUEUE_LIMITS if not self[name]]
        return "、".join(missing) if len(missing) < len(QUEUE_LIMITS) else ""

    @property
    def encoding(self) -> str:
        """端末の文字コード。"""
        return (sys.stdout.encoding or locale.getpreferredencoding(False)).lower()


def _wrong(name: str, value: str) -> Finding:
    kind = name.removeprefix(_OTLP).removeprefix("TRACES_").lower()
    must_be = _MUST_BE.get("ratio" if kind.endswith("ratio") else kind, "1 以上の整数(例: 20000)")
    fix = f"{must_be}に直してください。"
    if name.startswith(_OTLP):
        detail = f"{name} の値 {value!r:.60} は使えず、トレースがすべて無効になります。"
        return Finding(OTLP_VALUE, "error", detail, fix)
    return Finding(name, "error", f"値 {value!r:.60} は使えません。", fix)


def _endpoint(s: Settings) -> Iterator[Finding]:
    if s.endpoint and "://" not in s.endpoint:
        yield Finding(
            OTLP_VALUE,
            "error",
            "送り先に http:// か https:// がありません。",
            "http://HOST:4317 (gRPC)か http://HOST:4318/v1/traces (HTTP)の形で書いてください。",
        )
    elif s.values.protocol != "grpc" and not s.endpoint.split("?")[0].endswith("/v1/traces"):
        yield Finding(
            OTLP_VALUE,
            "error",
            "HTTP の送り先が /v1/traces で終わっていないので、404 で失われます。",
            f"{_OTLP}TRACES_ENDPOINT の最後に /v1/traces を付けてください。",
        )


def _sends_to_itself(s: Settings) -> bool:
    theirs = address_of(s["MLFLOW_TRACKING_URI"])
    return s.true(DUAL) and theirs is not None and theirs == address_of(s.endpoint)


def _sends_key_in_plain_text(s: Settings) -> bool:
    uri = s["MLFLOW_TRACKING_URI"]
    place = address_of(uri)
    key = s["MLFLOW_TRACKING_PASSWORD"] or s["MLFLOW_TRACKING_TOKEN"] or "@" in uri
    return bool(key and place and uri.startswith("http://") and place[0] not in _LOOPBACK)


def _proxies_itself(s: Settings) -> bool:
    excluded = (s["no_proxy"] or s["NO_PROXY"]).replace(" ", "").split(",")
    return any(s[name] for name in _PROXIES) and not {*excluded} & {*_LOOPBACK, "*"}


def _ca_bundle(s: Settings) -> str:
    return s["REQUESTS_CA_BUNDLE"] or s["CURL_CA_BUNDLE"]


def _broken_attributes(s: Settings) -> bool:
    text = s["OTEL_RESOURCE_ATTRIBUTES"]
    return bool(text) and not re.fullmatch(
        r"\s*[^,=\s][^,=]*=[^,]*(,\s*[^,=\s][^,=]*=[^,]*)*", text
    )


# 名前 -> (当てはまる条件, 何が起きるか, 直し方)。文の {s...} は、設定の値になる
Table = Mapping[str, tuple[Callable[[Settings], object], str, str]]
ERRORS: Table = {
    "OTLP と MLflow": (
        lambda s: s.endpoint and not s.true(DUAL),
        "OTLP の送り先だけがあるので、トレースは MLflow に 1 件も残りません。",
        f"{DUAL}=true にするか、setup_otlp_export(..., mode='dual') を呼んでください。",
    ),
    "OTLP の送り先": (
        _sends_to_itself,
        "MLflow サーバー自身に二重に送るので、入力や出力が上書きされます。",
        f"{DUAL}=false にするか、OTLP を別の送り先にしてください。",
    ),
    OTLP_VALUE: (
        lambda s: s.endpoint and s.values.protocol == "grpc" and s.otlp("COMPRESSION") == "deflate",
        "gRPC では deflate を使えず、トレースがすべて無効になります。",
        f"{_OTLP}COMPRESSION を gzip にしてください。",
    ),
    "OpenTelemetry": (
        lambda s: s.true("OTEL_SDK_DISABLED"),
        "OTEL_SDK_DISABLED=true で、MLflow のトレースもすべて止まっています。",
        "OTEL_SDK_DISABLED を消してください。",
    ),
    "サーバーの認証": (
        lambda s: bool(s["MLFLOW_TRACKING_USERNAME"]) != bool(s["MLFLOW_TRACKING_PASSWORD"]),
        "利用者の名前とパスワードの片方しかないので、認証なしで接続します。",
        "MLFLOW_TRACKING_USERNAME と MLFLOW_TRACKING_PASSWORD の両方を設定してください。",
    ),
}
WARNINGS: Table = {
    "二重送信の名前": (
        lambda s: s["MLFLOW_ENABLE_DUAL_EXPORT"] and not s.true(DUAL),
        "MLFLOW_ENABLE_DUAL_EXPORT は、OSS の MLflow では読まれません。",
        f"{DUAL}=true を使ってください。",
    ),
    "OTLP の証明書": (
        lambda s: s.values.certificate and s.values.protocol != "grpc" and _ca_bundle(s),
        "HTTP では REQUESTS_CA_BUNDLE や CURL_CA_BUNDLE が優先され、OTLP の証明書は使われません。",
        "その変数を消すか、gRPC で送ってください。",
    ),
    "OTLP のメトリクス": (
        lambda s: s.endpoint and s[f"{_OTLP}ENDPOINT"],
        "全体の送り先を使うと、利用者やセッションの ID がラベルのメトリクスも送られます。",
        f"{_OTLP}ENDPOINT の代わりに {_OTLP}TRACES_ENDPOINT を使ってください。",
    ),
    "OTLP の期限": (
        lambda s: s.values.timeout >= 1000,
        "Python の SDK では単位が秒なので、{s.values.timeout:g} 秒待ちます(仕様ではミリ秒)。",
        f"{_OTLP}TIMEOUT=10 のように、秒で書いてください。",
    ),
    "OTEL_TRACES_SAMPLER": (
        lambda s: s["OTEL_TRACES_SAMPLER"],
        "MLflow はこの設定を読みません。",
        "サンプリングは 8.1 の sampling_strategies で決めます。",
    ),
    "OTEL_TRACES_EXPORTER": (
        lambda s: s["OTEL_TRACES_EXPORTER"],
        "MLflow はこの設定を読みません。",
        "送信は 8.5 の otlp_setup で決めます。",
    ),
    "リソース属性": (
        _broken_attributes,
        "OTEL_RESOURCE_ATTRIBUTES に壊れた項目があり、すべての属性が捨てられます。",
        "k=v をコンマで区切り、最後のコンマを消し、値の , と = は %2C と %3D にしてください。",
    ),
    "エクスペリメントの指定": (
        lambda s: s["MLFLOW_EXPERIMENT_ID"] or s["MLFLOW_EXPERIMENT_NAME"],
        "環境変数だけに頼ると、トレース 1 件ごとにサーバーへの問い合わせを待ちます。",
        "起動時に一度、setup_production_tracing か mlflow.set_experiment を呼んでください。",
    ),
    "サンプリング": (
        lambda s: s.values.ratio < 1,
        "先頭で {s.values.ratio:.0%} に間引くと、テールサンプリングはエラーの多くを見られません。",
        "MLFLOW_TRACE_SAMPLING_RATIO を消すか、TailSampler の head_probability に渡します。",
    ),
    "非同期の記録": (
        lambda s: ASYNC in s.environment and not s.true(ASYNC),
        "値が空か false なので、リクエストのスレッドで書き込みます(1 件およそ 40 ms)。",
        f"本番では {ASYNC} を消すか true にしてください。",
    ),
    "キューの上限": (
        lambda s: s.missing_limits,
        "上限は 3 つあり、1 つでも既定値のままだと、バーストのトレースがそこで消えます。",
        "{s.missing_limits} も設定するか、setup_production_tracing に任せてください。",
    ),
    "終わらないトレース": (
        lambda s: s["MLFLOW_TRACE_TIMEOUT_SECONDS"],
        "MLFLOW_TRACE_TIMEOUT_SECONDS は、既定のバッチ処理では働きません。",
        "ストリームは 8.1 の traced_stream で囲み、必ず終わるようにしてください。",
    ),
    "サーバーのジョブ": (
        lambda s: s["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"].lower() == "false",
        "この環境で起動したサーバーは、開始したスコアラーを動かさず、採点しません。",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION を true にするか、run_scoring_cycle で採点します。",
    ),
    "サーバーの証明書": (
        lambda s: s.true("MLFLOW_TRACKING_INSECURE_TLS"),
        "MLFLOW_TRACKING_INSECURE_TLS=true で、証明書を検証していません。",
        "MLFLOW_TRACKING_SERVER_CERT_PATH に、社内の CA の証明書を指定してください。",
    ),
    "サーバーの認証": (
        _sends_key_in_plain_text,
        "暗号化されていない http:// で、鍵を送ります。",
        "https:// の URL を使ってください。",
    ),
    "プロキシ": (
        _proxies_itself,
        "手元(127.0.0.1)のサーバーへの通信もプロキシに送られ、失敗することがあります。",
        "NO_PROXY=127.0.0.1,localhost を設定してください。",
    ),
    "端末の文字コード": (
        lambda s: s.encoding.replace("-", "") != "utf8" and s["PYTHONUTF8"] != "1",
        "{s.encoding} なので、絵文字などを含む LLM の答えを print すると失敗します。",
        "PYTHONUTF8=1 を設定してください(このサンプルの表示は cp932 でも読めます)。",
    ),
}


def _broken(s: Settings, table: Table, level: Level) -> Iterator[Finding]:
    for name, (broken, detail, fix) in table.items():
        if broken(s):
            yield Finding(name, level, detail.format(s=s), fix.format(s=s))


def conflicts(environment: Mapping[str, str]) -> list[Finding]:
    """値の誤りと食い違いのすべて。なければ OK が 1 件。"""
    s = Settings(environment)
    found = [*s.wrong, *_endpoint(s)]
    found += [*_broken(s, ERRORS, "error"), *_broken(s, WARNINGS, "warning")]
    return found or [Finding("設定の食い違い", "ok", "見つかりませんでした")]
