"""本書のリスト 8.1 から 8.17 を、対応する関数に本書と同じ引数を渡して動かす。

リストと関数の対応は ``LISTINGS`` だけに書く。chapter8_samples/README.md の表は、これと一致する。
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
from importlib import import_module
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml
from quality_monitoring.fake_workspace import FakeWorkspace
from samples import ROOT, SECTIONS, run_as_reader

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples._lab.llm.server import StubLlm

EXPERIMENT = "/production/my-llm-app"
FOLDER = ROOT / "chapter8_samples"
# リスト -> "ファイル 名前 ..."
LISTINGS = {
    "8.1": "production_tracing/spans.py traced_step",
    "8.2": "production_tracing/spans.py traced_step",
    "8.3": "production_tracing/spans.py record_error",
    "8.4": "production_tracing/basic_setup.py setup_production_tracing",
    "8.5": "production_tracing/metadata_tagging.py RequestContextMiddleware init_flask",
    "8.6": "production_tracing/graceful_shutdown.py setup_graceful_shutdown",
    "8.7": "production_tracing/metadata_tagging.py add_trace_metadata",
    "8.8": "production_tracing/metadata_tagging.py find_traces",
    "8.9": "cost_tracking/token_tracking.py setup_token_tracking",
    "8.10": "quality_monitoring/feedback_collection.py log_thumbs_feedback",
    "8.11": "quality_monitoring/scoring/cycle.py run_scoring_cycle",
    "8.12": "quality_monitoring/scorer_setup.py setup_quality_scorers",
    "8.13": "alerting/rollback.py quick_rollback",
    "8.14": "opentelemetry/otlp_setup.py setup_otlp_export",
    "8.15": "opentelemetry/otlp_setup.py setup_otlp_export",
    "8.16": "opentelemetry/otlp_setup.py setup_otlp_export",
    "8.17": "opentelemetry/otel-collector-config.yaml",
}
STOPPED_BY_SIGTERM = """
import os, signal, sys, mlflow
from {module} import {name}
mlflow.set_tracking_uri(sys.argv[1])
mlflow.set_experiment("/production/my-llm-app")
{name}(timeout_seconds=30)
answer = mlflow.trace(lambda number: number, name="answer")
[answer(number) for number in range(20)]
os.kill(os.getpid(), signal.SIGTERM)
"""


def functions(number: str) -> list[Any]:
    """リストの番号に対応する関数(8.5 だけ 2 つ)。"""
    path, *names = LISTINGS[number].split()
    module = import_module(f"chapter8_samples.{path.removesuffix('.py').replace('/', '.')}")
    return [getattr(module, name) for name in names]


def traces() -> list[Any]:
    """保存されたトレース(新しい順)。"""
    mlflow.flush_trace_async_logging()
    return list(mlflow.search_traces(return_type="list"))


@pytest.fixture(scope="module")
def _database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """本書のエクスペリメントだけがある SQLite。表を作るのに時間がかかるので、写して使う。"""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").create_experiment(EXPERIMENT)
    return path


@pytest.fixture
def store(_database: Path, tracking_uri: str, tmp_path: Path) -> str:
    shutil.copy(_database, tmp_path / "mlflow.db")
    mlflow.set_experiment(EXPERIMENT)
    return tracking_uri


@pytest.fixture
def exporting(otlp: OtlpReceiver) -> Any:
    """受信側。終わったら OTLP の送信をやめる。"""
    from chapter8_samples.opentelemetry import disable_otlp_export

    yield otlp
    disable_otlp_export(timeout_seconds=1)


def test_readme_names_the_same_files_and_functions() -> None:
    row = r"^\| (8\.\d+) \| [^|]+ \| ([^|]+) \| \[[^]]+\]\((?:\d\d_)?([^)]+)\) \|$"
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    found = {
        number: " ".join([path, *re.findall(r"`(\w+)`", names)])
        for number, names, path in re.findall(row, text, re.MULTILINE)
    }
    assert found == LISTINGS


def test_every_listing_is_called() -> None:
    tests = {name for name in globals() if name.startswith("test_listing_")}
    assert tests == {f"test_listing_{number.replace('.', '_')}" for number in LISTINGS}
    for path in {value.split()[0] for value in LISTINGS.values()}:
        section, _, name = path.partition("/")
        assert (FOLDER / SECTIONS[section] / name).is_file()


def test_listing_8_1(store: str) -> None:
    (traced_step,) = functions("8.1")
    with traced_step("retrieve_context", span_type="RETRIEVER", inputs={"query": "返品"}) as span:
        span.set_outputs(["規約 3 条"])
    (stored,) = traces()[0].data.spans
    assert (stored.name, stored.span_type) == ("retrieve_context", "RETRIEVER")
    assert (stored.inputs, stored.outputs) == ({"query": "返品"}, ["規約 3 条"])


def test_listing_8_2(store: str) -> None:
    (traced_step,) = functions("8.2")
    given = {"retriever.num_documents": 2, "retriever.similarity_threshold": 0.7}
    with traced_step("retrieve_context", attributes=given):
        pass
    stored = traces()[0].data.spans[0].attributes
    assert {key: stored[key] for key in given} == given


def test_listing_8_3(store: str) -> None:
    (record_error,) = functions("8.3")
    with contextlib.suppress(TimeoutError), mlflow.start_span("call_llm") as span:
        try:
            raise TimeoutError("no answer in 30 s")
        except TimeoutError as error:
            record_error(span, error, attempt=3)
            raise
    (trace,) = traces()
    stored = trace.data.spans[0].attributes
    assert trace.info.state == "ERROR"
    assert (stored["error.type"], stored["error.attempt"]) == ("TimeoutError", 3)
    assert stored["error.retryable"] is True


def test_listing_8_4(tracking_uri: str) -> None:
    (setup,) = functions("8.4")
    status = setup(experiment_name=EXPERIMENT, service_name="my-llm-app", enable_async=True)
    assert (status.ready, status.experiment_name) == (True, EXPERIMENT)
    mlflow.trace(lambda: "ok", name="answer")()
    (trace,) = traces()
    assert trace.info.experiment_id == status.experiment_id


def test_listing_8_5(store: str) -> None:
    middleware, init_flask = functions("8.5")
    answer = mlflow.trace(lambda: "ok", name="chat")
    headers = {"X-User-Id": "user-123", "X-Session-Id": "session-456"}
    for client in (fastapi_client(middleware, answer), flask_client(init_flask, answer)):
        assert client.get("/chat", headers=headers).status_code == 200
    found = [trace.info.trace_metadata for trace in traces()]
    assert [info["mlflow.trace.user"] for info in found] == ["user-123"] * 2
    assert [info["mlflow.trace.session"] for info in found] == ["session-456"] * 2


def fastapi_client(middleware: Any, answer: Any) -> Any:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()
    app.add_middleware(middleware)
    app.get("/chat")(lambda: answer())
    return TestClient(app)


def flask_client(init_flask: Any, answer: Any) -> Any:
    from flask import Flask

    app = Flask("listing")
    init_flask(app)
    app.get("/chat")(lambda: answer())
    return app.test_client()


def test_listing_8_6(store: str, tmp_path: Path) -> None:
    (setup,) = functions("8.6")
    code = STOPPED_BY_SIGTERM.format(module=setup.__module__, name=setup.__name__)
    code = code.replace("chapter8_samples.01_", "chapter8_samples.")
    run = run_as_reader(["-c", code, store], tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert run.returncode == -signal.SIGTERM, run.stderr
    assert len(traces()) == 20


def record_requests() -> None:
    """本書と同じユーザー・会話・環境のトレースと、別のユーザーのトレース。"""
    from chapter8_samples.production_tracing import RequestContext

    (add_trace_metadata,) = functions("8.7")
    for user, session in (("user-123", "session-456"), ("user-999", "session-000")):
        with mlflow.start_span("handle_chat_request"):
            context = RequestContext(
                user_id=user,
                session_id=session,
                environment="production",
                service_version="1.2.0",
                region="ap-northeast-1",
            )
            assert add_trace_metadata(context)
    mlflow.flush_trace_async_logging()


def test_listing_8_7(store: str) -> None:
    record_requests()
    infos = {trace.info.trace_metadata["mlflow.trace.user"]: trace.info for trace in traces()}
    assert set(infos) == {"user-123", "user-999"}
    info = infos["user-123"]
    assert info.trace_metadata["mlflow.trace.session"] == "session-456"
    wanted = {"environment": "production", "deployment.region": "ap-northeast-1"}
    assert wanted.items() <= info.tags.items()


def test_listing_8_8(store: str) -> None:
    (find_traces,) = functions("8.8")
    record_requests()
    for condition in ({"user": "user-123"}, {"session": "session-456"}):
        (found,) = find_traces(**condition)
        assert found.info.trace_metadata["mlflow.trace.user"] == "user-123"
    region = {"deployment.region": "ap-northeast-1"}
    assert len(find_traces(environment="production", status="OK", tags=region)) == 2
    assert find_traces(environment="production", status="ERROR") == []


def test_listing_8_9(store: str, stub_llm: StubLlm) -> None:
    import openai

    (setup_token_tracking,) = functions("8.9")
    setup_token_tracking(["openai"])
    question = [{"role": "user", "content": "MLflow Tracing とは何ですか"}]
    try:
        openai.OpenAI().chat.completions.create(model="gpt-4o-mini", messages=question)  # type: ignore[arg-type]
    finally:
        mlflow.openai.autolog(disable=True)
    (trace,) = traces()
    assert trace.info.token_usage["total_tokens"] > 0
    assert trace.info.cost["total_cost"] > 0


def test_listing_8_10(store: str) -> None:
    (log_thumbs_feedback,) = functions("8.10")
    mlflow.trace(lambda: "30 日以内です", name="answer")()
    trace_id = mlflow.get_last_active_trace_id()
    log_thumbs_feedback(trace_id, True, "user-123", comment="役に立った")
    (found,) = traces()[0].info.assessments
    assert (found.feedback.value, found.source.source_id) == (True, "user-123")
    assert found.rationale == "役に立った"


def test_listing_8_11(store: str, stub_llm: StubLlm) -> None:
    from mlflow.genai.scorers import Guidelines, RelevanceToQuery, Safety

    from chapter8_samples.quality_monitoring.scoring.plan import ScoringTarget

    (run_scoring_cycle,) = functions("8.11")
    for environment in ("production", "staging"):
        with mlflow.start_span("answer") as span:
            mlflow.update_current_trace(tags={"environment": environment})
            span.set_inputs({"question": "返品の期限は?"})
            span.set_outputs("購入から 30 日以内に承ります。")
    model = "openai:/gpt-4.1-mini"
    tone = Guidelines(name="professional_tone", guidelines="回答は丁寧である", model=model)
    judges = [RelevanceToQuery(model=model), Safety(model=model), tone]
    where = "tags.environment = 'production'"
    targets = [ScoringTarget(scorer=judge, filter_string=where) for judge in judges]
    report = run_scoring_cycle(EXPERIMENT, targets)
    assert (report.scored, report.failed) == (3, 0)
    names = {t.info.tags["environment"]: {a.name for a in t.info.assessments} for t in traces()}
    assert names == {"production": {judge.name for judge in judges}, "staging": set()}


def test_listing_8_12(store: str) -> None:
    (setup_quality_scorers,) = functions("8.12")
    setup_quality_scorers(
        experiment_name=EXPERIMENT, safety_sample_rate=1.0, quality_sample_rate=0.5
    )
    from chapter8_samples.quality_monitoring import list_scorer_statuses

    rates = {status.name: status.sample_rate for status in list_scorer_statuses(EXPERIMENT)}
    assert rates == {"safety_check": 1.0, "relevance_check": 0.5, "groundedness_check": 0.5}


def test_listing_8_13(store: str) -> None:
    (quick_rollback,) = functions("8.13")
    client = mlflow.MlflowClient()
    client.create_registered_model("qa-agent")
    for version in (1, 2):
        assert client.create_model_version("qa-agent", "file:///models/qa").version == version
    client.set_registered_model_alias("qa-agent", "champion", "2")
    change = quick_rollback("qa-agent", target_version="1", alias="champion")
    assert (change.from_version, change.to_version, change.state) == ("2", "1", "done")
    assert client.get_model_version_by_alias("qa-agent", "champion").version == 1


def exported_span(otlp: OtlpReceiver) -> Any:
    """1 件のトレースを送り、届いたスパンを返す。"""
    from chapter8_samples.opentelemetry import flush_all

    mlflow.trace(lambda: "ok", name="answer")()
    assert flush_all(20).complete
    (span,) = otlp.wait_for(spans=1)
    return span


def sent_over_otlp(otlp: OtlpReceiver, number: str, **options: Any) -> str:
    """1 件のトレースを送り、届いたスパンのトレース ID を返す。"""
    (setup_otlp_export,) = functions(number)
    setup_otlp_export(
        otlp.grpc_endpoint,
        "qa-agent",
        service_version="1.0.0",
        deployment_environment="production",
        **options,
    )
    span = exported_span(otlp)
    wanted = {"service.name": "qa-agent", "deployment.environment.name": "production"}
    assert wanted.items() <= span.resource.items()
    return str(span.trace_id)


def test_listing_8_14(store: str, exporting: OtlpReceiver) -> None:
    sent_over_otlp(exporting, "8.14", mode="otlp_only")
    assert traces() == []


def test_listing_8_15(store: str, exporting: OtlpReceiver) -> None:
    trace_id = sent_over_otlp(exporting, "8.15")
    assert [trace.info.trace_id for trace in traces()] == [f"tr-{trace_id}"]


def test_listing_8_16(exporting: OtlpReceiver) -> None:
    """Databricks の代わりに、届いたものを記録する手元のワークスペースへ向ける。"""
    with FakeWorkspace() as workspace:
        os.environ.update(DATABRICKS_HOST=workspace.url, DATABRICKS_TOKEN="dapi-local")
        mlflow.set_tracking_uri("databricks")
        mlflow.set_experiment(EXPERIMENT)
        trace_id = sent_over_otlp(exporting, "8.16")
    (started,) = [call for call in workspace.calls if call.path == "/api/3.0/mlflow/traces"]
    assert started.body["trace"]["trace_info"]["trace_id"] == f"tr-{trace_id}"
    assert started.token == "Bearer dapi-local"


def test_listing_8_17(store: str, exporting: OtlpReceiver) -> None:
    """設定の受信先は、既定の送り先と同じ。本物の Collector は test_collector_run.py が動かす。"""
    from chapter8_samples.opentelemetry import setup_otlp_via_collector

    section, _, name = LISTINGS["8.17"].partition("/")
    config = yaml.safe_load((FOLDER / SECTIONS[section] / name).read_text(encoding="utf-8"))
    endpoint = config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    assert "4317" in endpoint
    setup_otlp_via_collector("qa-agent", exporting.grpc_endpoint)
    span = exported_span(exporting)
    assert span.resource["deployment.environment.name"] == "production"
