"""診断のうち、MLflow のほかの相手: 採点に使う LLM(ジャッジ)と、OTLP の送り先。"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from urllib.parse import unquote

from . import checks
from .checks import call_server
from .finding import Finding
from .settings import Settings
from .setup_problems import bounded, shown

DEFAULT_JUDGE = "openai:/gpt-4.1-mini"
_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY", "gemini": "GEMINI_API_KEY"}
Environment = Mapping[str, str]


def judge(environment: Environment) -> Iterator[Finding]:
    """採点に使う LLM と、その鍵。"""
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    model = environment.get("MLFLOW_GENAI_JUDGE_DEFAULT_MODEL", "")
    if uri.startswith("databricks") and not model:
        yield Finding("ジャッジ", "ok", "Databricks のジャッジ(鍵は不要です)")
        return
    model = model or DEFAULT_JUDGE
    provider, _, name = model.partition(":/")
    if not (provider and name):
        yield Finding(
            "ジャッジ",
            "error",
            f"MLFLOW_GENAI_JUDGE_DEFAULT_MODEL の {model!r} は、モデルの指定ではありません。",
            f"{DEFAULT_JUDGE} のように、提供元:/モデル名の形で書いてください。",
        )
        return
    if provider == "gateway":
        yield _gateway(uri, name)
    elif provider not in _KEYS:
        yield Finding("ジャッジ", "ok", f"{model}(この提供元の鍵は調べていません)")
    elif environment.get(_KEYS[provider]):
        offline = "。ただし CHAPTER8_OFFLINE でスタブを使います" if _offline(environment) else ""
        yield Finding("ジャッジ", "ok", f"{model}({_KEYS[provider]} あり){offline}")
    else:
        yield Finding(
            "ジャッジ",
            "warning",
            f"{model} の鍵がないので、サンプルは手元の LLM スタブで採点します。",
            f"本物の LLM で採点するなら、{_KEYS[provider]} を設定してください。",
        )


def _offline(environment: Environment) -> bool:
    return bool(environment.get("CHAPTER8_OFFLINE"))


def _gateway(uri: str, name: str) -> Finding:
    fix = "8.3 の ensure_judge_endpoint で作るか、MLFLOW_TRACKING_URI を直してください。"
    if not uri.startswith("http"):
        detail = (
            f"gateway:/{name} には MLflow サーバーが必要ですが、接続先がサーバーではありません。"
        )
        return Finding("ジャッジ", "error", detail, fix)
    path = "/api/3.0/mlflow/gateway/endpoints/list"
    try:
        answer = bounded(lambda: call_server(uri, "GET", path), checks.SECONDS + 1)
    except Exception:  # 理由は「接続先」の診断が知らせる
        return Finding("ジャッジ", "error", f"gateway:/{name} があるか、確かめられません。", fix)
    items = next(iter(answer.json().values()), []) if answer.status_code == 200 else []
    if name in [item.get("name") for item in items]:
        return Finding("ジャッジ", "ok", f"gateway:/{name}")
    return Finding("ジャッジ", "error", f"gateway:/{name} は、このサーバーにありません。", fix)


_ANSWERS = {
    "refused": ("接続できません。", "コレクターの起動と、ホストとポートを確かめてください。"),
    "dns": ("ホスト名が見つかりません。", "ホスト名を直してください。"),
    "tls": ("TLS で失敗しました。", "平文なら http://、社内の CA なら証明書を指定してください。"),
    "unauthorized": ("鍵を受け付けません。", "ヘッダーの名前と値を確かめてください。"),
    "not_found": (
        "OTLP の受信エンドポイントがありません。",
        "HTTP では /v1/traces まで書いてください。",
    ),
    "timeout": ("時間内に答えません。", "ファイアウォールと、コレクターの負荷を確かめてください。"),
    "busy": ("いまは受け取れないと答えました。", "コレクターの負荷を確かめてください。"),
    "wrong_protocol": ("別のプロトコルの相手です。", "4317 は grpc、4318 は http/protobuf です。"),
    "rejected": (
        "データを受け取りません。",
        "送り先が OTLP のトレースに対応しているか確かめてください。",
    ),
    "invalid": (
        "設定の値が誤っているため、送りませんでした。",
        "URL にユーザー名や ? を書かず、ヘッダーの値は ASCII にしてください。",
    ),
}


def otlp(environment: Environment) -> Iterator[Finding]:
    """OTLP の送り先に 1 スパンを送り、受け取られたか。"""
    settings = Settings(environment)
    if not settings.endpoint:
        yield Finding("OTLP", "ok", "送らない設定です")
        return
    if settings.wrong or "://" not in settings.endpoint:
        return  # 値の誤りは「設定」の診断が知らせる
    if find_spec("opentelemetry.exporter") is None:
        yield Finding(
            "OTLP",
            "error",
            "送信のパッケージがなく、MLflow のトレースもすべて無効になります。",
            "入れてください: python -m pip install opentelemetry-exporter-otlp",
        )
        return
    yield _otlp_answer(settings)


def _otlp_answer(settings: Settings) -> Finding:
    from chapter8_samples.opentelemetry import check_otlp_connection

    pairs = (item.partition("=") for item in settings.otlp("HEADERS").split(","))
    headers = {key.strip(): unquote(value.strip()) for key, found, value in pairs if found}
    endpoint, values = settings.endpoint, settings.values
    certificate = str(values.certificate) if values.certificate else None

    def ask() -> str:
        return check_otlp_connection(
            endpoint,
            values.protocol,
            headers=headers,
            timeout_seconds=checks.SECONDS,
            certificate_file=certificate,
        ).reason

    try:
        reason: str = bounded(ask, 2 * checks.SECONDS)
    except TimeoutError:
        reason = "timeout"
    return _translated(reason, f"{shown(endpoint)} ({values.protocol})")


def _translated(reason: str, place: str) -> Finding:
    if reason == "ok":
        return Finding("OTLP", "ok", f"{place} が 1 スパンを受け取りました")
    what, fix = _ANSWERS[reason]
    return Finding("OTLP", "warning" if reason == "busy" else "error", f"{place}: {what}", fix)
