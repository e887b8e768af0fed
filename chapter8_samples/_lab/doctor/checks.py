"""診断のうち、実際に調べるもの: 版、料金表、接続先、採点に使う LLM の鍵、OTLP の送り先。

接続先は数秒で打ち切る。``mlflow`` の import は関数の中だけで行う(古い版でも、診断できるところまで
診断する)。
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import sys
from collections.abc import Iterator
from datetime import date
from importlib.util import find_spec
from pathlib import Path

from .settings import Environment, otlp_endpoint, otlp_value
from .setup_problems import (
    INSTALL,
    MINIMUM_MLFLOW,
    UNTESTED_MLFLOW,
    Finding,
    Problem,
    backend_problem,
    bounded,
    explain,
    installed,
    missing_database,
    mlflow_problem,
    numbers_of,
    shown,
)

SECONDS = 5.0
DEFAULT_JUDGE = "openai:/gpt-4.1-mini"
_KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY", "gemini": "GEMINI_API_KEY"}


def versions() -> Iterator[Finding]:
    """Python と、使うパッケージの版。"""
    yield Finding("Python", "ok", ".".join(map(str, sys.version_info[:3])))
    yield _mlflow_version()
    for package in ("opentelemetry-sdk", "opentelemetry-exporter-otlp", "openai"):
        yield Finding(package, "ok", installed(package) or "なし")


def _mlflow_version() -> Finding:
    full, light = installed("mlflow"), installed("mlflow-tracing")
    if problem := mlflow_problem():
        return Finding("mlflow", "error", problem.what, problem.fix)
    if full and light and full != light:
        detail = f"mlflow {full} と mlflow-tracing {light} の版が違います。"
        return Finding("mlflow", "error", detail, f"そろえてください: {INSTALL}")
    found, least, limit = full or light, _text(MINIMUM_MLFLOW), _text(UNTESTED_MLFLOW)
    tested = f"{least} 以上 {limit} 未満で確認済み"
    if numbers_of(found) < UNTESTED_MLFLOW:
        return Finding("mlflow", "ok", f"{found}({tested})")
    install = f'python -m pip install "mlflow>={least},<{limit}"'
    fix = f"動かないときは、確認済みの版にしてください: {install}"
    return Finding("mlflow", "warning", f"{found} では確認していません({tested})。", fix)


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def prices() -> Iterator[Finding]:
    """使う料金表と、その古さ。作業フォルダーに取り込んだ ``prices.json`` がなければ、本書の表。"""
    from chapter8_samples.cost_tracking.prices.model import IMPORT_COMMAND, CostError
    from chapter8_samples.cost_tracking.prices.table import PriceTable

    imported = Path("prices.json")
    try:
        table = PriceTable.from_file(imported) if imported.exists() else PriceTable.default()
    except CostError as error:
        fix = f"取り込み直してください: {IMPORT_COMMAND}"
        yield Finding("料金表", "error", f"{imported}: {error}", fix)
        return
    day = table.as_of or date.fromtimestamp(imported.stat().st_mtime)
    age = (date.today() - day).days
    fix = f"今の料金を取り込んでください: {IMPORT_COMMAND}" if age > 90 else ""
    level = "warning" if fix and imported.exists() else "ok"
    yield Finding("料金表", level, f"{table.name} の料金({day}、{age} 日前)", fix)


def backend(environment: Environment) -> Iterator[Finding]:
    """接続先が答え、鍵を受け付けるか。"""
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    if not uri:
        yield Finding("接続先", "ok", "MLFLOW_TRACKING_URI は未設定(手元の SQLite に記録します)")
    elif missing_database(uri):
        path = Path(re.split("[?#]", uri.partition(":///")[2])[0])
        if path.parent.is_dir():
            yield Finding("接続先", "ok", f"{path} はまだありません(最初の記録で作られます)")
        else:
            fix = f"フォルダー {path.parent} を作るか、パスを直してください。"
            yield Finding("接続先", "error", f"{path} はまだありません。", fix)
    elif uri.startswith("sqlite:") and not _has_mlflow_tables(uri):
        yield Finding("接続先", "ok", f"{shown(uri)} に MLflow の表はまだありません")
    elif problem := backend_problem(uri, SECONDS) or _database_problem(uri):
        yield Finding("接続先", "error", problem.what, problem.fix)
    else:
        yield Finding("接続先", "ok", f"{shown(uri)} が答えました")


def _has_mlflow_tables(uri: str) -> bool:
    """MLflow の表があるか(ないデータベースを開くと、MLflow が作ってしまう)。"""
    path = Path(re.split("[?#]", uri.partition(":///")[2])[0]).absolute()
    query = "SELECT count(*) FROM sqlite_master WHERE name = 'alembic_version'"
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
            return database.execute(query).fetchone()[0] > 0
    except sqlite3.Error:  # 壊れている、ロックされている。開けない理由は、MLflow に尋ねる
        return True


def _database_problem(uri: str) -> Problem | None:
    """データベースを開けない理由。"""
    import mlflow

    if uri.startswith(("http://", "https://", "databricks")):
        return None
    try:
        bounded(lambda: mlflow.MlflowClient(uri).search_experiments(max_results=1), 2 * SECONDS)
    except Exception as error:
        return explain(error) or Problem(
            f"{shown(uri)} を開けません({type(error).__name__})。",
            "ホスト、ポート、利用者、パスワードと、データベースの起動を確かめてください。",
        )
    return None


def judge(environment: Environment) -> Iterator[Finding]:
    """採点に使う LLM と、その鍵。"""
    model = environment.get("MLFLOW_GENAI_JUDGE_DEFAULT_MODEL", "")
    if not model and environment.get("MLFLOW_TRACKING_URI", "").startswith("databricks"):
        yield Finding("ジャッジ", "ok", "Databricks のジャッジ(鍵は不要です)")
        return
    model = model or DEFAULT_JUDGE
    provider, _, name = model.partition(":/")
    model = shown(model)
    key = _KEYS.get(provider)
    if not (provider and name):
        told = model if len(model) <= 30 else f"{model[:6]}..."  # 鍵を書いたのかもしれない
        what = f"MLFLOW_GENAI_JUDGE_DEFAULT_MODEL の {told!r} は、モデルの指定ではありません。"
        fix = f"{DEFAULT_JUDGE} のように、提供元:/モデル名の形で書いてください。"
        yield Finding("ジャッジ", "error", what, fix)
    elif key is None:
        yield Finding("ジャッジ", "ok", f"{model}(この提供元の鍵は調べていません)")
    elif environment.get(key):
        yield Finding("ジャッジ", "ok", f"{model}({key} あり)")
    else:
        what = f"{model} の鍵がないので、サンプルは手元の LLM スタブで採点します。"
        fix = f"本物の LLM で採点するなら、{key} を設定してください。"
        yield Finding("ジャッジ", "warning", what, fix)


def otlp(environment: Environment) -> Iterator[Finding]:
    """OTLP の送り先と、送るためのパッケージ。"""
    endpoint = otlp_endpoint(environment)
    if not endpoint:
        yield Finding("OTLP", "ok", "送らない設定です")
    elif find_spec("opentelemetry.exporter") is None:
        what = "送信のパッケージがなく、MLflow のトレースもすべて無効になります。"
        fix = "入れてください: python -m pip install opentelemetry-exporter-otlp"
        yield Finding("OTLP", "error", what, fix)
    else:
        protocol = otlp_value(environment, "PROTOCOL") or "grpc"
        command = "python -m chapter8_samples.opentelemetry check --endpoint URL"
        yield Finding("OTLP", "ok", f"{shown(endpoint)} ({protocol})。届くかは {command} で分かる")
