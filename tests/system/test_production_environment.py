"""requirements-prod.txt だけの環境(mlflow 本体なし)で、本番に置くサンプルが動くこと。"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import mlflow
import pytest
from samples import ROOT, SAMPLES, run_as_reader, sample_id

from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples.cost_tracking.cost_calculator import CostCalculator

pytestmark = pytest.mark.slow
COST = "mlflow.llm.cost"
# mlflow 本体(レジストリやジャッジ)が要るサンプルは、本番のアプリには置かない
PRODUCTION = [
    path
    for path in SAMPLES
    if path.stem not in ("autologging", "unified_provider")
    and (
        path.parent.name[:2] in ("01", "05")
        or path.stem in ("cost_calculator", "price_table", "cost_tracker", "feedback_collection")
        or path.stem in ("feedback_delivery", "notification_handlers", "alert_delivery")
    )
]
# LLM の SDK と Web フレームワークはアプリ自身の依存なので、それを使うものは足した環境で動かす
APP_DEPENDENCIES = ["openai>=3,<4", "fastapi>=0.115,<1", "uvicorn>=0.30,<1"]
WITH_APP_DEPENDENCIES = [
    path
    for path in SAMPLES
    if path.stem in ("autologging", "token_tracking", "trace_costs", "unified_provider")
]


@pytest.fixture(scope="module")
def production_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """requirements-prod.txt だけを入れた仮想環境の Python。"""
    return new_environment(tmp_path_factory.mktemp("production"))


@pytest.fixture(scope="module")
def application_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return new_environment(tmp_path_factory.mktemp("application"), *APP_DEPENDENCIES)


def new_environment(directory: Path, *extra: str) -> Path:
    venv.create(directory, with_pip=True)
    binaries = directory / ("Scripts" if sys.platform == "win32" else "bin")
    command = [
        binaries / "python",
        "-m",
        "pip",
        "install",
        "-q",
        "-r",
        ROOT / "requirements-prod.txt",
        *extra,
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if run.returncode:
        pytest.skip(f"needs a package index for requirements-prod.txt: {run.stderr[-300:]}")
    return binaries / "python"


def test_full_mlflow_is_absent(production_python: Path, tmp_path: Path) -> None:
    code = "import mlflow; print(hasattr(mlflow, 'MlflowClient'), hasattr(mlflow, 'genai'))"
    run = run_as_reader(["-c", code], tmp_path, python=production_python)
    assert run.stdout.split() == ["False", "False"], run.stderr


@pytest.mark.parametrize("path", PRODUCTION, ids=sample_id)
def test_sample_runs_against_a_server(
    path: Path, production_python: Path, mlflow_server_url: str, tmp_path: Path
) -> None:
    settings = {"MLFLOW_TRACKING_URI": mlflow_server_url}
    run = run_as_reader([path], tmp_path, python=production_python, environment=settings)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip()


@pytest.mark.parametrize("path", WITH_APP_DEPENDENCIES, ids=sample_id)
def test_application_sample_runs_against_a_server(
    path: Path,
    application_python: Path,
    mlflow_server_url: str,
    stub_llm: StubLlm,
    tmp_path: Path,
) -> None:
    settings = {
        "MLFLOW_TRACKING_URI": mlflow_server_url,
        "OPENAI_BASE_URL": stub_llm.base_url,
        "OPENAI_API_KEY": "sk-local-stub",
    }
    run = run_as_reader([path], tmp_path, python=application_python, environment=settings)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip()


def test_a_moved_prompt_alias_reaches_the_app_over_rest(
    production_python: Path, mlflow_server_url: str, tmp_path: Path
) -> None:
    """付け替えは mlflow 本体で、読むのは mlflow-tracing だけのアプリで。"""
    import mlflow.genai

    mlflow.set_tracking_uri(mlflow_server_url)
    for text in ("丁寧に: {{question}}", "長々と: {{question}}"):
        mlflow.genai.register_prompt("production-greeting", text)
    code = (
        "from chapter8_samples.alerting import AliasedPrompt\n"
        "prompt = AliasedPrompt('production-greeting')\n"
        "print(prompt.version, prompt.format(question='返品'))"
    )
    settings = {"MLFLOW_TRACKING_URI": mlflow_server_url, "PYTHONPATH": str(ROOT)}
    seen = []
    for version in (2, 1):
        mlflow.genai.set_prompt_alias("production-greeting", "production", version)
        run = run_as_reader(["-c", code], tmp_path, python=production_python, environment=settings)
        seen.append(run.stdout.strip() or run.stderr)
    assert seen == ["2 長々と: 返品", "1 丁寧に: 返品"]


def test_the_app_follows_the_model_alias_without_full_mlflow(
    production_python: Path, mlflow_server_url: str, tmp_path: Path
) -> None:
    client = mlflow.MlflowClient(mlflow_server_url)
    client.create_registered_model("production-ranker")
    for _ in range(2):
        client.create_model_version("production-ranker", source="s3://models/ranker")
    code = (
        "import mlflow\n"
        "from chapter8_samples.alerting import AliasedModel\n"
        "assert not hasattr(mlflow, 'MlflowClient')\n"
        "model = AliasedModel('production-ranker', loader=lambda uri: f'loaded {uri}')\n"
        "print(model.version, model.get().value)"
    )
    settings = {"MLFLOW_TRACKING_URI": mlflow_server_url, "PYTHONPATH": str(ROOT)}
    seen = []
    for version in ("2", "1"):
        client.set_registered_model_alias("production-ranker", "champion", version)
        run = run_as_reader(["-c", code], tmp_path, python=production_python, environment=settings)
        seen.append(run.stdout.strip() or run.stderr)
    assert seen == [f"{v} loaded models:/production-ranker/{v}" for v in (2, 1)]


PRICED = """
import openai
import mlflow
from chapter8_samples.cost_tracking import setup_token_tracking

