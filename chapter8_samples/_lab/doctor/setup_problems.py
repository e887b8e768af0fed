"""用意の誤り(サーバーがない、鍵が違う、書けない、など)を、直し方の分かる日本語にする。

トレースバックの代わりに「何が起きたか」と「どうすればよいか」を見せ、終了ステータス 1 で終わる。
ここにない例外は、そのまま上げる(原因の分からない失敗を、分かったふりで隠さない)。
"""

from __future__ import annotations

import errno
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

MINIMUM_MLFLOW, UNTESTED_MLFLOW = (3, 17), (3, 19)
"""動く最低の版と、まだ確かめていない最初の版。"""
INSTALL = 'python -m pip install -U "mlflow>=3.17,<4"'
_CANNOT_WRITE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC),
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR),  # フォルダーのはずがファイル、またはその逆
}
_SCHEME = re.compile(r"https?|grpc|sqlite|databricks|(postgresql|mysql|mssql)(\+\w+)?")
_SERVER_COMMAND = "python -m mlflow server --host 127.0.0.1 --port 5000"


@dataclass(frozen=True)
class Problem:
    """何が起きたか(``what``)と、どうすればよいか(``fix``)。"""

    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}\n  -> {self.fix}"


@dataclass(frozen=True)
class Finding:
    """診断の 1 件。``level`` は ok、warning(注意)、error(NG)。"""

    name: str
    level: Literal["ok", "warning", "error"]
    detail: str
    fix: str = ""


def require(problem: Problem | None) -> None:
    """問題があれば、説明を標準エラーに書いて終了ステータス 1 で終わる。"""
    if problem is not None:
        raise SystemExit(str(problem))


@contextmanager
def explained() -> Iterator[None]:
    """用意の誤りなら、説明を標準エラーに書いて終了ステータス 1 で終わる。"""
    try:
        yield
    except Exception as error:
        problem = explain(error)
        if problem is None:
            raise
        raise SystemExit(str(problem)) from error


def shown(uri: str) -> str:
    """画面に出してよい接続先。パスワード、トークン、クエリ、見慣れないパスを落とす。

    >>> shown("https://user:pass@mlflow.example.com:8443/secret?token=x")
    'https://mlflow.example.com:8443/...'
    """
    scheme, found, rest = uri.partition("://")
    if not found or ("@" in rest and not _SCHEME.fullmatch(scheme)):
        # "://" は、符号化していないパスワードの一部
        return re.split(r"[?#]", uri.rpartition("@")[2])[0]
    if not scheme.startswith("sqlite"):
        rest = rest.rpartition("@")[2]
    host, slash, path = re.split(r"[?#]", rest)[0].partition("/")
    if scheme in ("http", "https") and path not in ("", "v1/traces"):
        path = "..."
    return f"{scheme}://{host}{slash if path else ''}{path}"


def bounded(call: Callable[[], Any], seconds: float) -> Any:
    """``call`` の結果。``seconds`` 秒で戻らなければ ``TimeoutError``。"""
    answers: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answers[0]


# 実行の前に調べる ----------------------------------------------------------


def installed(package: str) -> str:
    """入っている版。なければ空。"""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def numbers_of(text: str) -> tuple[int, ...]:
    """版の最初の 2 つの数。

    >>> numbers_of("3.17.2")
    (3, 17)
    """
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def mlflow_problem() -> Problem | None:
    """MLflow が入っていない、または古い。"""
    found = installed("mlflow") or installed("mlflow-tracing")
    if not found:
        return Problem("MLflow が入っていません。", f"入れてください: {INSTALL}")
    if numbers_of(found) < MINIMUM_MLFLOW:
        what = f"MLflow {found} は古すぎます(3.17 以上が必要)。"
        return Problem(what, f"上げてください: {INSTALL}")
    return None


