"""8.5.3 ``otlp_setup.py --check``: 届いたことを、終了コードと理由で答える。"""

from __future__ import annotations

from pathlib import Path

import pytest
from ports import free_port
from samples import ROOT, run_as_reader

from chapter8_samples._lab.servers.receivers import OtlpReceiver

SETUP = ROOT / "chapter8_samples/05_opentelemetry/otlp_setup.py"


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_check_sends_one_span_and_says_ok(
    otlp: OtlpReceiver, tmp_path: Path, protocol: str
) -> None:
    endpoint = otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint
    arguments = [SETUP, "--check", "--endpoint", endpoint, "--protocol", protocol]
    run = run_as_reader(arguments, tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"ok: {endpoint}")
    assert [span.name for span in otlp.spans] == ["otlp.connection_check"]


def test_check_names_the_reason_and_fails(tmp_path: Path) -> None:
    endpoint = f"http://127.0.0.1:{free_port()}"
    run = run_as_reader([SETUP, "--check", "--endpoint", endpoint], tmp_path)
    assert run.returncode == 1, run.stderr
    assert run.stdout.startswith(f"refused: {endpoint}")


def test_check_of_a_preset_sends_its_key_and_shows_it_nowhere(
    otlp: OtlpReceiver, tmp_path: Path
) -> None:
    root = otlp.http_endpoint.removesuffix("/v1/traces")
    settings = {"HONEYCOMB_API_URL": root, "HONEYCOMB_API_KEY": "s3cret-key"}
    run = run_as_reader([SETUP, "--check", "--preset", "honeycomb"], tmp_path, environment=settings)
    assert run.returncode == 0, run.stderr
    assert otlp.requests[0].headers["x-honeycomb-team"] == "s3cret-key"
    assert "s3cret-key" not in run.stdout + run.stderr
    otlp.fail_next(1, 401)
    run = run_as_reader([SETUP, "--check", "--preset", "honeycomb"], tmp_path, environment=settings)
    assert (run.returncode, run.stdout.split(":")[0]) == (1, "unauthorized")


def test_check_of_a_preset_without_its_key_names_the_variable(tmp_path: Path) -> None:
    run = run_as_reader([SETUP, "--check", "--preset", "honeycomb"], tmp_path)
    assert run.returncode != 0
    assert "HONEYCOMB_API_KEY" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--endpoint", "collector:4317"], "has no scheme"),
        (["--endpoint", "http://c:4317", "--preset", "collector"], "not allowed with"),
        (["--preset", "datadog", "--protocol", "grpc"], "only, not 'grpc'"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    run = run_as_reader([SETUP, *arguments], tmp_path)
    assert run.returncode == 2
    assert message in run.stderr and "Traceback" not in run.stderr


def test_three_requests_go_to_a_real_endpoint(otlp: OtlpReceiver, tmp_path: Path) -> None:
    run = run_as_reader([SETUP, "--endpoint", otlp.grpc_endpoint], tmp_path)
    assert run.returncode == 0, run.stderr
    assert "OTLP に届いたスパン 6、失われたスパン 0" in run.stdout
    assert len(otlp.spans) == 6
