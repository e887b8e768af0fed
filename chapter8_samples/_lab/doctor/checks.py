"""診断のうち、実際に試すもの: 版、書き込み、接続先、エクスペリメント。

どれも数秒で打ち切る。``mlflow`` の import もここでは関数の中だけで行う(古い版や、
``mlflow-tracing`` だけの環境でも、診断できるところまで診断する)。
"""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .finding import Finding
from .setup_problems import (
    INSTALL,
    MINIMUM_MLFLOW,
    UNTESTED_MLFLOW,
    Problem,
    backend_problem,
    bounded,
    explain,
    file_store,
    mlflow_problem,
    numbers_of,
    shown,
)

SECONDS = 5.0
TAG, OPENED = "chapter8.doctor", "を開けました"
_OPTIONAL = {
    "openai": "LLM を呼ぶサンプルで使います",
    "opentelemetry-exporter-otlp": "8.5(OTLP の送信)で使います",
    "databricks-agents": "Databricks でのバックフィルだけで使います",
}
Environment = Mapping[str, str]


def installed(package: str) -> str | None:
    """入っている版。なければ ``None``。"""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> Iterator[Finding]:
    """Python と、使うパッケージの版。"""
    python = ".".join(map(str, sys.version_info[:3]))
    old = sys.version_info < (3, 10)
    fix = "Python 3.10 以上で仮想環境を作り直してください。" if old else ""
    yield Finding("Python", "error" if old else "ok", python, fix)
    yield from _mlflow_versions()
    for package, purpose in {"opentelemetry-sdk": "", **_OPTIONAL}.items():
        found = installed(package)
        yield Finding(package, "ok", found or f"なし({purpose})")


def prices() -> Iterator[Finding]:
    """使う料金表と、その古さ。作業フォルダーに取り込んだ ``prices.json`` がなければ、本書の表。"""
    from chapter8_samples.cost_tracking.prices import IMPORT_COMMAND, CostError, PriceTable

    imported = Path("prices.json")
    try:
        table = PriceTable.from_file(imported) if imported.exists() else PriceTable.default()
    except CostError as error:
        yield Finding("料金表", "error", f"{imported}: {error}")
        return
    day = table.as_of or date.fromtimestamp(imported.stat().st_mtime)
    age = (date.today() - day).days
    fix = f"今の料金を取り込んでください: {IMPORT_COMMAND}" if age > 90 else ""
    level = "warning" if fix and imported.exists() else "ok"
    yield Finding("料金表", level, f"{table.name} の料金({day}、{age} 日前)", fix)


def _mlflow_versions() -> Iterator[Finding]:
    full, light = installed("mlflow"), installed("mlflow-tracing")
    name = "mlflow" if full or not light else "mlflow-tracing"
    if problem := mlflow_problem():
        yield _from_problem(name, problem)
    elif full and light and full != light:
        detail = f"mlflow {full} と mlflow-tracing {light} の版が違います。"
        yield Finding("mlflow", "error", detail, f"そろえてください: {INSTALL}")
    else:
        yield _tested(
            name, full or light or "", "" if full else "。mlflow 本体なし: 本番のアプリ用"
        )


def _tested(name: str, found: str, more: str) -> Finding:
    """確かめてある範囲の版か。"""
    tested = f"{_version(MINIMUM_MLFLOW)} 以上 {_version(UNTESTED_MLFLOW)} 未満で確認済み{more}"
    if numbers_of(found) < UNTESTED_MLFLOW:
        return Finding(name, "ok", f"{found}({tested})")
    wanted = f'"{name}>={_version(MINIMUM_MLFLOW)},<{_version(UNTESTED_MLFLOW)}"'
    fix = f"動かないときは、確認済みの版にしてください: python -m pip install {wanted}"
    return Finding(name, "warning", f"{found} では確認していません({tested})。", fix)


def _version(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))


def _from_problem(name: str, problem: Problem) -> Finding:
    return Finding(name, "error", problem.what, problem.fix)


def lab_folder(environment: Environment) -> Iterator[Finding]:
    """手元のデータの置き場所に書けるか。"""
    folder = Path(environment.get("CHAPTER8_LAB") or ".chapter8").resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            yield Finding("手元のデータ", "ok", f"{folder} に書き込めます")
    except OSError as error:
        yield Finding(
            "手元のデータ",
            "error",
            f"{folder} に書き込めません({error.strerror})。",
            "書き込めるフォルダーで実行するか、CHAPTER8_LAB で別の場所を指定してください。",
        )


# 接続先 --------------------------------------------------------------------