assert not hasattr(mlflow, "MlflowClient")
mlflow.set_experiment("production-costs")
costs = setup_token_tracking(("openai",)).costs
ask = [{"role": "user", "content": "返品できますか?"}]
with mlflow.start_span("request") as root:
    for model in ("gpt-4o-mini", "gpt-4.1-mini"):
        openai.OpenAI().chat.completions.create(model=model, messages=ask)
mlflow.flush_trace_async_logging()
print(root.trace_id, costs.priced, costs.unpriced, costs.failed)
"""


def test_a_trace_is_priced_without_full_mlflow(
    application_python: Path, mlflow_server_url: str, stub_llm: StubLlm, tmp_path: Path
) -> None:
    """mlflow-tracing だけのアプリが書いたコストを、サーバーに保存されたトレースで確かめる。"""
    settings = {
        "MLFLOW_TRACKING_URI": mlflow_server_url,
        "OPENAI_BASE_URL": stub_llm.base_url,
        "OPENAI_API_KEY": "sk-local-stub",
        "PYTHONPATH": str(ROOT),
    }
    run = run_as_reader(
        ["-c", PRICED], tmp_path, python=application_python, environment=settings, encoding="utf-8"
    )
    assert run.returncode == 0, run.stderr
    trace_id, *counts = run.stdout.split()
    assert counts == ["1", "1", "0"]

    trace = mlflow.get_trace(trace_id)
    assert trace is not None
    priced, unpriced = (span for span in trace.data.spans if span.parent_id)
    usage, cost = (priced.get_attribute(key) for key in ("mlflow.chat.tokenUsage", COST))
    want = CostCalculator().price(
        "gpt-4o-mini-2024-07-18", usage["input_tokens"], usage["output_tokens"]
    )
    assert cost == {
        "input_cost": float(want.prompt_usd),
        "output_cost": float(want.output_usd),
        "total_cost": float(want.total_usd),
    }
    assert priced.get_attribute("cost.status") == "priced"
    assert priced.get_attribute("cost.price_source") == "2024-12/gpt-4o-mini"
    assert unpriced.get_attribute("cost.status") == "unpriced"
    assert trace.info.tags["cost.status"] == "partial"
    assert "gpt-4o-mini-2024-07-18" in trace.info.tags["cost.by_model"]
