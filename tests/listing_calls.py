"""本書のリスト 8.1 から 8.17 を、本書と同じ引数で呼ぶ。

test_listings.py はこのプロジェクトの関数を、test_copying.py はアプリへ写した関数を呼ぶ。
このファイルは、写した先でも動くように、プロジェクトのものを何も import しない::

    python -I listing_calls.py FOLDER PACKAGE 8.1 8.2 ...   # FOLDER の下の PACKAGE にある関数
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

EXPERIMENT = "/production/my-llm-app"
# リスト -> "ファイル 名前 ..."。chapter8_samples/README.md の表は、これと一致する
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


@dataclass(frozen=True)
class Place:
    """関数のあるところ。"""

    package: str
    alone: frozenset[str] = frozenset()
    """節のフォルダーではなく、``package`` の直下に 1 つだけ写したページ。"""

    def module(self, number: str) -> str:
        """そのリストの関数があるモジュール。"""
        path = LISTINGS[number].split()[0]
        path = Path(path).name if path in self.alone else path
        return f"{self.package}.{path.removesuffix('.py').replace('/', '.')}"

    def functions(self, number: str) -> list[Any]:
        """リストの番号に対応する関数(8.5 だけ 2 つ)。"""
        module = import_module(self.module(number))
        return [getattr(module, name) for name in LISTINGS[number].split()[1:]]

    def public(self, section: str, name: str) -> Any:
        """README が教える名前: ``from パッケージ.節 import 名前``。"""
        return getattr(import_module(f"{self.package}.{section}"), name)


def stored(trace_id: str) -> Any:
    """保存されたトレース。"""
    import mlflow

    mlflow.flush_trace_async_logging()
    trace = mlflow.get_trace(trace_id)
    assert trace is not None, f"{trace_id} was not stored"
    return trace


def listing_8_1(place: Place) -> None:
    (traced_step,) = place.functions("8.1")
    with traced_step("retrieve_context", span_type="RETRIEVER", inputs={"query": "返品"}) as span:
        span.set_outputs(["規約 3 条"])
    (found,) = stored(span.trace_id).data.spans
    assert (found.name, found.span_type) == ("retrieve_context", "RETRIEVER")
    assert (found.inputs, found.outputs) == ({"query": "返品"}, ["規約 3 条"])


def listing_8_2(place: Place) -> None:
    (traced_step,) = place.functions("8.2")
    given = {"retriever.num_documents": 2, "retriever.similarity_threshold": 0.7}
    with traced_step("retrieve_context", attributes=given) as span:
        pass
    found = stored(span.trace_id).data.spans[0].attributes
    assert {key: found[key] for key in given} == given


def listing_8_3(place: Place) -> None:
    import mlflow

    (record_error,) = place.functions("8.3")
    with contextlib.suppress(TimeoutError), mlflow.start_span("call_llm") as span:
        try:
            raise TimeoutError("no answer in 30 s")
        except TimeoutError as error:
            record_error(span, error, attempt=3)
            raise
    trace = stored(span.trace_id)
    found = trace.data.spans[0].attributes
    assert trace.info.state == "ERROR"
    assert (found["error.type"], found["error.attempt"]) == ("TimeoutError", 3)
    assert found["error.retryable"] is True


def listing_8_4(place: Place) -> None:
    import mlflow

    (setup,) = place.functions("8.4")
    status = setup(experiment_name=EXPERIMENT, service_name="my-llm-app", enable_async=True)
    assert (status.ready, status.experiment_name) == (True, EXPERIMENT)
    mlflow.trace(lambda: "ok", name="answer")()
    trace = stored(str(mlflow.get_last_active_trace_id()))
    assert trace.info.experiment_id == status.experiment_id


def listing_8_5(place: Place) -> None:
    import mlflow

    middleware, init_flask = place.functions("8.5")
    ids: list[str] = []

    def chat() -> str:
        with mlflow.start_span("chat") as span:
            ids.append(span.trace_id)
        return "ok"

    headers = {"X-User-Id": "user-123", "X-Session-Id": "session-456"}
    for client in (fastapi_client(middleware, chat), flask_client(init_flask, chat)):
        assert client.get("/chat", headers=headers).status_code == 200
    for metadata in [stored(trace_id).info.trace_metadata for trace_id in ids]:
        assert metadata["mlflow.trace.user"] == "user-123"
        assert metadata["mlflow.trace.session"] == "session-456"
    assert len(ids) == 2


def fastapi_client(middleware: Any, answer: Callable[[], str]) -> Any:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    app = FastAPI()
    app.add_middleware(middleware)
    app.get("/chat")(lambda: answer())
    return TestClient(app)


def flask_client(init_flask: Any, answer: Callable[[], str]) -> Any:
    from flask import Flask

    app = Flask("listing")
    init_flask(app)
    app.get("/chat")(lambda: answer())
    return app.test_client()


def listing_8_6(place: Place) -> None:
    """このプロセスは SIGTERM で終わる。呼び出し側が、"stopped" の 20 件を数える。"""
    import mlflow

    (setup,) = place.functions("8.6")
    setup(timeout_seconds=30)
    answer = mlflow.trace(lambda number: number, name="stopped")
    for number in range(20):
        answer(number)
    os.kill(os.getpid(), signal.SIGTERM)


def recorded_requests(place: Place) -> dict[str, str]:
    """本書と同じユーザー・会話・環境のトレースと、別のユーザーのトレース。"""
    import mlflow

    (add_trace_metadata,) = place.functions("8.7")
    context = import_module(place.module("8.7")).RequestContext
    ids = {}
    for user, session in (("user-123", "session-456"), ("user-999", "session-000")):
        with mlflow.start_span("handle_chat_request") as span:
            request = context(
                user_id=user,
                session_id=session,
                environment="production",
                service_version="1.2.0",
                region="ap-northeast-1",
            )
            assert add_trace_metadata(request)
        ids[user] = span.trace_id
    mlflow.flush_trace_async_logging()
    return ids


def listing_8_7(place: Place) -> None:
    ids = recorded_requests(place)
    infos = {user: stored(trace_id).info for user, trace_id in ids.items()}
    assert {user: info.trace_metadata["mlflow.trace.user"] for user, info in infos.items()} == {
        user: user for user in ids
    }
    info = infos["user-123"]
    assert info.trace_metadata["mlflow.trace.session"] == "session-456"
    wanted = {"environment": "production", "deployment.region": "ap-northeast-1"}
    assert wanted.items() <= info.tags.items()


def listing_8_8(place: Place) -> None:
    (find_traces,) = place.functions("8.8")

    def found(**condition: Any) -> set[str]:
        return {trace.info.trace_id for trace in find_traces(**condition)}

    region = {"deployment.region": "ap-northeast-1"}
    conditions: list[dict[str, Any]] = [
        {"user": "user-123"},
        {"session": "session-456"},
        {"environment": "production", "status": "OK", "tags": region},
        {"environment": "production", "status": "ERROR"},
    ]
    before = [found(**condition) for condition in conditions]
    ids = recorded_requests(place)
    new = [found(**one) - old for one, old in zip(conditions, before, strict=True)]
    assert new == [{ids["user-123"]}, {ids["user-123"]}, set(ids.values()), set()]


def listing_8_9(place: Place) -> None:
    import mlflow
    import openai

    (setup_token_tracking,) = place.functions("8.9")
    setup_token_tracking(["openai"])
    question: Any = [{"role": "user", "content": "MLflow Tracing とは何ですか"}]
    try:
        openai.OpenAI().chat.completions.create(model="gpt-4o-mini", messages=question)
    finally:
        mlflow.openai.autolog(disable=True)  # type: ignore[no-untyped-call]
    trace = stored(str(mlflow.get_last_active_trace_id()))
    assert trace.info.token_usage["total_tokens"] > 0
    (span,) = trace.data.spans
    assert span.get_attribute("mlflow.llm.cost")["total_cost"] > 0
    assert span.get_attribute("cost.status") == "priced"


def listing_8_10(place: Place) -> None:
    import mlflow

    (log_thumbs_feedback,) = place.functions("8.10")
    mlflow.trace(lambda: "30 日以内です", name="answer")()
    trace_id = str(mlflow.get_last_active_trace_id())
    log_thumbs_feedback(trace_id, True, "user-123", comment="役に立った")
    (found,) = stored(trace_id).info.assessments
    assert (found.feedback.value, found.source.source_id) == (True, "user-123")
    assert found.rationale == "役に立った"


def listing_8_11(place: Place) -> None:
    (run_scoring_cycle,) = place.functions("8.11")
    import mlflow
    from mlflow.genai.scorers import Guidelines, RelevanceToQuery, Safety

    target = place.public("quality_monitoring", "ScoringTarget")
    ids = {}
    for environment in ("production", "staging"):
        with mlflow.start_span("answer") as span:
            mlflow.update_current_trace(tags={"environment": environment})
            span.set_inputs({"question": "返品の期限は?"})
            span.set_outputs("購入から 30 日以内に承ります。")
        ids[environment] = span.trace_id
    model = "openai:/gpt-4.1-mini"
    tone = Guidelines(name="professional_tone", guidelines="回答は丁寧である", model=model)
    judges = [RelevanceToQuery(model=model), Safety(model=model), tone]
    where = "tags.environment = 'production'"
    report = run_scoring_cycle(
        EXPERIMENT, [target(scorer=judge, filter_string=where) for judge in judges]
    )
    assert (report.scored, report.failed) == (3, 0)
    names = {where: {a.name for a in stored(i).info.assessments} for where, i in ids.items()}
    assert names == {"production": {judge.name for judge in judges}, "staging": set()}


def listing_8_12(place: Place) -> None:
    (setup_quality_scorers,) = place.functions("8.12")
    setup_quality_scorers(
        experiment_name=EXPERIMENT, safety_sample_rate=1.0, quality_sample_rate=0.5
    )
    statuses = place.public("quality_monitoring", "list_scorer_statuses")(EXPERIMENT)
    rates = {status.name: status.sample_rate for status in statuses}
    assert rates == {"safety_check": 1.0, "relevance_check": 0.5, "groundedness_check": 0.5}


def listing_8_13(place: Place) -> None:
    (quick_rollback,) = place.functions("8.13")
    import mlflow

    if not hasattr(mlflow, "MlflowClient"):  # mlflow-tracing だけのアプリ
        quick_rollback("qa-agent", target_version="1", alias="champion")
    client = mlflow.MlflowClient()
    client.create_registered_model("qa-agent")
    for version in (1, 2):
        assert client.create_model_version("qa-agent", "file:///models/qa").version == version
    client.set_registered_model_alias("qa-agent", "champion", "2")
    change = quick_rollback("qa-agent", target_version="1", alias="champion")
    assert (change.from_version, change.to_version, change.state) == ("2", "1", "done")
    assert client.get_model_version_by_alias("qa-agent", "champion").version == 1


def listing_8_14(place: Place) -> str:
    return exported(place, "8.14", mode="otlp_only")


def listing_8_15(place: Place) -> str:
    return exported(place, "8.15")


def listing_8_16(place: Place) -> str:
    """``CHAPTER8_WORKSPACE`` は、Databricks の代わりに届いたものを記録するところの URL。"""
    import mlflow

    before = {name: os.environ.get(name) for name in ("DATABRICKS_HOST", "DATABRICKS_TOKEN")}
    uri = mlflow.get_tracking_uri()
    os.environ.update(
        DATABRICKS_HOST=os.environ["CHAPTER8_WORKSPACE"], DATABRICKS_TOKEN="dapi-local"
    )
    mlflow.set_tracking_uri("databricks")
    mlflow.set_experiment(EXPERIMENT)
    try:
        return exported(place, "8.16")
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        mlflow.set_tracking_uri(uri)


def exported(place: Place, number: str, **options: Any) -> str:
    """``CHAPTER8_OTLP`` へも送る設定をして、1 件を送り、トレースの ID を返す。"""
    import mlflow

    (setup_otlp_export,) = place.functions(number)
    setup_otlp_export(
        os.environ["CHAPTER8_OTLP"],
        "qa-agent",
        service_version="1.0.0",
        deployment_environment="production",
        **options,
    )
    try:
        with mlflow.start_span(f"answer-{number}") as span:
            pass
        assert place.public("opentelemetry", "flush_all")(20).complete
    finally:
        place.public("opentelemetry", "disable_otlp_export")(timeout_seconds=1)
    return span.trace_id.removeprefix("tr-")


def collector_problems(config: dict[str, Any]) -> list[str]:
    """リスト 8.17 の設定が使う部品のうち、定義されていないもの。既定の送り先で待つこと。"""
    found = []
    for name, pipeline in config["service"]["pipelines"].items():
        for kind in ("receivers", "processors", "exporters"):
            defined = {**config[kind], **config.get("connectors", {})}
            used = pipeline.get(kind, [])
            names = used if isinstance(used, list) else []  # ${env:...} は起動時に決まる
            found += [f"{name}: {one}" for one in names if one not in defined]
    endpoint = config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    return found + ([] if "4317" in endpoint else [endpoint])


CALLS: dict[str, Callable[[Place], str | None]] = {
    number: globals()[f"listing_{number.replace('.', '_')}"]
    for number in LISTINGS
    if number != "8.17"
}


def call(place: Place, number: str) -> dict[str, str | None]:
    """呼んだ結果か、例外(8.6 の SystemExit は通す)。"""
    try:
        result = CALLS[number](place)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    return {"result": result}


def main() -> None:
    """順に呼び、結果を 1 行ずつ JSON で書く。8.6 はこのプロセスを終わらせるので、最後に書く。"""
    folder, package, *numbers = sys.argv[1:]
    sys.path.insert(0, folder)
    alone = filter(None, os.environ.get("CHAPTER8_ALONE", "").split(","))
    place = Place(package, frozenset(alone))
    if package != "chapter8_samples":
        sys.modules["chapter8_samples"] = None  # type: ignore[assignment] (import すれば失敗する)
    import mlflow

    for number in numbers:
        if mlflow.get_tracking_uri() != os.environ["MLFLOW_TRACKING_URI"]:
            mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
        mlflow.set_experiment(EXPERIMENT)
        if number == "8.6":
            print(json.dumps({"8.6": {"result": None}}), flush=True)
        print(json.dumps({number: call(place, number)}), flush=True)


if __name__ == "__main__":
    main()
