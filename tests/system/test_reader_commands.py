"""2 つの README に書かれたコマンドを、書かれた順に、まっさらな環境で全部実行する。

一覧は README から読む。新しいコマンドを書けば、ここで実行される。例外は 5 つ:

- ``pip install`` は .ci/run が README のとおりに実行する。ここでは要求が満たされることだけを見る。
- サンプルは節ごとに 1 本。残りは tests/test_sample_runs.py が 1 本ずつ実行している。
- 測定は数分かかるので、受け付ける引数だけを確かめる(実行は test_headline_figures.py)。
- シナリオの 2 回目から(``--fresh`` など)も引数だけを確かめる(実行は test_main_job.py)。
- ``pytest`` と ``otelcol-contrib`` は ``ELSEWHERE`` の場所で実行している。
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
from importlib import metadata
from itertools import takewhile

import pytest
import requests
from packaging.requirements import Requirement
from ports import free_port
from reader_environment import Reader
from samples import ROOT, SAMPLES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="only on POSIX: a shell"),
]
READMES = ("README.md", "chapter8_samples/README.md")
PROGRAMS = "python3?|pip|pytest|source|mlflow|uvicorn|otelcol-contrib"
ELSEWHERE = {
    "pytest": ".ci/run",
    "otelcol-contrib": "tests/opentelemetry/test_collector_run.py",
}
INSTALLED_BY = {
    "requirements.txt": ".ci/run",
    "requirements-prod.txt": "tests/system/test_production_environment.py",
}
STORY_AGAIN = (["--fresh"], ["--keep"])
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


def first_of_each_folder() -> set[str]:
    paths = [c.partition(" ")[2] for c in all_commands() if re.match(r"python chapter8\S+$", c)]
    first = {path.split("/")[1]: path for path in reversed(paths)}
    return set(first.values())


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    reader = Reader.arrive(tmp_path_factory.mktemp("reader"))
    yield reader
    assert reader.processes() == []


def test_the_lists_are_read_from_the_readmes() -> None:
    found = all_commands()
    samples = {f"python {path.relative_to(ROOT).as_posix()}" for path in SAMPLES}
    assert samples <= set(found)
    assert {"python -m chapter8_samples", "python -m chapter8_samples ui"} <= set(found)
    assert len(first_of_each_folder()) == 5


@pytest.mark.parametrize("command", all_commands())
def test_command(command: str, reader: Reader) -> None:
    program, *arguments = shlex.split(command)
    if program in ELSEWHERE:
        assert (ROOT / ELSEWHERE[program]).is_file()
        assert all((ROOT / path).is_file() for path in arguments if path.endswith(".yaml"))
    elif program == "pip":
        check_requirements(arguments)
    elif must_not_run(arguments):
        check_options(reader, arguments)
    elif arguments[:2] == ["-m", "chapter8_samples"] and arguments[2:3] and arguments[2] in SERVERS:
        serve_once(reader, f"{command} --port {free_port()}", SERVERS[arguments[2]])
    elif (ROOT / arguments[0]) in SAMPLES and arguments[0] not in first_of_each_folder():
        assert (ROOT / "tests/test_sample_runs.py").is_file()
    else:
        run(reader, command)
    assert not reader.outside.exists(), f"手元の外へ接続しようとした: {reader.outside.read_text()}"


def must_not_run(arguments: list[str]) -> bool:
    """測定、シナリオの 2 回目から、``DIR`` のような書き換える場所のあるもの。"""
    measures = "".join(arguments[:1]).startswith("tests/benchmarks")
    again = arguments[:2] == ["-m", "chapter8_samples"] and arguments[2:] in STORY_AGAIN
    return measures or again or any(word.isupper() for word in arguments)


def run(reader: Reader, command: str) -> str:
    """最後まで実行する。0 で終わり、プロセスを残さない。"""
    job = reader.start(command)
    try:
        out, _ = job.communicate(timeout=240)
    finally:
        stop(job)
    assert job.returncode == 0, out
    wait_until(lambda: not reader.processes(), lambda: f"left behind: {reader.processes()}")
    return out


def serve_once(reader: Reader, command: str, word: str) -> None:
    """起動し、1 度だけ開き、Ctrl-C で止める。"""
    job = reader.start(f"exec {command}")
    try:
        page = requests.get(address(job), timeout=30)
        assert page.status_code == 200 and word in page.text
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


def check_requirements(arguments: list[str]) -> None:
    """``pip install`` の相手があること。要求は、いまの環境(.ci/run が作る)で満たされること。"""
    assert arguments[0] == "install"
    if arguments[1] == "-r":
        installer = (ROOT / INSTALLED_BY[arguments[2]]).read_text(encoding="utf-8")
        assert (ROOT / arguments[2]).is_file() and arguments[2] in installer
        return
    for text in arguments[1:]:
        wanted = Requirement(text)
        version = metadata.version(wanted.name)
        assert wanted.specifier.contains(version), f"{wanted}: {version} is installed"


def check_options(reader: Reader, arguments: list[str]) -> None:
    """サブコマンドまでの ``--help`` に、書かれたオプションがすべてあること。"""
    start = 2 if arguments[0] == "-m" else 1
    fixed = takewhile(lambda word: word[0] != "-" and not word.isupper(), arguments[start:])
    usage = run(reader, f"python {shlex.join([*arguments[:start], *fixed])} --help")
    options = [word for word in arguments[start:] if word[0] == "-"]
    assert [option for option in options if option not in usage] == [], usage
