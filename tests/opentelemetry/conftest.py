"""本物の OpenTelemetry Collector を用意するフィクスチャ。

PATH の otelcol-contrib を使う。なければ Go と OpenTelemetry Collector Builder で、使う部品だけの
Collector を 1 回だけ作り、リポジトリーの外(~/.cache/chapter8-otelcol)に取っておく。
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from ports import free_port

from chapter8_samples.opentelemetry import disable_otlp_export

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "chapter8_samples/05_opentelemetry/otel-collector-config.yaml"
BUILDER = "go.opentelemetry.io/collector/cmd/builder@v0.159.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "chapter8-otelcol"
IN_USE = "address already in use"


@pytest.fixture(autouse=True)
def _no_model_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    """モデルの一覧を GitHub から取らせない(最初の書き出しが 8 秒ほど待たされる)。"""
    monkeypatch.setenv("MLFLOW_MODEL_CATALOG_URI", "")


@pytest.fixture(autouse=True)
def _otlp_off_after_the_test() -> Iterator[None]:
    yield
    disable_otlp_export(timeout_seconds=1)


@pytest.fixture(scope="session")
def collector_binary() -> Path:
    """``otelcol-contrib`` か、この場で作った Collector。"""
    return find_collector(CACHE)


def find_collector(cache: Path) -> Path:
    if installed := shutil.which("otelcol-contrib"):
        return Path(installed)
    manifest = (HERE / "builder.yaml").read_bytes()
    home = cache / hashlib.sha256(manifest).hexdigest()[:16]
    binary = home / "_build" / "otelcol-ch8"
    with _alone(home):
        if not binary.exists():
            _build(home, manifest)
    return binary


@contextlib.contextmanager
def _alone(home: Path) -> Iterator[None]:
    """並列に走るテストのうち、1 つだけが作る。"""
    import fcntl

    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(home: Path, manifest: bytes) -> None:
    go = shutil.which("go", path=os.pathsep.join([os.environ["PATH"], "/usr/local/go/bin"]))
    if go is None:
        _missing("needs otelcol-contrib on PATH, or Go to build a collector")
    (home / "builder.yaml").write_bytes(manifest)
    path = os.pathsep.join([str(Path(go).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "GOBIN": str(home), "GOFLAGS": "-mod=mod -buildvcs=false"}
    for command in ([go, "install", BUILDER], [str(home / "builder"), "--config=builder.yaml"]):
        run = subprocess.run(["nice", *command], cwd=home, env=env, capture_output=True, text=True)
        if run.returncode:
            shutil.rmtree(home / "_build", ignore_errors=True)
            _missing(f"building the collector failed: {run.stderr[-500:]}")


def _missing(reason: str) -> NoReturn:
    """CI では飛ばさない。"""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


class Collector:
    """動いている Collector 1 つ。ポートはすべて空いているものを使う。"""

    PORTS = ("GRPC", "HTTP", "PROMETHEUS", "HEALTH", "TELEMETRY")

    def __init__(self, binary: Path, home: Path, settings: dict[str, str]) -> None:
        self.ports = {name: free_port() for name in self.PORTS}
        self.log = home / "collector.log"
        self._settings = {
            "COLLECTOR_STATE_DIR": str(home / "state"),
            "SAMPLING_DECISION_WAIT": "1s",
            **settings,
        }
        self._command = [str(binary), f"--config={CONFIG}"]
        self._process: subprocess.Popen[bytes] | None = None
        self._came_up = False

    @property
    def grpc_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['GRPC']}"

    @property
    def http_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports['HTTP']}/v1/traces"

    def start(self) -> Collector:
        """起動して待つ。初めての起動でポートを先に取られたら、選び直す。"""
        for _ in range(5):
            self._launch()
            try:
                wait_until(self._healthy, 30, self._log_tail)
            except AssertionError:
                self.stop(signal.SIGKILL)
                if self._came_up or IN_USE not in self._log_tail():
                    raise
                self.log.unlink()
                self.ports = {name: free_port() for name in self.PORTS}
            else:
                self._came_up = True
                return self
        raise AssertionError("every chosen port was in use")

    def _launch(self) -> None:
        ports = {f"COLLECTOR_{name}_PORT": str(port) for name, port in self.ports.items()}
        env = {**os.environ, **ports, **self._settings}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, env=env, stderr=log, stdout=log)

    def _log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]

    def stop(self, sign: int = signal.SIGTERM) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(sign)
            process.wait(30)

    def metrics(self) -> str:
        """スパンから作ったメトリクス。"""
        return self._page("PROMETHEUS")

    def telemetry(self) -> str:
        """Collector 自身のメトリクス。"""
        return self._page("TELEMETRY")

    def _page(self, name: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[name]}/metrics") as page:
            return str(page.read().decode())

    def resident_mib(self) -> float:
        assert self._process is not None
        pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def _healthy(self) -> bool:
        assert self._process is not None and self._process.poll() is None, self.log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['HEALTH']}") as page:
                return bool(page.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def wait_until(
    condition: Callable[[], object], seconds: float, detail: Callable[[], object] = lambda: ""
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {detail()}"
        time.sleep(0.05)


@pytest.fixture
def collector(collector_binary: Path, tmp_path: Path) -> Iterator[Callable[..., Collector]]:
    """``collector(NAME=値, ...)`` で、環境変数を与えて Collector を起動する。"""
    started: list[Collector] = []

    def start(**settings: str) -> Collector:
        started.append(Collector(collector_binary, tmp_path, settings).start())
        return started[-1]

    yield start
    for running in started:
        running.stop(signal.SIGKILL)
