"""この節のどの部分も、ネットワークに触れない。"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys

attempts = []
# MLflow の利用統計はここでの対象ではない(環境変数で止めてある)
sys.addaudithook(
    lambda event, args: attempts.append((event, args))
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")
    else None
)
from pathlib import Path

import mlflow
from chapter8_samples.cost_tracking.cost_calculator import CostCalculator, CostTracker
from chapter8_samples.cost_tracking.token_tracking import aggregate_token_usage_from_traces
from chapter8_samples.cost_tracking.archive.parquet import export_traces_to_parquet
from chapter8_samples.cost_tracking.usage.span_costs import setup_cost_tracking
from chapter8_samples.cost_tracking.usage.pricing import price_trace
from chapter8_samples.cost_tracking.archive.sql import command

mlflow.set_tracking_uri("sqlite:///offline.db")
mlflow.set_experiment("offline")
costs = setup_cost_tracking(tracker=CostTracker(budget_usd=1))
for model in ("gpt-4o", "claude-3-5-sonnet-20241022", "my-model"):
    with mlflow.start_span("llm", "CHAT_MODEL") as span:
        span.set_attributes({
            "mlflow.llm.model": model,
            "mlflow.llm.provider": "anthropic",
            "mlflow.chat.tokenUsage": {"input_tokens": 9, "output_tokens": 9, "total_tokens": 18},
        })
mlflow.flush_trace_async_logging()
assert price_trace(mlflow.get_trace(span.trace_id)).unpriced_models == ("my-model",)
assert aggregate_token_usage_from_traces("offline").trace_count == 3
assert command(["offline", "--archive", "archive", "--csv", "csv", "--plot", "cost.svg"]) == 0
assert len(list(Path("csv").iterdir())) == len(list(Path().glob("cost-*.svg"))) == 10
Path("prices.yaml").write_text("models: {my-model: {input: 1, output: 2}}", encoding="utf-8")
assert CostCalculator(pricing_file="prices.yaml").calculate("my-model", 10**6, 0) == 1
assert (costs.priced, costs.unpriced) == (2, 1)
assert not attempts, attempts
print("no connection")
"""


def test_no_connection_is_attempted(tmp_path: Path) -> None:
    pytest.importorskip("duckdb", reason="pip install 'chapter8-samples[sql]' で入る")
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("no connection\n")


def test_prices_need_nothing_but_the_standard_library(tmp_path: Path) -> None:
    folder = ROOT / "chapter8_samples" / "02_cost_tracking"
    for name in ("cost_calculator.py", "price_table.py"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    code = (
        "import sys; sys.path.insert(0, '.'); import cost_calculator as c;"
        "print(c.CostCalculator().calculate('gpt-4o', 1000, 500));"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('mlflow', 'pandas', 'yaml')))"
    )
    run = subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.split() == ["0.0075", "[]"], run.stderr
