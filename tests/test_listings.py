"""本書のリスト 8.1 から 8.17 を、対応する関数に本書と同じ引数を渡して動かす(listing_calls.py)。

リストと関数の対応は ``LISTINGS`` だけに書く。chapter8_samples/README.md の表は、これと一致する。
"""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import listing_calls
import mlflow
import pytest
import yaml
from listing_calls import CALLS, EXPERIMENT, LISTINGS, Place
from quality_monitoring.fake_workspace import FakeWorkspace
from samples import ROOT, SECTIONS, run_as_reader

from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.servers.receivers import OtlpReceiver

FOLDER = ROOT / "chapter8_samples"
HERE = Place("chapter8_samples")
RECORDED = ["8.1", "8.2", "8.3", "8.4", "8.5", "8.7", "8.8", "8.10", "8.12", "8.13"]
ASKING_A_MODEL = ["8.9", "8.11"]
EXPORTED = ["8.14", "8.15", "8.16"]


@pytest.fixture
def store(tracking_uri: str) -> str:
    mlflow.set_experiment(EXPERIMENT)
    return tracking_uri


def names() -> list[str]:
    """保存されたトレースの名前。"""
    mlflow.flush_trace_async_logging()
    found: Any = mlflow.search_traces(return_type="list")
    return [trace.info.tags["mlflow.traceName"] for trace in found]


def test_readme_names_the_same_files_and_functions() -> None:
    row = r"^\| (8\.\d+) \| [^|]+ \| ([^|]+) \| \[[^]]+\]\((?:\d\d_)?([^)]+)\) \|$"
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    found = {
        number: " ".join([path, *re.findall(r"`(\w+)`", names)])
        for number, names, path in re.findall(row, text, re.MULTILINE)
    }
    assert found == LISTINGS


def test_every_listing_is_called() -> None:
    called = [*RECORDED, *ASKING_A_MODEL, *EXPORTED, "8.6", "8.17"]
    assert sorted(called) == sorted(LISTINGS)
    for path in {value.split()[0] for value in LISTINGS.values()}:
        section, _, name = path.partition("/")
        page, part = FOLDER / SECTIONS[section] / name, FOLDER / path
        assert page.is_file() or part.is_file(), path


@pytest.mark.parametrize("number", RECORDED)
def test_listing(number: str, store: str) -> None:
    CALLS[number](HERE)


@pytest.mark.parametrize("number", ASKING_A_MODEL)
def test_listing_that_asks_a_model(number: str, store: str, stub_llm: StubLlm) -> None:
    CALLS[number](HERE)


@pytest.mark.slow  # 既定の段では、コピーしたものを test_copying.py が SIGTERM で止める
@pytest.mark.skipif(sys.platform == "win32", reason="only on POSIX: SIGTERM")
def test_listing_that_ends_with_sigterm(store: str, tmp_path: Path) -> None:
    """8.6。プロセスが終わるので、別のプロセスで。"""
    run = run_as_reader(
        [listing_calls.__file__, ROOT, "chapter8_samples", "8.6"],
        tmp_path,
        environment={"MLFLOW_TRACKING_URI": store},
    )
    assert run.returncode == -signal.SIGTERM, run.stdout + run.stderr
    assert names() == ["stopped"] * 20


def test_listings_exported_over_otlp(store: str, otlp: OtlpReceiver) -> None:
    """8.14 は OTLP だけ、8.15 は両方、8.16 は Databricks(の代わり)と両方に、同じ ID で届く。"""
    os.environ["CHAPTER8_OTLP"] = otlp.grpc_endpoint
    with FakeWorkspace() as workspace:
        os.environ["CHAPTER8_WORKSPACE"] = workspace.url
        ids = {number: str(CALLS[number](HERE)) for number in EXPORTED}
    check_exported(ids, otlp, workspace)
    assert names() == ["answer-8.15"]


def check_exported(ids: dict[str, str], otlp: OtlpReceiver, workspace: FakeWorkspace) -> None:
    """受信側に届いたものと、Databricks の代わりに届いたもの。"""
    spans = {span.name: span for span in otlp.wait_for(spans=len(ids))}
    for number, trace_id in ids.items():
        span = spans[f"answer-{number}"]
        assert span.trace_id == trace_id
        wanted = {"service.name": "qa-agent", "deployment.environment.name": "production"}
        assert wanted.items() <= span.resource.items()
    (started,) = [call for call in workspace.calls if call.path == "/api/3.0/mlflow/traces"]
    assert started.body["trace"]["trace_info"]["trace_id"] == f"tr-{ids['8.16']}"
    assert started.token == "Bearer dapi-local"


def test_listing_of_the_collector(store: str, otlp: OtlpReceiver) -> None:
    """8.17。受信先は既定の送り先と同じ。本物の Collector は test_collector_run.py が動かす。"""
    from chapter8_samples.opentelemetry import (
        disable_otlp_export,
        flush_all,
        setup_otlp_via_collector,
    )

    section, _, name = LISTINGS["8.17"].partition("/")
    text = (FOLDER / SECTIONS[section] / name).read_text(encoding="utf-8")
    assert listing_calls.collector_problems(yaml.safe_load(text)) == []
    setup_otlp_via_collector("qa-agent", otlp.grpc_endpoint)
    try:
        mlflow.trace(lambda: "ok", name="answer")()
        assert flush_all(20).complete
        (span,) = otlp.wait_for(spans=1)
    finally:
        disable_otlp_export(timeout_seconds=1)
    assert span.resource["deployment.environment.name"] == "production"
