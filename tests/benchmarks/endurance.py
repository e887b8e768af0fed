"""長い時間動かして、1 件も黙って失わず、メモリーが増え続けないことを確かめる(Linux)。

    python tests/benchmarks/endurance.py --minutes 30

本物の ``mlflow server`` に記録するアプリ(``endurance_app.py``)へ、質問と評価を送り続けながら、
MLflow サーバーの SIGKILL と再起動、Collector の停止、ディスク満杯、要求を処理中の SIGTERM を
くり返す。終わってから、受け付けた数が、保存された数と、失ったと報告された数の和に等しいことを見る。

ディスク満杯は、動いているアプリの RLIMIT_FSIZE を 0 にして起こす。root も専用のファイルシステムも
要らず、アプリは本当にカーネルに断られる(ENOSPC ではなく EFBIG。どちらも OSError になる)。
/dev/full は、置き場が 1 件ごとに新しいファイルを作るので使えない。
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import requests
from bench_report import print_table
from endurance_report import Outcome
from ports import free_port
from relay import relay

from chapter8_samples._lab import OFFLINE_DEFAULTS
from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.servers.mlflow_server import MlflowServer
from chapter8_samples._lab.servers.receivers import OtlpReceiver

QUESTIONS = ("返品は何日以内ですか", "送料はいくらですか", "支払い方法を教えてください")
CLIENTS, CYCLE_MINUTES = 3, 3.0


@dataclass
class Traffic:
    """利用者の側の記録。"""

    think_seconds: float = 0.7
    """次に聞くまでの平均。"""
    traces: list[str] = field(default_factory=list[str])
    """答えと一緒に受け取ったトレースの ID。"""
    feedback: set[str] = field(default_factory=set[str])
    """受け付けられた評価の ID。"""
    refused_feedback: set[str] = field(default_factory=set[str])
    """断られた(利用者に失敗と知らせた)評価。"""
    answered: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])
    """答えられた要求の、開始と終了の時刻。"""
    counts: Counter[str] = field(default_factory=Counter[str])
    waiting: dict[int, float] = field(default_factory=dict[int, float])
    """答えを待っている利用者と、聞いた時刻。"""

    def customer(self, url: str, stop: threading.Event) -> None:
        """1 人の利用者: 聞き、ときどき評価し、しばらく読む。"""
        dice = random.Random()
        while not stop.wait(dice.expovariate(1 / self.think_seconds)):
            try:
                self._visit(url, dice)
            except requests.ConnectionError:  # 再起動の間。受け付けられていない
                self.counts["refused"] += 1
            finally:
                self.waiting.pop(threading.get_ident(), None)

    def _visit(self, url: str, dice: random.Random) -> None:
        began, query = time.monotonic(), {"question": dice.choice(QUESTIONS)}
        self.waiting[threading.get_ident()] = began
        reply = requests.get(f"{url}/ask", params=query, timeout=60)
        self.waiting.pop(threading.get_ident())
        trace_id = reply.json()["trace_id"]
        self.answered.append((began, time.monotonic()))
        self.traces.append(trace_id)
        self.counts[f"ask {reply.status_code}"] += 1
        if dice.random() < 0.4:
            self._rate(url, trace_id, dice)

    def _rate(self, url: str, trace_id: str, dice: random.Random) -> None:
        name = f"f-{dice.getrandbits(64):016x}"
        body = {"trace_id": trace_id, "feedback_id": name, "is_positive": dice.random() < 0.8}
        try:
            status = requests.post(f"{url}/feedback", json=body, timeout=60).status_code
        except requests.ConnectionError:
            status = 0
        self.counts[f"feedback {status}"] += 1
        if status in (200, 202):
            self.feedback.add(name)
        else:
            self.refused_feedback.add(name)


class App:
    """アプリのプロセス。何度でも起動し直せる。"""

    def __init__(
        self, home: Path, endpoint: str, otlp_timeout_seconds: float, environment: dict[str, str]
    ) -> None:
        self.home, self.port = home, free_port()
        self._otlp = [endpoint, str(otlp_timeout_seconds)]
        self.url = f"http://127.0.0.1:{self.port}"
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self.groups: list[int] = []
        self.stopped_at: list[float] = []
        self.memory: list[tuple[float, float]] = []
        """最後に起動してからの(時刻、RSS の MiB)。"""

    def start(self) -> None:
        script = Path(__file__).with_name("endurance_app.py")
        command = [sys.executable, str(script), str(self.port), str(self.home), *self._otlp]
        with (self.home / "app.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=log, start_new_session=True
            )
        self.groups.append(self._process.pid)
        self.memory = []
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(requests.ConnectionError):
                requests.get(f"{self.url}/health", timeout=5)
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((self.home / "app.log").read_text(encoding="utf-8")[-3000:])
            time.sleep(0.2)

    def stop_while(self, waiting: dict[int, float]) -> None:
        """LLM の答えを待っている要求があるときに、SIGTERM で止める。"""
        while not any(0.1 < time.monotonic() - since < 0.15 for since in list(waiting.values())):
            time.sleep(0.005)
        self.stop()

    def stop(self) -> None:
        """SIGTERM で止める。処理中の要求には答える。"""
        if self._process is not None:
            self.stopped_at.append(time.monotonic())
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(90)

    def kill(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def disk_full(self, full: bool) -> None:
        """ファイルへの書き込みを全部失敗させる、または元に戻す。"""
        assert self._process is not None
        pid, kind = self._process.pid, resource.RLIMIT_FSIZE
        hard = resource.prlimit(pid, kind)[1]
        resource.prlimit(pid, kind, (0 if full else hard, hard))

    def watch_memory(self, stop: threading.Event) -> None:
        while not stop.wait(1):
            with contextlib.suppress(OSError, IndexError, AssertionError):
                assert self._process is not None
                pages = Path(f"/proc/{self._process.pid}/statm").read_text().split()[1]
                mib = int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20
                self.memory.append((time.monotonic(), mib))


class Collector:
    """止めたり戻したりできる OTLP の受信側。"""

    def __init__(self, sink: OtlpReceiver) -> None:
        self.port, self._sink = free_port(), sink
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self._open = contextlib.ExitStack()

    def start(self) -> None:
        self._open.enter_context(relay(self.port, self._sink.grpc_endpoint))

    def stop(self) -> None:
        self._open.close()


Act = tuple[float, str, Callable[[], object]]


def acts(
    server: Server, app: App, collector: Collector, waiting: dict[int, float], restart: bool
) -> list[Act]:
    """1 周の出来事: (1 周のうちの位置、名前、すること)。"""
    restarts: list[Act] = [
        (0.04, "処理中に SIGTERM", lambda: app.stop_while(waiting)),
        (0.06, "アプリを起動", app.start),
        (0.12, "MLflow を SIGKILL", server.kill),
        (0.17, "その間に SIGTERM", app.stop),
        (0.18, "MLflow を起動", server.start),
        (0.19, "アプリを起動", app.start),
    ]
    return (restarts if restart else []) + [
        (0.28, "MLflow を SIGKILL", server.kill),
        (0.36, "MLflow を起動", server.start),
        (0.42, "Collector を停止", collector.stop),
        (0.52, "Collector を再開", collector.start),
        (0.56, "ディスク満杯", lambda: app.disk_full(True)),
        (0.63, "ディスクが空く", lambda: app.disk_full(False)),
        (0.68, "ディスク満杯", lambda: app.disk_full(True)),
        (0.68, "同時に MLflow を SIGKILL", server.kill),
        (0.76, "MLflow を起動", server.start),
        (0.78, "ディスクが空く", lambda: app.disk_full(False)),
    ]


def environment(server: Server, stub: StubLlm) -> dict[str, str]:
    """アプリに渡す環境変数。"""
    owned = ("MLFLOW_", "OTEL_", "OPENAI_", "CHAPTER8_", "DATABRICKS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(owned)}
    llm = {"OPENAI_BASE_URL": stub.base_url, "OPENAI_API_KEY": "sk-local-stub"}
    return kept | OFFLINE_DEFAULTS | llm | {"MLFLOW_TRACKING_URI": server.url}


def run(
    minutes: float,
    home: Path,
    tell: Callable[[str], object] = print,
    *,
    think_seconds: float = Traffic.think_seconds,
    error_rate: float = 0.03,
    otlp_timeout_seconds: float = 5,
) -> Outcome:
    """動かして、数える。短いときは、要求を増やし、OTLP の再送を早くあきらめさせて補う。"""
    os.environ.update(OFFLINE_DEFAULTS)
    cycles = max(1, round(minutes / CYCLE_MINUTES))
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(OtlpReceiver())
        stub = stack.enter_context(StubLlm())
        stub.set_faults(latency_seconds=0.2, error_rate=error_rate)
        server = Server(home / "server")
        stack.callback(server.stop)
        server.start()
        collector = Collector(sink)
        stack.callback(collector.stop)
        collector.start()
        settings = environment(server, stub) | {
            "OTEL_BSP_SCHEDULE_DELAY": f"{otlp_timeout_seconds * 1000:.0f}"
        }
        app = App(home, collector.endpoint, otlp_timeout_seconds, settings)
        stack.callback(app.kill)
        app.start()
        traffic = Traffic(think_seconds)
        with customers(app, traffic):
            for number in range(cycles):
                restart = number <= cycles // 4  # 残りは、メモリーを見るために止めない
                plan = acts(server, app, collector, traffic.waiting, restart)
                cycle(plan, minutes * 60 / cycles, tell)
        app.stop()
        return collect(minutes, home, traffic, app, server, sink)


class Server(MlflowServer):
    """起動し直したぶんのプロセスグループも覚えておく。"""

    def __init__(self, home: Path) -> None:
        super().__init__(home)
        self.groups: list[int] = []

    def start(self) -> MlflowServer:
        super().start()
        self.groups.append(self.pid)
        return self


@contextlib.contextmanager
def customers(app: App, traffic: Traffic) -> Iterator[None]:
    """利用者とメモリーの見張りを動かす。利用者の失敗は、終わってから知らせる。"""
    stop = threading.Event()
    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        jobs = [pool.submit(traffic.customer, app.url, stop) for _ in range(CLIENTS)]
        jobs.append(pool.submit(app.watch_memory, stop))
        try:
            yield
        finally:
            stop.set()
    for job in jobs:
        job.result()


def cycle(plan: list[Act], seconds: float, tell: Callable[[str], object]) -> None:
    """1 周。遅れても、間隔は詰めない(停止の時間を縮めない)。"""
    began, late = time.monotonic(), 0.0
    for position, name, act in plan:
        time.sleep(max(0.0, began + late + position * seconds - time.monotonic()))
        tell(f"{time.strftime('%H:%M:%S')} {name}")
        started = time.monotonic()
        act()
        late += time.monotonic() - started
    time.sleep(max(0.0, began + seconds - time.monotonic()))


def collect(
    minutes: float, home: Path, traffic: Traffic, app: App, server: Server, sink: OtlpReceiver
) -> Outcome:
    """残りを送り直してから、保存されたものを読む。"""
    import mlflow

    from chapter8_samples.production_tracing.delivery.spool import replay
    from chapter8_samples.quality_monitoring import FeedbackOutbox

    mlflow.set_tracking_uri(server.url)
    rest = replay(home / "spool")
    outbox = FeedbackOutbox(home / "outbox.db")
    outbox.replay(timeout_seconds=0.5)  # 失われたトレースへの評価は、待っても届かない
    experiment = mlflow.set_experiment("endurance").experiment_id
    found: Any = mlflow.search_traces(locations=[experiment], return_type="list")
    server.stop()
    return Outcome(
        minutes=minutes,
        traffic=traffic,
        reports=[json.loads(path.read_text()) for path in sorted(home.glob("reports/*.json"))],
        stored={trace.info.trace_id: trace for trace in found},
        sink_spans={span.span_id for span in sink.spans},
        memory=app.memory,
        mid_request=sum(a < at < b for at in app.stopped_at for a, b in traffic.answered),
        left=rest.pending + rest.dead,
        feedback_left=feedback_left(home / "outbox.db"),
        leftover=[group for group in app.groups + server.groups if alive(group)],
    )


def feedback_left(outbox: Path) -> set[str]:
    """送信箱に残った評価の ID。"""
    with sqlite3.connect(outbox) as database:
        rows = database.execute("SELECT json_extract(body, '$.feedback_id') FROM feedback")
        return {name for (name,) in rows}


def alive(group: int) -> bool:
    """プロセスグループに誰か残っているか。"""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> int:
    """動かして表を出す。合わない数があれば 1 を返す。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="endurance-") as home:
        outcome = run(chosen.minutes, Path(home), lambda text: print(text, file=sys.stderr))
    print_table("耐久試験", ("見たもの", "結果"), list(outcome.rows()))
    return 1 if any(outcome.problems()) else 0


if __name__ == "__main__":
    sys.exit(main())