def backend(environment: Environment, experiment: str | None) -> Iterator[Finding]:
    """接続先が答えるか、エクスペリメントを読み書きできるか、採点のジョブが動いているか。"""
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    if mlflow_problem():
        yield Finding("接続先", "warning", "MLflow を使えないので調べていません。", INSTALL)
        return
    if not uri:
        yield _no_backend()
        yield from _not_looked_for(experiment)
        return
    found = list(_backend(uri))
    yield from found
    made = not uri.startswith("sqlite:") or found[-1].detail.endswith(OPENED)
    if made and all(finding.level != "error" for finding in found):
        yield from _experiment(uri, environment, experiment)
    else:
        yield from _not_looked_for(experiment)


def _not_looked_for(experiment: str | None) -> Iterator[Finding]:
    if experiment is not None:
        yield Finding(
            "エクスペリメント",
            "warning",
            f"{experiment} は調べていません(調べられる接続先がありません)。",
            "MLFLOW_TRACKING_URI に、そのエクスペリメントのある接続先を設定してください。",
        )


def _no_backend() -> Finding:
    if installed("mlflow"):
        where = "サンプルは手元の SQLite、アプリは ./mlflow.db"
        return Finding("接続先", "ok", f"MLFLOW_TRACKING_URI は未設定({where})")
    return Finding(
        "接続先",
        "warning",
        "MLFLOW_TRACKING_URI が未設定です。mlflow-tracing だけでは、手元に記録できません。",
        "MLFLOW_TRACKING_URI に、MLflow サーバーの URL か databricks を設定してください。",
    )


def _backend(uri: str) -> Iterator[Finding]:
    if uri.startswith(("http://", "https://", "databricks")):
        yield from _server(uri)
    elif not installed("mlflow"):
        yield Finding(
            "接続先",
            "error",
            f"mlflow-tracing だけでは {shown(uri)} を使えません(サーバーか Databricks だけ)。",
            f"MLFLOW_TRACKING_URI をサーバーの URL にするか、本体を入れてください: {INSTALL}",
        )
    elif uri.startswith("sqlite:"):
        yield _sqlite(uri)
    elif "://" in uri and not uri.startswith("file:"):
        yield _database(uri)
    else:
        yield _from_problem("接続先", file_store())


def _server(uri: str) -> Iterator[Finding]:
    if problem := backend_problem(uri, SECONDS):
        yield _from_problem("接続先", problem)
        return
    yield Finding("接続先", "ok", f"{shown(uri)} が答えました")
    if uri.startswith("http"):
        found = _server_version(uri)
        if found and numbers_of(found) < MINIMUM_MLFLOW:
            detail = f"サーバーの MLflow {found} は、3.17 より古い版です。"
            yield Finding("サーバーの版", "warning", detail, f"サーバーを上げてください: {INSTALL}")
        elif found:
            yield Finding("サーバーの版", "ok", found)


def _server_version(uri: str) -> str:
    answer = bounded(lambda: call_server(uri, "GET", "/version"), SECONDS + 1)
    text = str(answer.text).strip()
    return text if answer.status_code == 200 and numbers_of(text) and len(text) < 40 else ""


def call_server(
    uri: str, method: str, path: str, body: object | None = None, *, seconds: float | None = None
) -> Any:
    """MLflow サーバーの API を 1 回だけ(再試行なしで)呼ぶ。認証は MLflow の環境変数のもの。"""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    creds: Any = get_default_host_creds(uri)
    more: dict[str, Any] = {"timeout": seconds or SECONDS, "max_retries": 0}
    if body is not None:
        more["json"] = body
    return http_request(creds, path, method, raise_on_status=False, **more)


def _sqlite(uri: str) -> Finding:
    path = Path(uri.partition(":///")[2])
    if not path.exists():
        ready = path.parent.is_dir()
        detail = f"{path} はまだありません" + ("(最初の記録で作られます)" if ready else "。")
        fix = "" if ready else f"フォルダー {path.parent} を作るか、パスを直してください。"
        return Finding("接続先", "ok" if ready else "error", detail, fix)
    try:
        ready = _lock_and_look(path)
    except sqlite3.Error as error:
        fix = "ファイルの権限と、使用中のほかのプログラムを確かめてください。"
        return Finding("接続先", "error", f"{path} に書き込めません({error})。", fix)
    # 空のデータベースを開くと MLflow が表を作る。診断では何も作らない
    return _database(uri) if ready else Finding("接続先", "ok", f"{path} は空です")