def backend_problem(uri: str, timeout_seconds: float = 5.0) -> Problem | None:
    """サーバーが答えない、または受け付けない理由。MLflow の長い再試行(数分)に入る前に分かる。"""
    if not uri.startswith(("http://", "https://", "databricks")):
        return None
    try:
        answer = bounded(lambda: _ask(uri, timeout_seconds), timeout_seconds + 1)
    except Exception as error:
        return explain(error) or _no_server(uri)
    if answer.status_code in (401, 403):
        return _wrong_key(uri)
    if answer.status_code != 200 or not answer.text.lstrip().startswith("{"):
        return Problem(
            f"{shown(uri)} は MLflow サーバーの答えを返しません(HTTP {answer.status_code})。",
            "MLFLOW_TRACKING_URI のホスト、ポート、パスを確かめてください。",
        )
    return None


def _ask(uri: str, timeout_seconds: float) -> Any:
    """再試行なしで 1 回だけ尋ねる。認証は MLflow の環境変数のもの。"""
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    return http_request(
        get_default_host_creds(uri),
        "/api/2.0/mlflow/experiments/search",
        "POST",
        json={"max_results": 1},
        max_retries=0,
        timeout=timeout_seconds,
        raise_on_status=False,
    )


def missing_database(uri: str) -> Problem | None:
    """読みたい SQLite のファイルがない(そのまま開くと、MLflow が空のものを作ってしまう)。"""
    path = re.split("[?#]", uri.partition(":///")[2])[0]
    if not uri.startswith("sqlite:") or Path(path).exists():
        return None
    return Problem(
        f"データベース {path} がありません。",
        "パスを直すか、先に python -m chapter8_samples を実行して記録してください。",
    )


def output_problem(path: Path) -> Problem | None:
    """出力のファイルを書けない理由。長い処理の前に分かる。"""
    path = path.resolve()
    if not path.parent.is_dir():
        return Problem(f"フォルダー {path.parent} がありません。", "先に作ってください。")
    try:
        with path.open("a") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            return None
    except OSError as error:
        what = f"{path} に書き込めません({error.strerror})。"
        return Problem(what, "-o に、書き込めるファイルの名前を指定してください。")


# 起きた例外を説明する ------------------------------------------------------


def explain(error: BaseException) -> Problem | None:
    """例外の説明。用意の誤りと分からなければ ``None``。"""
    for reader in (_missing_package, _file_problem, _llm_problem, _server_problem, _mlflow_problem):
        if found := reader(error):
            return found
    return None


def _missing_package(error: BaseException) -> Problem | None:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package != "chapter8_samples":
            fix = "python -m pip install -r requirements.txt"
            return Problem(f"パッケージ {package} が入っていません。", f"入れてください: {fix}")
    return None


def _file_problem(error: BaseException) -> Problem | None:
    if not isinstance(error, OSError) or error.errno not in _CANNOT_WRITE or not error.filename:
        return None
    return Problem(
        f"{error.filename} に書き込めません({error.strerror})。",
        "書き込めるフォルダーで実行するか、環境変数 CHAPTER8_LAB(手元のデータの置き場所)か "
        "-o で、書き込める場所を指定してください。",
    )


def _llm_problem(error: BaseException) -> Problem | None:
    if type(error).__module__.partition(".")[0] != "openai":
        return None
    stub = "CHAPTER8_OFFLINE=1 で手元の LLM スタブを使ってください。"
    if getattr(error, "status_code", None) in (401, 403):
        what = "LLM のプロバイダーが、API キーを受け付けません。"
        return Problem(what, f"OPENAI_API_KEY を直すか、{stub}")
    if type(error).__name__ in ("APIConnectionError", "APITimeoutError"):
        what = "LLM のプロバイダーに接続できません。"
        return Problem(what, f"OPENAI_BASE_URL を直すか、{stub}")
    return None


def _server_problem(error: BaseException) -> Problem | None:
    if type(error).__name__ != "MlflowServerError":
        return None
    if taken := re.search(r"port (\d+) is not free", str(error)):
        return Problem(
            f"ポート {taken[1]} は使えません(ほかのプログラムが使っています)。",
            "--port で別の番号を指定してください。",
        )
    return Problem("MLflow サーバーを起動できません。", f"ログを確かめてください。\n{error}")


