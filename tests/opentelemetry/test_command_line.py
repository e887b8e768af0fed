"""8.5 のコマンド: 届いたことを、終了コードと理由で答える。"""

from __future__ import annotations

import os
from pathlib import Path

import mlflow
import pytest
from ports import free_port
from samples import ROOT, run_as_reader

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import otlp_status
from chapter8_samples.opentelemetry.__main__ import main

Output = pytest.CaptureFixture[str]


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_check_sends_one_span_and_says_ok(
    otlp: OtlpReceiver, capsys: Output, protocol: str
) -> None:
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    assert main(["check", "--endpoint", endpoint, "--protocol", protocol]) == 0
    assert capsys.readouterr().out.startswith(f"ok: {endpoint}")
    assert [span.name for span in otlp.spans] == ["otlp.connection_check"]


def test_check_names_the_reason_and_fails(capsys: Output) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    assert main(["check", "--endpoint", endpoint]) == 1
    assert capsys.readouterr().out.startswith(f"refused: {endpoint}")


def test_check_of_a_preset_sends_its_key_and_shows_it_nowhere(
    otlp: OtlpReceiver, capsys: Output
) -> None:
    os.environ["HONEYCOMB_API_URL"] = otlp.http_endpoint.removesuffix("/v1/traces")
    os.environ["HONEYCOMB_API_KEY"] = "s3cret-key"
    assert main(["check", "--preset", "honeycomb"]) == 0
    assert otlp.requests[0].headers["x-honeycomb-team"] == "s3cret-key"
    otlp.fail_next(1, 401)
    assert main(["check", "--preset", "honeycomb"]) == 1
    shown = capsys.readouterr()
    assert [line.split(":")[0] for line in shown.out.splitlines()] == ["ok", "unauthorized"]
    assert "s3cret-key" not in shown.out + shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--endpoint", "collector:4317"], "has no scheme"),
        (["check", "--endpoint", "http://c:4317", "--preset", "collector"], "not allowed with"),
        (["check"], "one of the arguments --endpoint --preset is required"),
        (["check", "--preset", "datadog", "--protocol", "grpc"], "only, not 'grpc'"),
        (["check", "--preset", "honeycomb"], "HONEYCOMB_API_KEY"),
        (["send", "--preset", "dataduck"], "choose from"),
        ([], "required: COMMAND"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    arguments: list[str], message: str, capsys: Output
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_send_leaves_the_traces_in_mlflow_too_where_one_is_set(
    tracking_uri: str, otlp: OtlpReceiver, capsys: Output
) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = tracking_uri
    assert main(["send", "--endpoint", otlp.grpc_endpoint]) == 0
    assert "OTLP に届いたスパン 6、失われたスパン 0" in capsys.readouterr().out
    stored = mlflow.search_traces(locations=["0"], return_type="list")
    sent = {f"tr-{span.trace_id}" for span in otlp.spans}
    assert {trace.info.trace_id for trace in stored} == sent and len(otlp.spans) == 6
    assert otlp_status().mode == "off"


def test_send_tells_that_spans_were_lost(otlp: OtlpReceiver, capsys: Output) -> None:
    otlp.fail_next(9, 401)
    assert main(["send", "--endpoint", otlp.grpc_endpoint]) == 1
    out = capsys.readouterr().out
    assert out.startswith("送信(otlp_only): OtelSpanProcessor\n")
    assert "OTLP に届いたスパン 0、失われたスパン 6" in out


@pytest.mark.slow
def test_send_of_a_reader_needs_no_mlflow_and_leaves_no_file(
    otlp: OtlpReceiver, tmp_path: Path
) -> None:
    command = ["-m", "chapter8_samples.opentelemetry", "send", "--endpoint", otlp.grpc_endpoint]
    offline = {"PYTHONPATH": str(ROOT), "MLFLOW_MODEL_CATALOG_URI": ""}
    run = run_as_reader(command, tmp_path, environment=offline)
    assert run.returncode == 0, run.stderr
    assert "OTLP に届いたスパン 6、失われたスパン 0" in run.stdout
    assert len(otlp.spans) == 6
    assert list(tmp_path.iterdir()) == []
