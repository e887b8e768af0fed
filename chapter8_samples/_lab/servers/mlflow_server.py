"""本物の `mlflow server` を SQLite の上で起動し、必ず片付ける。

サーバーは監視プロセス(process_guard)の子として、独立したプロセスグループで動く。パイプでつながって
いて、こちらが `stop()` しても、例外や SIGKILL で終わっても、パイプが閉じてグループごと終わる。
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

_GUARD = Path(__file__).with_name("process_guard.py")
_GRACE_SECONDS, _READY_SECONDS = 10.0, 60.0
_POLL_SECONDS = 0.1
_LOG_LINES_IN_ERROR = 25
# OS に選ばせた番号は、サーバーが開く前に、よその送信用として使われることがある
_OUTSIDE_EPHEMERAL = range(20_000, 32_768)

# 利用者の設定はサーバーに持ち込まない。いつでも同じサーバーにするため、要るものは env で渡す
_NOT_INHERITED = ("MLFLOW_", "OTEL_", "DATABRICKS_", "OPENAI_")

_OFFLINE = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_MODEL_CATALOG_URI": "",
    "PYTHONUNBUFFERED": "1",
}
_JOBS_OFF = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
_JOBS_ON = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "true",
    "MLFLOW_SERVER_JOB_EXECUTION_ENGINE": "executor",
    "MLFLOW_ONLINE_SCORING_DEFAULT_TRACE_COMPLETION_BUFFER_SECONDS": "1",
    "MLFLOW_ONLINE_SCORING_DEFAULT_SESSION_COMPLETION_BUFFER_SECONDS": "1",
    # 評価のジョブが、ループバックのスタブ LLM をゲートウェイ越しに呼べるようにする
    "MLFLOW_GATEWAY_API_BASE_ALLOWED_SCHEMES": "http,https",
    "MLFLOW_GATEWAY_API_BASE_ALLOW_PRIVATE_IPS": "true",
}


class MlflowServerError(RuntimeError):
    """サーバーが起動しない、または時間内に応答しない。"""


class MlflowServer:
    """`mlflow server` 1 つ。`with MlflowServer(home) as server:` の間だけ動く。

    Args:
        home: データベース、成果物、ログを置くフォルダー(なければ作る)。
        port: 待ち受けるポート。None なら空いているものを選び、再起動後も同じものを使う。
        jobs: True ならジョブ実行(継続的な評価)を有効にする。
        backend_store_uri: 既定は `home` の SQLite。PostgreSQL などの URI も渡せる。
        env: サーバーに追加で渡す環境変数。

    Attributes:
        url: `http://127.0.0.1:PORT`。
    """

    def __init__(
        self,
        home: Path,
        *,
        port: int | None = None,
        jobs: bool = False,
        backend_store_uri: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.home = home.resolve()
        self.log_path = self.home / "mlflow-server.log"
        self._port = port or _free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        self._jobs = jobs
        self._store = backend_store_uri or f"sqlite:///{(self.home / 'mlflow.db').as_posix()}"
        self._extra_env = dict(env or {})
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """プロセスグループの先頭(監視プロセス)の pid。止まっていれば RuntimeError。"""
        if self._guard is None:
            raise RuntimeError("MlflowServer is not running")
        return self._guard.pid

    def start(self) -> MlflowServer:
        """起動して /health が 200 を返すまで待つ。

        Raises:
            MlflowServerError: ポートが使用中、起動中に終了、または時間切れ(ログの末尾を含む)。
        """
        if self._guard is not None:
            return self
        self.home.mkdir(parents=True, exist_ok=True)
        # 使用中のポートでは、別のサーバーの /health を自分のものと取り違える
        require_free(self._port)
        self._guard = self._launch()
        try:
            self._wait_until_ready(self._guard)
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """SIGTERM で止め、残ればグループごと強制終了し、ポートが空くまで待つ。何度呼んでもよい。"""
        guard, self._guard = self._guard, None
        if guard is None:
            return
        if guard.stdin is not None:
            guard.stdin.close()
        try:
            guard.wait(_GRACE_SECONDS + 5)
        except subprocess.TimeoutExpired:
            _kill_group(guard)
        _wait_until_closed(self._port)

    def kill(self) -> None:
        """グループ全体を SIGKILL で落とし、ポートが空くまで待つ(サーバー停止の試験用)。"""
        guard, self._guard = self._guard, None
        if guard is not None:
            _kill_group(guard)
            _wait_until_closed(self._port)

    def __enter__(self) -> MlflowServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self) -> subprocess.Popen[bytes]:
        windows = sys.platform == "win32"
        flags = subprocess.CREATE_NEW_PROCESS_GROUP if sys.platform == "win32" else 0
        with self.log_path.open("wb") as log:
            return subprocess.Popen(
                [sys.executable, str(_GUARD), str(_GRACE_SECONDS), *self._command()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.home,
                env=self._environment(),
                start_new_session=not windows,
                creationflags=flags,
            )

    def _command(self) -> list[str]:
        artifacts = (self.home / "artifacts").as_uri()
        return [
            *(sys.executable, "-m", "mlflow", "server"),
            *("--host", "127.0.0.1", "--port", str(self._port), "--workers", "1"),
            *("--backend-store-uri", self._store, "--artifacts-destination", artifacts),
        ]

    def _environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_INHERITED)}
        jobs = _JOBS_ON if self._jobs else _JOBS_OFF
        return inherited | _OFFLINE | jobs | self._extra_env

    def _wait_until_ready(self, guard: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + _READY_SECONDS
        while not _healthy(self._port):
            if guard.poll() is not None:
                raise self._error("exited while starting")
            if time.monotonic() > deadline:
                raise self._error(f"did not answer /health in {_READY_SECONDS:g} s")
            time.sleep(_POLL_SECONDS)

    def _error(self, problem: str) -> MlflowServerError:
        lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(lines[-_LOG_LINES_IN_ERROR:])
        return MlflowServerError(
            f"mlflow server on {self.url} {problem}; end of {self.log_path}:\n{tail}"
        )


def _kill_group(guard: subprocess.Popen[bytes]) -> None:
    if sys.platform == "win32":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(guard.pid)], check=False)
    elif guard.poll() is None:
        os.killpg(guard.pid, signal.SIGKILL)
    if guard.stdin is not None:
        guard.stdin.close()
    guard.wait()


def _wait_until_closed(port: int, timeout_seconds: float = 5.0) -> None:
    """グループの全員が終わるまで、ポートは開いたままのことがある。"""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return
        time.sleep(0.02)


def _free_port() -> int:
    for port in random.sample(_OUTSIDE_EPHEMERAL, 100):
        with contextlib.suppress(MlflowServerError):
            require_free(port)
            return port
    raise MlflowServerError("found no free port in 20000-32767; pass one")


def require_free(port: int) -> None:
    """ポートが使われていれば ``MlflowServerError``。"""
    with socket.socket() as probe:
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise MlflowServerError(
                f"port {port} is not free ({error.strerror}); pass another port"
            ) from error


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