_NO_SERVER = r"Connection refused|Max retries|Failed to establish|Read timed out|NameResolution"
_NO_DATABRICKS = r"default auth: cannot|cannot be used without a Databricks|Reading Databricks"
_WRONG_KEY = (
    r"(?:code|HTTP|status)\W{1,3}40[13]\b|UNAUTHENTICATED|PERMISSION_DENIED|not authenticated"
)
_OF_THE_PARTS = ("ExperimentNotFoundError", "MetricSourceError", "TracingSetupError")
# 例外の文 -> (何が起きたか, 直し方)。{uri} は接続先
_TEXTS = {
    r"unsupported URI": (
        "接続先 {uri} の種類は使えません。",
        "http://HOST:PORT、sqlite:///mlflow.db、databricks のように書いてください。",
    ),
    r"filesystem tracking backend": (
        "ファイルの保存先(mlruns)は、いまの MLflow では使えません。",
        "MLFLOW_TRACKING_URI を sqlite:///mlflow.db か、サーバーの URL にしてください。",
    ),
    r"file is not a database": (
        "{uri} は SQLite のデータベースではありません。",
        "パスを直すか、壊れたファイルならバックアップから戻してください。",
    ),
    r"deleted experiment|in deleted state": (
        "そのエクスペリメントは削除されています。",
        "別の名前にするか、復元してください: mlflow experiments restore -x ID",
    ),
    r"absolute path|Got an invalid experiment name": (
        "エクスペリメントの名前が、この接続先では使えません。",
        "Databricks では /Shared/my-app のような、ワークスペースの絶対パスにしてください。",
    ),
    r"out-of-date database schema|Can't locate revision": (
        "データベースが、別の版の MLflow で作られています。",
        "バックアップを取ってから mlflow db upgrade <URI> を実行するか、手元のデータなら "
        "python -m chapter8_samples --fresh で作り直してください。",
    ),
    r"readonly database|unable to open database file": (
        "SQLite のファイルを開けないか、書き込めません。",
        "ファイルとフォルダーの権限を確かめるか、CHAPTER8_LAB で別の場所を指定してください。",
    ),
}


def _mlflow_problem(error: BaseException) -> Problem | None:
    if not _from_mlflow(error):
        return None
    import mlflow

    text, uri = str(error), mlflow.get_tracking_uri()
    named = re.search(r"experiment '(.*?)'", text)
    if named and ("does not exist" in text or text.startswith("no experiment")):
        what = f"エクスペリメント {named[1]!r} は {shown(uri)} にありません。"
        return Problem(what, "名前と MLFLOW_TRACKING_URI を確かめてください。")
    if re.search(_NO_SERVER, text):
        return _no_server(uri)
    if re.search(_NO_DATABRICKS, text):
        return _no_server("databricks")
    if re.search(_WRONG_KEY, text):
        return _wrong_key(uri)
    for pattern, (what, fix) in _TEXTS.items():
        if re.search(pattern, text):
            return Problem(what.format(uri=shown(uri)), fix)
    return None


def _from_mlflow(error: BaseException) -> bool:
    """MLflow か、その下の通信とデータベースの例外か。"""
    names = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return bool(
        names & {"mlflow.MlflowException", "requests.RequestException", "sqlalchemy.DatabaseError"}
        or type(error).__name__ in _OF_THE_PARTS
        or (isinstance(error, ValueError) and "default auth" in str(error))
    )


def _no_server(uri: str) -> Problem:
    if uri.startswith("databricks"):
        return Problem(
            "Databricks に接続できません。",
            "DATABRICKS_HOST と DATABRICKS_TOKEN(または ~/.databrickscfg)と、"
            "ネットワークを確かめてください。",
        )
    return Problem(
        f"MLflow サーバー {shown(uri)} が答えません。",
        f"サーバーを起動する({_SERVER_COMMAND})か、MLFLOW_TRACKING_URI を直すか、"
        "消して手元の SQLite を使ってください。",
    )


def _wrong_key(uri: str) -> Problem:
    names = "MLFLOW_TRACKING_USERNAME と MLFLOW_TRACKING_PASSWORD(または MLFLOW_TRACKING_TOKEN)"
    if uri.startswith("databricks"):
        names = "DATABRICKS_TOKEN"
    return Problem(
        f"接続先 {shown(uri)} が、鍵を受け付けません(401 または 403)。",
        f"{names} と、その利用者の権限を確かめてください。",
    )
