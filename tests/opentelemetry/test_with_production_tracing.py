"""8.1 のテールサンプリングと停止処理を、OTLP と一緒に使う。"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from ports import free_port

from chapter8_samples._lab.servers.mlflow_server import MlflowServer
from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import (
    flush_all,
    otlp_status,
    setup_otlp_export,
)
from chapter8_samples.production_tracing.basic_setup import (
    reset_production_tracing,
    setup_production_tracing,
    tracing_status,
)
from chapter8_samples.production_tracing.sampling_strategies import ConditionalSampler
from chapter8_samples.production_tracing.spans import TIME_TO_FIRST_CHUNK, traced_stream

from .conftest import wait_until


@pytest.mark.slow
@pytest.mark.parametrize("otlp_first", [True, False])
@pytest.mark.parametrize("mode", ["dual", "otlp_only"])
def test_sampled_out_traces_never_leave_and_kept_ones_carry_their_weight(
    tracking_uri: str, otlp: OtlpReceiver, otlp_first: bool, mode: Any
) -> None:
    mlflow.set_experiment("sampled")
    sampler = ConditionalSampler(0.5)
    try:
        if otlp_first:
            setup_otlp_export(otlp.grpc_endpoint, "bot", mode=mode)
        sampler.install()
        if not otlp_first:
            setup_otlp_export(otlp.grpc_endpoint, "bot", mode=mode)
        for number in range(30):
            with mlflow.start_span("root"):
                mlflow.update_current_trace(tags={"release": "v1"})
                with mlflow.start_span("child") as child:
                    if number < 5:
                        child.set_status("ERROR")
        report, kept = flush_all(), sampler.kept
    finally:
        sampler.uninstall()
    assert 5 < kept < 30
    assert report.accepted == report.delivered == len(otlp.spans) == 2 * kept
    roots = [span for span in otlp.spans if not span.parent_span_id]
    weights = sorted({span.attributes["sampling.weight"] for span in roots})
    assert len(roots) == kept and weights == [1.0, 2.0]
    assert otlp_status().warnings == ()


@pytest.mark.slow
@pytest.mark.parametrize("genai", [False, True])
@pytest.mark.parametrize("mode", ["dual", "otlp_only"])
def test_time_to_first_chunk_is_exported_as_a_number_of_seconds(
    tracking_uri: str, otlp: OtlpReceiver, mode: Any, genai: bool
) -> None:
    mlflow.set_experiment("streamed")
    setup_otlp_export(otlp.grpc_endpoint, "bot", mode=mode, genai_semconv=genai)
    list(traced_stream("answer", ["a", "b"]))
    flush_all()
    (span,) = otlp.spans
    assert 0 <= span.attributes[TIME_TO_FIRST_CHUNK] < 1


@pytest.mark.slow
def test_an_app_that_starts_before_its_mlflow_server_exports_to_both_later(
    otlp: OtlpReceiver, tmp_path: Path
) -> None:
    port = free_port()
    os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{port}"
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    assert not setup_production_tracing("late", retry_seconds=0.2, probe_timeout_seconds=1).ready
    with mlflow.start_span("while tracing is off"):
        pass
    with MlflowServer(tmp_path, port=port):
        wait_until(lambda: (status := tracing_status()) and status.ready, 30)
        with mlflow.start_span("both") as span:
            pass
        assert flush_all().complete
        assert [f"tr-{sent.trace_id}" for sent in otlp.spans] == [span.trace_id]
        assert mlflow.get_trace(span.trace_id) is not None
        assert otlp_status().warnings == ()
        reset_production_tracing()


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_sigterm_with_the_shutdown_handler_loses_nothing(
    tracking_uri: str, otlp: OtlpReceiver, protocol: str
) -> None:
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    program = f"""
import time, mlflow
from chapter8_samples.production_tracing.graceful_shutdown import setup_graceful_shutdown
from chapter8_samples.opentelemetry import setup_otlp_export
mlflow.set_tracking_uri({tracking_uri!r})
mlflow.set_experiment("term")
setup_otlp_export({endpoint!r}, "bot", {protocol!r})
setup_graceful_shutdown()
for n in range(50):
    with mlflow.start_span(f"s{{n}}"): pass
print("ready", flush=True)
for _ in range(600):  # 1 回の長い sleep だと、その直前に届いたシグナルの処理が sleep の後になる
    time.sleep(0.1)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.wait(30)
    found = mlflow.get_experiment_by_name("term")
    assert found is not None
    traces: Any = mlflow.search_traces(locations=[found.experiment_id], return_type="list")
    assert (len(otlp.spans), len(traces)) == (50, 50)
    assert {f"tr-{s.trace_id}" for s in otlp.spans} == {trace.info.trace_id for trace in traces}