def _lock_and_look(path: Path) -> bool:
    """書き込みの鍵を取れるかを確かめ、MLflow の表があるかを返す。"""
    with closing(sqlite3.connect(path, timeout=1)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'")
        ready = found.fetchone() is not None
        connection.rollback()
    return ready


def _database(uri: str) -> Finding:
    if problem := backend_problem(uri, SECONDS):
        return _from_problem("接続先", problem)
    try:
        bounded(lambda: _store(uri).search_experiments(max_results=1), 2 * SECONDS)
    except Exception as error:
        problem = explain(error) or Problem(
            f"{shown(uri)} を開けません({type(error).__name__})。",
            "ホスト、ポート、利用者、パスワードと、データベースの起動を確かめてください。",
        )
        return _from_problem("接続先", problem)
    return Finding("接続先", "ok", f"{shown(uri)} {OPENED}")


def _store(uri: str) -> Any:
    from mlflow.tracing.client import TracingClient

    return TracingClient(uri).store


def _experiment(uri: str, environment: Environment, wanted: str | None) -> Iterator[Finding]:
    name = wanted or environment.get("MLFLOW_EXPERIMENT_NAME")
    number = None if wanted else environment.get("MLFLOW_EXPERIMENT_ID")
    label = name or number
    if label is None:
        yield Finding(
            "エクスペリメント", "ok", "指定なし(--experiment NAME で、読み書きできるかを確かめます)"
        )
        return
    try:
        found = bounded(lambda: _find(uri, name, number), SECONDS)
        yield from _usable(uri, label, found, required=bool(wanted or number))
    except Exception as error:
        problem = explain(error) or Problem(
            f"{label} を読み書きできません({type(error).__name__})。",
            "名前と、その利用者の権限(EDIT)を確かめてください。",
        )
        yield _from_problem("エクスペリメント", problem)


def _find(uri: str, name: str | None, number: str | None) -> Any:
    store = _store(uri)
    return store.get_experiment_by_name(name) if name else store.get_experiment(number)


def _usable(uri: str, label: str, found: Any, *, required: bool) -> Iterator[Finding]:
    title = "エクスペリメント"
    if found is None:
        fix = "名前を直すか、setup_production_tracing か mlflow.set_experiment で作ってください。"
        yield Finding(title, "error" if required else "warning", f"{label} はありません。", fix)
        return
    if found.lifecycle_stage != "active":
        command = f"mlflow experiments restore -x {found.experiment_id}"
        fix = f"別の名前にするか、復元してください: {command}"
        yield Finding(title, "error", f"{label} は削除されています。", fix)
        return
    bounded(lambda: _write_and_erase(uri, found.experiment_id), SECONDS)
    yield Finding(title, "ok", f"{label} を読み書きできます")
    if uri.startswith("http") and installed("mlflow"):
        yield from _server_scoring(uri, found.experiment_id)


def _write_and_erase(uri: str, experiment_id: str) -> None:
    from mlflow.entities import ExperimentTag

    store = _store(uri)
    store.set_experiment_tag(experiment_id, ExperimentTag(TAG, "writable"))
    store.delete_experiment_tag(experiment_id, TAG)


def _server_scoring(uri: str, experiment_id: str) -> Iterator[Finding]:
    """サーバーに採点させる設定なのに、サーバーがジョブを動かしていない。"""
    started = bounded(lambda: _started_scorers(uri, experiment_id), 2 * SECONDS)
    if not started:
        return
    # 引数のないジョブは受け付けられない。ジョブが無効なら、引数を見る前にそう答える
    body = {"job_name": "run_online_trace_scorer", "params": {}}
    path, limit = "/ajax-api/3.0/jobs/", 3 * SECONDS  # 最初の 1 回は、サーバーが採点の部品を読む
    answer = bounded(lambda: call_server(uri, "POST", path, body, seconds=limit), limit + 1)
    if "not enabled" in answer.text:
        yield Finding(
            "サーバーでの採点",
            "error",
            f"開始したスコアラー {started} 個を、サーバーは採点しません(ジョブが無効)。",
            "サーバーを MLFLOW_SERVER_ENABLE_JOB_EXECUTION=true で起動するか、"
            "run_scoring_cycle で採点してください。",
        )
    else:
        yield Finding("サーバーでの採点", "ok", f"開始したスコアラー {started} 個")


def _started_scorers(uri: str, experiment_id: str) -> int:
    return sum(bool(scorer.sample_rate) for scorer in _scorers(uri, experiment_id))


def _scorers(uri: str, experiment_id: str) -> list[Any]:
    import mlflow
    from mlflow.genai.scorers import list_scorers

    mlflow.set_tracking_uri(uri)
    return list(list_scorers(experiment_id=experiment_id))
