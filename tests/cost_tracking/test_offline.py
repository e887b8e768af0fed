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
from chapter8_samples.cost_tracking import (
    CostCalculator,
    CostTracker,
    aggregate_token_usage_from_traces,
    price_trace,
    setup_cost_tracking,
)
from chapter8_samples.cost_tracking.__main__ import main as command

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
assert command(["sql", "offline"]) == 0
assert command(["export", "offline", "archive"]) == 0
Path("prices.json").write_text('{"models": {"my-model": {"input": 1, "output": 2}}}')
assert CostCalculator(pricing_file="prices.json").calculate("my-model", 10**6, 0) == 1
assert (costs.priced, costs.unpriced) == (2, 1)
assert not attempts, attempts
print("no connection")
"""


@pytest.mark.slow
def test_no_connection_is_attempted(tmp_path: Path) -> None:
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


PRICES = """
import sys, time
sys.path.insert(0, sys.argv[1])
began = time.process_time()
from chapter8_samples.cost_tracking import CostCalculator
seconds = time.process_time() - began
from chapter8_samples.cost_tracking import CostTracker, PriceTable
assert CostCalculator().calculate("gpt-4o", 1000, 500) == 0.0075
assert CostTracker().record("my-model", 1, 1).priced is False
assert not {"mlflow", "pydantic", "yaml"} & set(sys.modules)
print(seconds)
"""


def seconds_to_import() -> float:
    """入れたパッケージが 1 つも見えない(-S)プロセスで、料金の計算を import する CPU 時間。"""
    command = [sys.executable, "-I", "-S", "-c", PRICES, str(ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


def test_prices_need_nothing_but_the_standard_library() -> None:
    assert seconds_to_import() > 0


@pytest.mark.slow
def test_prices_are_imported_in_50_milliseconds() -> None:
    """混んだ機械では CPU 時間も延びるので、いちばん速かった回で見る。"""
    assert any(seconds_to_import() <= 0.05 for _ in range(50))
