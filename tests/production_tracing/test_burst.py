"""burst の設定: 本物のサーバーへの 2,000 件のバーストを 1 件も失わない。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest

from chapter8_samples._lab.servers.mlflow_server import MlflowServer

BURST = 2_000


@pytest.mark.slow
def test_burst_of_2000_on_a_server_loses_nothing(program: Any, tmp_path: Path) -> None:
    body = (
        "from chapter8_samples.production_tracing.basic_setup import setup_production_tracing\n"
        "status = setup_production_tracing('burst')\nassert status.ready, status\n"
        f"for number in range({BURST}): work(number)\n"
        "print(flush_traces(200))\n"
    )
    with MlflowServer(tmp_path / "server") as server:
        program.uri = server.url
        code, out, err = program.run(body, timeout=240)
        assert code == 0 and "ok=True" in out, err
        mlflow.set_tracking_uri(server.url)
        experiment = mlflow.get_experiment_by_name("burst")
        assert experiment is not None
        found: Any = mlflow.search_traces(
            locations=[experiment.experiment_id],
            return_type="list",
            include_spans=False,
            max_results=BURST + 1,
        )
        assert len({trace.info.trace_id for trace in found}) == BURST
        assert {str(trace.info.state) for trace in found} == {"OK"}
