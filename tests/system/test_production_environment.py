"""requirements-prod.txt だけの環境(mlflow 本体なし)で、本番に置くサンプルが動くこと。

ページをそのまま実行し、アプリへ写した関数(test_copying.py と同じ写し方)をリストの引数で呼ぶ。
"""

from __future__ import annotations

import re
import signal
import subprocess
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlflow
import pytest
from listing_calls import LISTINGS
from quality_monitoring.fake_workspace import FakeWorkspace
from reader_environment import binaries, new_environment, site_packages
from samples import ROOT, SAMPLES, SECTIONS, run_as_reader
from test_copying import called_in, make_app, stopped_traces
from test_listings import check_exported

from chapter8_samples._lab.llm.server import StubLlm
from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.cost_tracking.cost_calculator import CostCalculator

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]
COST = "mlflow.llm.cost"
# mlflow 本体(レジストリやジャッジ)が要るページは、本番のアプリには置かない
WITH_MLFLOW = {"scorer_setup", "scorer_lifecycle", "backfill_scorers", "alert_config", "rollback"}
# リスト -> mlflow 本体がないときの例外が名指すもの(mlflow-tracing にない API、または入れるもの)
NEED_MLFLOW = {
    "8.11": r"No module named 'mlflow\.genai'|cannot import name 'MlflowClient' from 'mlflow'",
    "8.12": r"No module named 'mlflow\.genai'|cannot import name 'MlflowClient' from 'mlflow'",
    "8.13": r"mlflow-tracing does not have; pip install 'mlflow>=3'",
}
# LLM の SDK と Web フレームワークはアプリ自身の依存なので、それを使うものは足した環境で動かす
APP_DEPENDENCIES = ["openai>=3,<4", "fastapi>=0.115,<1", "uvicorn>=0.30,<1", "flask", "httpx<1"]
NEED_APP_DEPENDENCIES = {"production_tracing", "cost_tracking"}


@pytest.fixture(scope="module")
def production_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """requirements-prod.txt だけを入れた仮想環境の Python。"""
    directory = tmp_path_factory.mktemp("production")
    venv.create(directory, with_pip=True)
    python = binaries(directory) / "python"
    install(python, "-r", ROOT / "requirements-prod.txt")
    return python


@pytest.fixture(scope="module")
def application_python(production_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """その上に、アプリ自身の依存を重ねた仮想環境の Python。"""
    directory = tmp_path_factory.mktemp("application")
    libraries = directory / "libraries"
    install(production_python, "--target", libraries, *APP_DEPENDENCIES)
    python = new_environment(directory / "venv")
    below = site_packages(production_python.parents[1])
    (site_packages(directory / "venv") / "libraries.pth").write_text(
        f"{below}\n{libraries}\n", encoding="utf-8"
    )
    return python


def install(python: Path, *arguments: str | Path) -> None:
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    if run.returncode:
        pytest.skip(f"needs a package index for requirements-prod.txt: {run.stderr[-300:]}")


def test_full_mlflow_is_absent(
    production_python: Path, application_python: Path, tmp_path: Path
) -> None:
    code = "import mlflow; print(hasattr(mlflow, 'MlflowClient'), hasattr(mlflow, 'genai'))"
    for python in (production_python, application_python):
        run = run_as_reader(["-c", code], tmp_path, python=python)
        assert run.stdout.split() == ["False", "False"], run.stderr


def test_pages_run_against_a_server(
    production_python: Path,
    application_python: Path,
    mlflow_server_url: str,
    stub_llm: StubLlm,
    tmp_path: Path,
) -> None:
    settings = {"MLFLOW_TRACKING_URI": mlflow_server_url, "PYTHONPATH": str(ROOT)}
    llm = {"OPENAI_BASE_URL": stub_llm.base_url, "OPENAI_API_KEY": "sk-local-stub"}
    pages = [page for page in SAMPLES if page.stem not in WITH_MLFLOW]

    def run(page: Path) -> subprocess.CompletedProcess[str]:
        own = page.stem == "token_tracking"  # openai SDK を使う
        directory = tmp_path / page.stem
        directory.mkdir()
        return run_as_reader(
            [page],
            directory,
            python=application_python if own else production_python,
            environment=settings | (llm if own else {}),
        )

    with ThreadPoolExecutor(2) as pool:
        for page, done in zip(pages, pool.map(run, pages), strict=True):
            assert done.returncode == 0, f"{page.name}: {done.stdout}{done.stderr}"
            assert done.stdout.strip(), page.name


def test_every_listing_works_after_copying(
    production_python: Path,
    application_python: Path,
    mlflow_server_url: str,
    stub_llm: StubLlm,
    otlp: OtlpReceiver,
    tmp_path: Path,
) -> None:
    """写した先にあるのは、写した節と requirements-prod.txt(と、アプリ自身の依存)だけ。"""
    environment = {
        "MLFLOW_TRACKING_URI": mlflow_server_url,
        "OPENAI_BASE_URL": stub_llm.base_url,
        "OPENAI_API_KEY": "sk-local-stub",
        "CHAPTER8_OTLP": otlp.grpc_endpoint,
    }
    outcomes = {}
    with FakeWorkspace() as workspace:
        environment["CHAPTER8_WORKSPACE"] = workspace.url
        for section in SECTIONS:
            own = section in NEED_APP_DEPENDENCIES
            python = application_python if own else production_python
            found, run = called_in(make_app(section, tmp_path), section, environment, python)
            ends = -signal.SIGTERM if section == "production_tracing" else 0
            assert run.returncode == ends, run.stderr
            outcomes |= found
    assert {*outcomes, "8.17"} == set(LISTINGS)
    failed = {number: outcome for number, outcome in outcomes.items() if "error" in outcome}
    assert set(failed) == set(NEED_MLFLOW), [one["traceback"] for one in failed.values()]
    for number, words in NEED_MLFLOW.items():
        assert re.search(words, str(failed[number]["error"])), failed[number]["traceback"]
    assert stopped_traces(mlflow_server_url) == 20
    exported = {number: str(outcomes[number]["result"]) for number in ("8.14", "8.15", "8.16")}
    check_exported(exported, otlp, workspace)


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
