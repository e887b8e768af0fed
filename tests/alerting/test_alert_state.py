"""状態ファイル: 使えるのは一つだけ。落ちても、壊れても、Volume でも、二重に送らず失わない。"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chapter8_samples.alerting.delivery import Alert, Delivery
from chapter8_samples.alerting.engine import AlertEngine, StateHeldError, file
from chapter8_samples.alerting.engine.file import StateFile
from chapter8_samples.alerting.engine.state import RuleState, Unsent
from chapter8_samples.alerting.metrics import MetricSample
from chapter8_samples.alerting.rules import AlertConfig, AlertRule

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
STEP = timedelta(seconds=30)
CONFIG = AlertConfig(rules=[AlertRule(name="errors", threshold=0.5)], offset="0s")
VALUES = (0.0, 1.0, 1.0, 0.0)
posix = pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL")


class Source:
    """30 秒ごとの ``VALUES``。"""

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        value = VALUES[min(round((at - START) / STEP), len(VALUES) - 1)]
        return MetricSample(value, 9)

    def split(
        self, metric: str, window: timedelta, at: datetime, by: str
    ) -> dict[str, MetricSample]:
        return {}

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int = 3) -> list[str]:
        return []


class Log:
    """送られたものを、別のプロセスからも読めるファイルに書く通知先。"""

    def __init__(self, path: Path, step: Callable[[], object] = lambda: None) -> None:
        self.path, self.step = path, step

    def notify(
        self, alerts: Alert | Iterable[Alert], *, only: Mapping[str, Collection[str]] | None = None
    ) -> list[Delivery]:
        found = [alerts] if isinstance(alerts, Alert) else list(alerts)
        for alert in found:
            self.step()
            with self.path.open("a", encoding="utf-8") as log:
                log.write(f"{alert.status.value}\n")
            self.step()
        return [Delivery(handler="log", fingerprint=a.fingerprint, ok=True) for a in found]

    def keep_alive(self, alerts: Sequence[Alert]) -> list[Delivery]:
        self.step()
        return []

    def read(self) -> list[str]:
        return self.path.read_text(encoding="utf-8").split() if self.path.exists() else []


def engine(folder: Path, log: Log | None = None) -> AlertEngine:
    log = log or Log(folder / "log")
    return AlertEngine(CONFIG, Source(), log, state_path=folder / "alerts.db")


def states(path: Path) -> list[dict[str, Any]]:
    """ファイルにある、アラートごとの状態。"""
    with closing(sqlite3.connect(path)) as database:
        (text,) = database.execute("SELECT body FROM alert_state").fetchone()
    return list(json.loads(text)["rules"].values())


def write_body(path: Path, change: Callable[[Any], object]) -> None:
    with closing(sqlite3.connect(path)) as database, database:
        (text,) = database.execute("SELECT body FROM alert_state").fetchone()
        body = json.loads(text)
        change(body)
        database.execute("UPDATE alert_state SET body = ?", [json.dumps(body)])


# 壊れたファイル --------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"version": 1, "rules": {}, "outbox": [], "evaluated_at": null}',
        "[" * 100_000,
        "\x00\xff" * 50,
        "SQLite format 3\x00" + "x" * 5000,
    ],
)
def test_a_broken_or_older_state_file_is_set_aside(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "alerts.db"
    path.write_text(content, encoding="latin-1")
    (tmp_path / "alerts.db-journal").write_bytes(b"left by a crash")
    assert [a.name for a in engine(tmp_path).evaluate(START + STEP)] == ["errors"]
    assert (tmp_path / "alerts.db.bad").read_text(encoding="latin-1") == content
    assert "unreadable" in caplog.text
    assert [state["phase"] for state in states(path)] == ["firing", "inactive"]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("rules", "phase", "bogus"),
        ("rules", "phase", 3),
        ("rules", "value", "high"),
        ("rules", "last_true", "2026-01-01T00:00:00"),
        ("rules", "told", {"name": 3}),
        ("outbox", "alert", None),
        ("outbox", "only", 3),
    ],
)
def test_a_record_nobody_could_act_on_is_set_aside(
    tmp_path: Path, part: str, field: str, value: Any
) -> None:
    state = StateFile(tmp_path / "alerts.db")
    state.hold()
    state.save({"r": RuleState("errors")}, {"f": Unsent(Alert(name="a"))})
    state.release()

    def spoil(body: Any) -> None:
        next(iter(body[part].values()))[field] = value

    write_body(tmp_path / "alerts.db", spoil)
    assert [a.name for a in engine(tmp_path).evaluate(START + STEP)] == ["errors"]
    assert (tmp_path / "alerts.db.bad").exists()


def test_the_database_of_another_program_is_left_as_it_is(tmp_path: Path) -> None:
    """``--state mlflow.db`` と書き誤っても、MLflow のデータは動かない。"""
    path = tmp_path / "alerts.db"
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE runs (id)")
        database.execute("INSERT INTO runs VALUES (7)")
    engine(tmp_path).evaluate(START + STEP)
    assert not (tmp_path / "alerts.db.bad").exists()
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT id FROM runs").fetchall() == [(7,)]


def test_text_that_is_no_unicode_is_kept(tmp_path: Path) -> None:
    odd = Unsent(Alert(name="broken \ud800", labels={"service": "\udfff"}), ("slack",))
    state = StateFile(tmp_path / "alerts.db")
    state.hold()
    state.save({}, {"f": odd})
    saved = StateFile(tmp_path / "alerts.db")
    state.release()
    found = saved.hold()
    assert found is not None and found.outbox == {"f": odd}


# 持ち主 ----------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


def test_the_lease_of_another_machine_is_told_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, path = Clock(), tmp_path / "alerts.db"
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(file, "machine", lambda: "another machine")
        elsewhere.setattr(socket, "gethostname", lambda: "batch-7")
        StateFile(path, clock=clock).hold()
    mine = StateFile(path, clock=clock)
    until = "ends at 2026-01-01 00:05:00 UTC"
    for minutes in (0, 4.9):
        clock.now = START + timedelta(minutes=minutes)
        with pytest.raises(StateHeldError, match=f"on batch-7; its lease {until}"):
            mine.hold()
    clock.now = START + timedelta(minutes=5)
    mine.hold()


def test_who_lost_the_lease_writes_nothing_any_more(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "alerts.db"
    slow, quick = StateFile(path, clock=clock), StateFile(path, clock=clock)
    slow.hold()
    clock.now += timedelta(minutes=6)
    quick.hold()
    quick.save({"k": RuleState("new")}, {})
    with pytest.raises(StateHeldError):
        slow.save({"k": RuleState("old")}, {})
    slow.release()
    assert [state["rule"] for state in states(path)] == ["new"]
    with pytest.raises(StateHeldError):
        slow.hold()


def test_a_holder_renews_its_lease(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "alerts.db"
    state = StateFile(path, clock=clock)
    for _ in range(4):
        state.hold()
        clock.now += timedelta(minutes=3)
    with pytest.raises(StateHeldError, match="its lease ends at 2026-01-01 00:14:00 UTC"):
        StateFile(path, clock=clock).hold()


def test_what_could_not_be_written_is_not_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """書けなかった間に届いた通知を、古い記録に従ってもう一度送らない。"""
    log, watch = Log(tmp_path / "log"), engine(tmp_path)
    watch.evaluate(START)
    with monkeypatch.context() as full:
        full.setattr(file, "json", SimpleNamespace(dumps=no_space_for_more, loads=json.loads))
        watch.evaluate(START + STEP)
    assert log.read() == ["firing"] and "alert_state" in watch.failures
    watch.evaluate(START + 2 * STEP)
    assert log.read() == ["firing"] and watch.failures == {}


@pytest.mark.parametrize("broken", [False, True])
def test_a_file_that_vanishes_or_breaks_in_use_takes_no_memory_along(
    tmp_path: Path, broken: bool
) -> None:
    log, watch, path = Log(tmp_path / "log"), engine(tmp_path), tmp_path / "alerts.db"
    watch.evaluate(START + STEP)
    path.write_bytes(b"\x55" * 5000) if broken else path.unlink()
    watch.evaluate(START + 2 * STEP)
    watch.evaluate(START + 3 * STEP)
    assert log.read() == ["firing", "resolved"]


def test_what_was_given_back_is_free_even_where_the_clock_is_behind(tmp_path: Path) -> None:
    ahead, path = Clock(), tmp_path / "alerts.db"
    ahead.now += timedelta(days=1)
    state = StateFile(path, clock=ahead)
    state.hold()
    state.release()
    assert StateFile(path, clock=Clock()).hold() is not None


def no_space_for_more(body: Any) -> str:
    if "'firing'" in str(body):
        raise OSError("no space left on device")
    return json.dumps(body)


def child(work: Callable[[], object]) -> int:
    """``work`` を別のプロセスで行う。0 なら終わりまで動いた。"""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@posix
def test_a_dead_holder_is_noticed_at_once(tmp_path: Path) -> None:
    def hold_and_die() -> None:
        StateFile(tmp_path / "alerts.db").hold()
        os.kill(os.getpid(), signal.SIGKILL)

    assert ended(child(hold_and_die)) == -signal.SIGKILL
    assert [a.name for a in engine(tmp_path).evaluate(START + STEP)] == ["errors"]


@posix
def test_a_forked_worker_is_another_engine(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "alerts.db")
    state.hold()

    def inherits() -> None:
        with pytest.raises(StateHeldError):
            state.hold()

    assert ended(child(inherits)) == 0


def watch(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    own = engine(folder, Log(folder / "log"))
    done = 0
    while done < len(VALUES):
        try:
            own.evaluate(START + done * STEP)
            done += 1
        except StateHeldError:
            pass
        time.sleep(rng.random() / 200)


@pytest.mark.slow
def test_engines_that_race_send_everything_once(tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    # fork では、ほかのテストのスレッドが持つ SQLite のロックまで写り、止まることがある
    spawn = multiprocessing.get_context("spawn")
    for _ in range(5):
        for left in (tmp_path / "alerts.db", tmp_path / "log"):
            left.unlink(missing_ok=True)
        processes = [spawn.Process(target=watch, args=(tmp_path, seed)) for seed in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0] * 6
        counts = Counter(log.read())
        assert counts["firing"] == counts["resolved"] >= 1
        # 時刻の遅れた見張りは、もう一度発報を見つける。同じ発報を二度は送らない
        assert log.read() == ["firing", "resolved"] * counts["firing"]


def dying(step: Callable[[], object]) -> type[sqlite3.Connection]:
    """文を実行するたびに ``step`` を呼ぶ接続。"""

    class Dying(sqlite3.Connection):
        def execute(self, *arguments: Any) -> sqlite3.Cursor:
            step()
            return super().execute(*arguments)

    return Dying


@pytest.mark.slow
@posix
@pytest.mark.parametrize("missed", [0, 1])
def test_a_kill_at_any_step_loses_nothing_and_repeats_only_what_was_not_recorded(
    tmp_path: Path, missed: int
) -> None:
    """発報の回と解消の回の、SQL の文と送信の前後のすべてで SIGKILL する。

    落ちた回から続けるか、その回を飛ばして(``missed``。障害はもう終わっている)続ける。
    """
    connect, survived, doubled = sqlite3.connect, False, 0
    for kill_at in range(1000):
        home = tmp_path / str(kill_at)
        home.mkdir()
        steps = iter(range(kill_at))

        def step(steps: Iterable[int] = steps) -> None:
            if next(iter(steps), None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        def watch(home: Path = home, step: Callable[[], object] = step) -> None:
            file.sqlite3.connect = partial(connect, factory=dying(step))  # type: ignore[assignment]
            play(home, Log(home / "log", step))

        survived = ended(child(watch)) == 0
        if survived:
            break
        play(home, Log(home / "log"), missed)
        sent = Log(home / "log").read()
        changes = [word for word, before in zip(sent, ["", *sent], strict=False) if word != before]
        # 飛ばした回の発報は、知らせなくてもよい。知らせたなら、必ず解消を知らせる
        told = ["firing", "resolved"] if not missed or "firing" in sent else sent[:1]
        assert changes == told, (kill_at, sent)
        assert len(sent) <= 3, (kill_at, sent)  # 記録する前に落ちた 1 通だけが重なる
        doubled += len(sent) == 3
        assert {state["phase"] for state in states(home / "alerts.db")} == {"inactive"}
        assert not (home / "alerts.db.bad").exists()
        shutil.rmtree(home)
    assert survived and 0 < doubled < 30


def play(home: Path, log: Log, missed: int = 0) -> None:
    """落ちた回から続ける(cron の次の回のように)。"""
    progress = home / "progress"
    done = int(progress.read_text()) + missed if progress.exists() else 2
    for i in range(done, len(VALUES) + missed):
        progress.write_text(str(i))
        engine(home, log).evaluate(START + i * STEP)


# ロックも途中への書き込みもできない場所 ----------------------------------------------


@pytest.fixture
def volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SQLite では書けないフォルダー。本物に近い代わりは、下の LD_PRELOAD の試験。"""
    folder, connect = tmp_path / "volume", sqlite3.connect
    folder.mkdir()

    def refuse(path: Any, *arguments: Any, **options: Any) -> sqlite3.Connection:
        if folder in Path(path).parents:
            raise sqlite3.OperationalError("disk I/O error")
        return connect(path, *arguments, **options)

    monkeypatch.setattr(file.sqlite3, "connect", refuse)
    monkeypatch.setattr(file, "SETTLE_SECONDS", 0.01)
    return folder


