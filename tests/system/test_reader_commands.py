"""README に書かれたコマンドを、まっさらな環境で、書かれた順に実行する。

一覧は README から読む。新しいコマンドを書けば、ここで実行される。実行しないのは、ほかのところが
そのとおりに実行しているもの(``elsewhere``)と、数分かかるもの、書き換える場所のあるもの、引数を省いて
書いた節のコマンド。後の 3 つは、書かれたオプションがあることだけを ``--help`` で確かめる。
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from itertools import takewhile

import pytest
import requests
from packaging.requirements import Requirement
from ports import free_port
from reader_environment import Reader
from samples import ROOT, SAMPLES, SECTIONS

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(sys.platform == "win32", reason="only on POSIX: a shell"),
]
READMES = (
    "README.md",
    "chapter8_samples/README.md",
    "tests/README.md",
    "tests/benchmarks/README.md",
)
PROGRAMS = "python3?|pip|pytest|source|mlflow|uvicorn|otelcol-contrib"
STORY = ["-m", "chapter8_samples"]
# 終わらないコマンド -> 開いたときの答えにあるはずの言葉
SERVERS = {"serve": "みどり商店", "ui": "MLflow"}


def commands(text: str) -> list[str]:
    """コードブロックの行と、文中や表の `...` のうち、コマンドになっているもの。"""
    fenced = r"^```bash\n(.*?)^```"
    lines = "\n".join(re.findall(fenced, text, re.MULTILINE | re.DOTALL)).splitlines()
    prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines += re.findall(rf"`((?:{PROGRAMS})(?: [^`]+)?)`", prose)
    parts = [part.partition("  #")[0].strip() for line in lines for part in line.split("&&")]
    mentions = {"pip install", "python", *PROGRAMS.split("|")} - {"pytest"}
    return [part for part in parts if part and part[0] != "#" and part not in mentions]


def all_commands() -> list[str]:
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in READMES]
    return list(dict.fromkeys(command for text in texts for command in commands(text)))


def elsewhere(program: str, arguments: list[str]) -> bool:
    """ほかのところが、そのとおりに実行しているもの。"""
    if program in ("mkdir", "cp", "sed"):  # tests/test_copying.py(アプリへの写し方)
        return True
    if program in ("pytest", "otelcol-contrib"):  # .ci/run と test_collector_run.py
        return all((ROOT / path).is_file() for path in arguments if path.endswith(".yaml"))
    if program != "python":
        return False
    if arguments[0] == "tests/make_stubs.py":  # tests/packaging が、書かれる中身を比べる
        return True
    # 本書のページは tests/test_pages.py、シナリオは test_main_job.py
    return arguments in (STORY, [*STORY, "--fresh"]) or (ROOT / arguments[0]) in SAMPLES


def only_looked_at(program: str, arguments: list[str]) -> bool:
    """数分かかる測定、``DIR`` のような書き換える場所のあるもの、節のコマンド。"""
    if program != "python":
        return False
    measures = arguments[0].startswith("tests/benchmarks")
    of_section = arguments[:1] == ["-m"] and arguments[1].rpartition(".")[2] in SECTIONS
    return measures or of_section or any(word.isupper() for word in arguments)


def split(command: str) -> tuple[str, list[str]]:
    program, *arguments = shlex.split(command)
    return program, arguments


def to_run() -> list[str]:
    return [
        command
        for command in all_commands()
        if not elsewhere(*split(command))
        and not only_looked_at(*split(command))
        and split(command)[0] != "pip"
    ]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader.arrive(tmp_path_factory.mktemp("reader"))
    yield reader
    assert reader.processes() == []


def test_the_lists_are_read_from_the_readmes() -> None:
    found = all_commands()
    # 全部のページは tests/test_pages.py
    pages = ("01_production_tracing/basic_setup.py", "04_alerting/rollback.py")
    assert {f"python chapter8_samples/{page}" for page in pages} <= set(found)
    assert {"python -m chapter8_samples", "python -m chapter8_samples ui"} <= set(found)
    assert {split(command)[0] for command in to_run()} <= {"python", "python3", "source"}


@pytest.mark.parametrize("command", to_run())
def test_command(command: str, reader: Reader) -> None:
    _, arguments = split(command)
    if arguments[:2] == STORY and arguments[2:3] and arguments[2] in SERVERS:
        serve_once(reader, f"{command} --port {free_port()}", arguments[2])
    else:
        if "--experiment" in arguments:
            make_experiment(reader, arguments[arguments.index("--experiment") + 1])
        run(reader, command)
    assert not reader.outside.exists(), f"手元の外へ接続しようとした: {reader.outside.read_text()}"


def make_experiment(reader: Reader, name: str) -> None:
    """シナリオが残すのと同じ名前のエクスペリメントと、1 件のトレース。"""
    uri = f"sqlite:///{(reader.directory / '.chapter8/mlflow.db').as_posix()}"
    (reader.directory / ".chapter8").mkdir(exist_ok=True)
    code = f"import mlflow; mlflow.set_tracking_uri({uri!r}); mlflow.set_experiment({name!r}); "
    code += "mlflow.trace(lambda: 1, name='answer')()"
    run(reader, f"MLFLOW_DISABLE_TELEMETRY=true {shlex.join(['python', '-c', code])}")


def run(reader: Reader, command: str, alone: bool = True) -> str:
    """最後まで実行する。0 で終わり、プロセスを残さない。"""
    job = reader.start(command)
    try:
        out, _ = job.communicate(timeout=240)
    finally:
        stop(job)
    assert job.returncode == 0, out
    if alone:
        wait_until(lambda: not reader.processes(), lambda: f"left behind: {reader.processes()}")
    return out


def serve_once(reader: Reader, command: str, name: str) -> None:
    """起動し、1 度だけ開き(``serve`` は質問もし)、Ctrl-C で止める。"""
    job = reader.start(f"exec {command}")
    try:
        url = address(job)
        page = requests.get(url, timeout=30)
        assert page.status_code == 200 and SERVERS[name] in page.text
        if name == "serve":
            body = {"question": "返品は何日以内ならできますか", "session_id": "s"}
            reply = requests.post(f"{url}/ask", json=body, timeout=60)
            assert "14日以内" in "".join(re.findall(r'"text": "([^"]*)"', reply.text))
        job.send_signal(signal.SIGINT)
        out, _ = job.communicate(timeout=60)
    finally:
        stop(job)
    assert job.returncode in (0, 130) and "Traceback" not in out, out
    wait_until(lambda: not reader.processes(), lambda: f"left behind: {reader.processes()}")


def stop(job: subprocess.Popen[str]) -> None:
    """終わらなかったときに、起動したものごと止める。"""
    if job.poll() is None:
        os.killpg(job.pid, signal.SIGKILL)


def address(job: subprocess.Popen[str]) -> str:
    """画面に出た URL(受け付け始めるまで待つ)。"""
    assert job.stdout is not None
    lines: list[str] = []
    for line in job.stdout:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            wait_until(lambda: answers(found[0]), lambda: "".join(lines))
            return found[0]
    raise AssertionError("".join(lines))


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=10).ok
    except requests.ConnectionError:
        return False


def wait_until(
    condition: Callable[[], bool], detail: Callable[[], str], seconds: float = 30
) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, detail()
        time.sleep(0.1)


def test_what_the_readmes_install_is_installed_here() -> None:
    """``pip install`` の相手があること。要求は、いまの環境(.ci/run が作る)で満たされること。"""
    for command in all_commands():
        program, arguments = split(command)
        if program != "pip":
            continue
        assert arguments[0] == "install", command
        if arguments[1] == "-r":
            assert (ROOT / arguments[2]).is_file(), command
        elif arguments[1] == "-e":
            assert arguments[2] in (".", ".[ci]"), command
        else:
            for text in arguments[1:]:
                wanted = Requirement(text)
                version = metadata.version(wanted.name)
                assert wanted.specifier.contains(version), f"{wanted}: {version} is installed"


def test_the_options_of_what_is_not_run_exist(reader: Reader) -> None:
    """サブコマンドまでの ``--help`` に、書かれたオプションがすべてあること。"""
    wanted: dict[str, set[str]] = {}
    for command in all_commands():
        program, arguments = split(command)
        if not only_looked_at(program, arguments):
            continue
        start = 2 if arguments[0] == "-m" else 1
        fixed = takewhile(lambda word: word[0] != "-" and not word.isupper(), arguments[start:])
        usage = f"python {shlex.join([*arguments[:start], *fixed])} --help"
        wanted.setdefault(usage, set()).update(w for w in arguments[start:] if w[0] == "-")
    with ThreadPoolExecutor(2) as pool:
        shown = dict(
            zip(wanted, pool.map(lambda c: run(reader, c, alone=False), wanted), strict=True)
        )
    missing = {c: [o for o in options if o not in shown[c]] for c, options in wanted.items()}
    assert {c: options for c, options in missing.items() if options} == {}