def test_a_volume_gets_whole_files_and_keeps_every_promise(volume: Path, tmp_path: Path) -> None:
    log = Log(tmp_path / "log")
    for i in range(len(VALUES)):
        engine(volume, log).evaluate(START + i * STEP)
        assert [left.name for left in volume.iterdir()] == ["alerts.db"]
    assert log.read() == ["firing", "resolved"]
    (volume / "alerts.db").write_text("{}", encoding="utf-8")
    engine(volume, log).evaluate(START + STEP)
    assert (volume / "alerts.db.bad").exists() and log.read()[2:] == ["firing"]


def test_a_write_that_fails_leaves_nothing_on_a_volume(
    volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    for _ in range(2):
        with pytest.raises(OSError, match="no space left"):
            StateFile(volume / "alerts.db").hold()
    assert list(volume.iterdir()) == []


def test_who_does_not_hold_it_writes_nothing_to_a_volume(volume: Path) -> None:
    """書き戻すと、持ち主がその間に書いたものを消してしまう。"""
    path = volume / "alerts.db"
    StateFile(path).hold()
    before, other = path.stat().st_mtime_ns, StateFile(path)
    with pytest.raises(StateHeldError):
        other.hold()
    other.release()
    assert path.stat().st_mtime_ns == before


def test_of_two_that_wrote_at_once_on_a_volume_the_last_one_has_it(volume: Path) -> None:
    path = volume / "alerts.db"
    second = StateFile(path, sleep=lambda _: None)
    empty = path.read_bytes() if path.exists() else b""

    def meanwhile(_: float) -> None:  # second は、first が書く前のファイルを読んでいた
        path.write_bytes(empty) if empty else path.unlink()
        second.hold()

    first = StateFile(path, sleep=meanwhile)
    with pytest.raises(StateHeldError):
        first.hold()
    second.save({"k": RuleState("mine")}, {})
    first.release()
    second.release()
    StateFile(path).hold()


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static int on_volume(int fd) {
    char link[64], path[4096] = {0};
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return readlink(link, path, sizeof path - 1) > 0 && strstr(path, getenv("VOLUME"));
}
#define REFUSE(name) \
    ssize_t name(int fd, const void *data, size_t size, off_t at) { \
        if (on_volume(fd)) { errno = EOPNOTSUPP; return -1; } \
        ssize_t (*real)(int, const void *, size_t, off_t) = dlsym(RTLD_NEXT, #name); \
        return real(fd, data, size, at); \
    }
REFUSE(pwrite)
REFUSE(pwrite64)
static int lock_refused(int fd, int command) {
    return (command == F_SETLK || command == F_SETLKW) && on_volume(fd);
}
#define NO_LOCKS(name) \
    int name(int fd, int command, ...) { \
        va_list rest; va_start(rest, command); void *third = va_arg(rest, void *); va_end(rest); \
        if (lock_refused(fd, command)) { errno = ENOTSUP; return -1; } \
        int (*real)(int, int, ...) = dlsym(RTLD_NEXT, #name); \
        return real(fd, command, third); \
    }
NO_LOCKS(fcntl)
NO_LOCKS(fcntl64)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("cc"), reason="needs cc on Linux"
)
def test_a_file_system_without_locks_and_random_writes(tmp_path: Path, config_text: str) -> None:
    """本物の SQLite に、pwrite とロックを断るファイルシステムを見せる。"""
    volume, shim = tmp_path / "volume", tmp_path / "shim.so"
    volume.mkdir()
    (tmp_path / "shim.c").write_text(SHIM, encoding="utf-8")
    build = ["cc", "-shared", "-fPIC", "-o", str(shim), str(tmp_path / "shim.c"), "-ldl"]
    subprocess.run(build, check=True, timeout=60)
    environ = {**os.environ, "LD_PRELOAD": str(shim), "VOLUME": str(volume)}
    direct = "import sqlite3, sys; sqlite3.connect(sys.argv[1]).execute('CREATE TABLE t (id)')"
    refused = [sys.executable, "-c", direct, str(volume / "direct.db")]
    answer = subprocess.run(refused, env=environ, capture_output=True, text=True, timeout=60)
    assert "OperationalError" in answer.stderr  # 断られる場所であること
    (volume / "direct.db").unlink(missing_ok=True)
    for i in range(len(VALUES)):
        run = [sys.executable, "-c", config_text, str(volume), str(tmp_path / "log"), str(i)]
        subprocess.run(run, env=environ, check=True, timeout=120)
    assert Log(tmp_path / "log").read() == ["firing", "resolved"]
    assert [left.name for left in volume.iterdir()] == ["alerts.db"]


@pytest.fixture
def config_text() -> str:
    """1 回だけ評価するプログラム。"""
    root, here = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent
    return (
        f"import sys; sys.path[:0] = [{str(root)!r}, {str(here)!r}]\n"
        "from pathlib import Path\n"
        "from test_alert_state import START, STEP, Log, engine\n"
        "volume, log, i = sys.argv[1:]\n"
        "engine(Path(volume), Log(Path(log))).evaluate(START + int(i) * STEP)\n"
    )
