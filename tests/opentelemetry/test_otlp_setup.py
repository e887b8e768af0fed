"""8.5.3 setup_otlp_export: 同じトレースが同じ id で両方に届き、何も黙って失わない。"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import mlflow.tracing
import pytest
from mlflow.tracing.processor.otel import OtelSpanProcessor
from opentelemetry.sdk.trace import SpanProcessor
from ports import free_port

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import (
    OtlpConfigError,
    OtlpSetupError,
    build_otlp_config,
    disable_otlp_export,
    flush_all,
    otlp_status,
    setup_otlp_export,
    setup_otlp_for_datadog,
    setup_otlp_for_grafana_tempo,
    setup_otlp_for_jaeger,
    setup_otlp_via_collector,
)

PROTOCOLS = ["grpc", "http/protobuf"]


def endpoint_of(otlp: OtlpReceiver, protocol: str) -> str:
    return otlp.grpc_endpoint if protocol == "grpc" else otlp.http_endpoint


def answer(number: int = 0, *, tags: dict[str, str] | None = None) -> str:
    """3 スパンのトレースを 1 件作り、トレース id を返す。"""
    with mlflow.start_span(f"answer-{number}", span_type="AGENT") as root:
        mlflow.update_current_trace(
            tags=tags or {},
            metadata={"mlflow.trace.user": "u-1", "mlflow.trace.session": "s-1"},
        )
        with mlflow.start_span("retrieve", span_type="RETRIEVER"):
            pass
        with mlflow.start_span("llm", span_type="CHAT_MODEL") as llm:
            llm.set_attribute("mlflow.llm.model", "gpt-4o-mini")
            llm.set_attribute("mlflow.llm.provider", "openai")
            llm.set_attribute(
                "mlflow.chat.tokenUsage",
                {"input_tokens": 100, "output_tokens": 20, "cache_read_input_tokens": 60},
            )
    return root.trace_id


def stored_ids(experiment: str) -> set[str]:
    found = mlflow.get_experiment_by_name(experiment)
    assert found is not None
    traces: Any = mlflow.search_traces(locations=[found.experiment_id], return_type="list")
    return {trace.info.trace_id for trace in traces}


@pytest.fixture
def other_store(database_template: Path, tmp_path: Path) -> str:
    """2 つめの SQLite。"""
    return f"sqlite:///{Path(shutil.copy(database_template, tmp_path / 'other.db')).as_posix()}"


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dual_mode_delivers_every_trace_twice_with_equal_ids(
    tracking_uri: str, otlp: OtlpReceiver, protocol: str
) -> None:
    mlflow.set_experiment("dual")
    status = setup_otlp_export(endpoint_of(otlp, protocol), "bot", protocol)
    made = {answer(n, tags={"release": "v1"}) for n in range(5)}
    report = flush_all(timeout_seconds=60)  # 最初は、litellm を読み込む
    assert report.complete and (report.accepted, report.delivered, report.lost) == (15, 15, 0)
    assert {f"tr-{span.trace_id}" for span in otlp.spans} == made == stored_ids("dual")
    assert len(otlp.spans) == 15
    assert status.mode == "dual" and status.warnings == ()
    assert status.processors == ("OtelSpanProcessor", "MlflowV3SpanProcessor")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_otlp_only_keeps_the_root_span_of_traces_with_tags(
    tracking_uri: str, otlp: OtlpReceiver, protocol: str
) -> None:
    mlflow.set_experiment("only")
    setup_otlp_export(endpoint_of(otlp, protocol), "bot", protocol, mode="otlp_only")
    made = {answer(n, tags={"release": "v1"}) for n in range(3)}
    assert flush_all().delivered == 9
    roots = [span for span in otlp.spans if not span.parent_span_id]
    assert {f"tr-{span.trace_id}" for span in roots} == made
    assert {span.attributes["mlflow.traceTag.release"] for span in roots} == {"v1"}
    assert stored_ids("only") == set()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["dual", "otlp_only"])
@pytest.mark.parametrize("semconv", [True, False])
def test_user_session_cache_and_errors_travel_as_standard_attributes(
    tracking_uri: str, otlp: OtlpReceiver, mode: Any, semconv: bool
) -> None:
    mlflow.set_experiment("attributes")
    setup_otlp_export(otlp.grpc_endpoint, "bot", mode=mode, genai_semconv=semconv)
    answer(tags={"release": "v1"})
    with pytest.raises(TimeoutError), mlflow.start_span("slow", span_type="CHAT_MODEL"):
        raise TimeoutError("too slow")
    flush_all()
    by_parent = {bool(span.parent_span_id): span.attributes for span in otlp.spans}
    llm = next(s for s in otlp.spans if "gen_ai.usage.cache_read.input_tokens" in s.attributes)
    assert by_parent[True]["session.id"] == by_parent[True]["gen_ai.conversation.id"] == "s-1"
    assert llm.attributes["user.id"] == "u-1"
    assert llm.attributes["gen_ai.usage.cache_read.input_tokens"] == 60
    failed = next(span for span in otlp.spans if "error.type" in span.attributes)
    assert failed.attributes["error.type"] == "TimeoutError"


def test_resource_names_service_version_and_environment(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    os.environ["OTEL_RESOURCE_ATTRIBUTES"] = "k8s.pod.name=pod-1,broken,"
    setup_otlp_export(
        otlp.grpc_endpoint,
        "bot",
        mode="otlp_only",
        service_version="1.2.0",
        deployment_environment="本番, 東京=1",
    )
    answer()
    flush_all()
    resource = otlp.spans[0].resource
    assert resource["service.name"] == "bot"
    assert resource["service.version"] == "1.2.0"
    assert resource["deployment.environment.name"] == "本番, 東京=1"
    assert resource["k8s.pod.name"] == "pod-1"


def test_headers_arrive_and_are_not_shown(tracking_uri: str, otlp: OtlpReceiver) -> None:
    status = setup_otlp_export(
        otlp.http_endpoint,
        "bot",
        "http/protobuf",
        mode="otlp_only",
        headers={"x-api-key": "s3cret, =1"},
    )
    answer()
    flush_all()
    assert otlp.requests[0].headers["x-api-key"] == "s3cret, =1"
    assert otlp.requests[0].headers["content-encoding"] == "gzip"
    assert "s3cret" not in repr(status)


@pytest.mark.slow
def test_keeps_span_processors_experiment_and_added_processors(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    seen: list[str] = []

    def price(span: Any) -> None:
        seen.append(span.name)

    experiment = mlflow.set_experiment("kept")
    mlflow.tracing.configure(span_processors=[price])
    memory = InMemorySpanExporter()
    mlflow.tracing.get_bridged_tracer_provider().add_span_processor(SimpleSpanProcessor(memory))
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    trace_id = answer()
    flush_all()
    assert seen == ["retrieve", "llm", "answer-0"]
    assert len(memory.get_finished_spans()) == 3
    assert stored_ids("kept") == {trace_id}
    assert mlflow.get_trace(trace_id).info.experiment_id == experiment.experiment_id  # type: ignore[union-attr]


def test_span_processors_configured_later_do_not_disturb_it(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    setup_otlp_export(otlp.grpc_endpoint, "bot", mode="otlp_only")
    mlflow.tracing.configure(span_processors=[lambda span: None])
    answer(tags={"release": "v1"})
    assert flush_all().delivered == 3
    assert any("mlflow.traceTag.release" in span.attributes for span in otlp.spans)


def test_survives_set_experiment_and_a_late_tracking_uri(
    tracking_uri: str, otlp: OtlpReceiver, other_store: str
) -> None:
    def mask(span: Any) -> None: ...

    mlflow.tracing.configure(span_processors=[mask])
    setup_otlp_export(otlp.grpc_endpoint, "bot", mode="otlp_only")
    answer(1, tags={"a": "1"})
    mlflow.set_experiment("later")
    answer(2, tags={"a": "1"})
    assert otlp_status().warnings == ()
    mlflow.set_tracking_uri(other_store)
    answer(3, tags={"a": "1"})
    assert flush_all().delivered == 9
    assert len([span for span in otlp.spans if not span.parent_span_id]) == 3
    warnings = otlp_status().warnings
    assert any("mask" in w and "set_tracking_uri" in w for w in warnings), warnings


@pytest.mark.slow
def test_setting_up_again_after_a_late_tracking_uri_is_the_cure(
    tracking_uri: str, otlp: OtlpReceiver, other_store: str
) -> None:
    """もう一度呼べば警告は消える。ただし、消えたままのマスクの警告は残る。"""

    def mask(span: Any) -> None: ...

    mlflow.tracing.configure(span_processors=[mask])
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    mlflow.set_tracking_uri(other_store)
    answer(1)  # ここでプロバイダーが作り直される
    (warning,) = setup_otlp_export(otlp.grpc_endpoint, "bot").warnings
    assert "'mask'" in warning
    mlflow.tracing.configure(span_processors=[mask])
    assert setup_otlp_export(otlp.grpc_endpoint, "bot").warnings == ()
    assert flush_all().delivered == 0 and len(otlp.spans) == 3  # 作り直すときに送り終えた


def test_a_server_that_dual_mode_writes_to_later_is_refused_too(tracking_uri: str) -> None:
    setup_otlp_export("http://127.0.0.1:5000", "bot", "http/protobuf", timeout_seconds=1)
    mlflow.set_tracking_uri("http://127.0.0.1:5000")
    mlflow.tracing.get_bridged_tracer_provider()
    with pytest.raises(OtlpConfigError, match="otlp_only"):
        setup_otlp_export("http://127.0.0.1:5000", "bot", "http/protobuf", timeout_seconds=1)


def test_names_what_replaces_otlp_only(tracking_uri: str) -> None:
    from mlflow.entities.trace_location import MlflowExperimentLocation

    experiment = mlflow.create_experiment("destination")
    mlflow.tracing.set_destination(MlflowExperimentLocation(experiment))
    with pytest.raises(OtlpSetupError, match=r"set_destination.*mode='dual'"):
        setup_otlp_export("http://127.0.0.1:4317", "bot", mode="otlp_only")


@pytest.mark.slow
def test_second_call_changes_nothing_and_another_endpoint_moves(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    first = setup_otlp_export(otlp.grpc_endpoint, "bot")
    provider = mlflow.tracing.get_bridged_tracer_provider()
    assert setup_otlp_export(otlp.grpc_endpoint, "bot") == first
    assert mlflow.tracing.get_bridged_tracer_provider() is provider
    with OtlpReceiver() as other:
        answer(1)
        setup_otlp_export(other.http_endpoint, "bot", "http/protobuf")
        answer(2)
        flush_all()
        assert len(otlp.spans) == len(other.spans) == 3


@pytest.mark.slow
def test_disable_restores_the_environment_exactly(tracking_uri: str, otlp: OtlpReceiver) -> None:
    os.environ["OTEL_RESOURCE_ATTRIBUTES"] = "team=search,,"
    os.environ["OTEL_EXPORTER_OTLP_TRACES_HEADERS"] = "old=1"
    before = dict(os.environ)
    setup_otlp_export(otlp.grpc_endpoint, "bot", headers={"new": "2"})
    setup_otlp_export(otlp.http_endpoint, "bot2", "http/protobuf")
    answer(1)
    assert disable_otlp_export().mode == "off"
    assert dict(os.environ) == before
    assert len(otlp.spans) == 3
    answer(2)
    flush_all()
    assert len(otlp.spans) == 3


def test_disable_restores_the_environment_beside_an_added_processor(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    """プロセッサーを移すためのプロバイダーを、環境を戻した後で作り直す。"""
    os.environ["OTEL_RESOURCE_ATTRIBUTES"] = "team=search"
    before, on_end = dict(os.environ), OtelSpanProcessor.on_end
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    setup_otlp_export(otlp.grpc_endpoint, "another bot")
    mlflow.tracing.get_bridged_tracer_provider().add_span_processor(SpanProcessor())
    disable_otlp_export()
    assert dict(os.environ) == before
    assert OtelSpanProcessor.on_end is on_end


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_disable_keeps_its_deadline_while_a_request_hangs(tracking_uri: str, protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        setup_otlp_export(endpoint, "bot", protocol, timeout_seconds=30)
        answer()
        flush_all(timeout_seconds=0.2)
        started = time.monotonic()
        disable_otlp_export(timeout_seconds=0.2)
        assert time.monotonic() - started < 15


@pytest.mark.slow
def test_works_after_tracing_has_started(tracking_uri: str, otlp: OtlpReceiver) -> None:
    mlflow.set_experiment("late")
    made = {answer(1)}
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    made.add(answer(2))
    flush_all()
    assert stored_ids("late") == made
    assert len(otlp.spans) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("collector:4317", "bot"), "no scheme"),
        (("http://", "bot"), "not an http"),
        (("http://host:port", "bot"), "Port could not be cast"),
        (("ftp://host", "bot"), "not an http"),
        (("http://host:4317", " "), "service_name"),
        (("http://host:4317", "bot", "http/json"), "http/json"),
    ],
)
def test_wrong_settings_are_refused_before_anything_changes(
    tracking_uri: str, arguments: tuple[str, ...], message: str
) -> None:
    before = dict(os.environ)
    with pytest.raises(OtlpConfigError, match=message):
        setup_otlp_export(*arguments)
    assert dict(os.environ) == before
    assert otlp_status().mode == "off"


def test_refuses_when_tracing_is_off_or_dual_would_write_twice(tracking_uri: str) -> None:
    mlflow.tracing.disable()
    with pytest.raises(OtlpSetupError, match=r"mlflow\.tracing\.enable"):
        setup_otlp_export("http://127.0.0.1:4317", "bot")
    mlflow.tracing.enable()
    os.environ["OTEL_SDK_DISABLED"] = "true"
    with pytest.raises(OtlpSetupError, match="OTEL_SDK_DISABLED"):
        setup_otlp_export("http://127.0.0.1:4317", "bot")
    del os.environ["OTEL_SDK_DISABLED"]
    for server in ("http://127.0.0.1:5000", "http://localhost:5000/"):
        mlflow.set_tracking_uri(server)
        with pytest.raises(OtlpConfigError, match="otlp_only"):
            setup_otlp_export("http://127.0.0.1:5000/v1/traces", "bot", "http/protobuf")


def test_a_config_is_passed_alone(tracking_uri: str) -> None:
    config = build_otlp_config("http://127.0.0.1:4317", "bot")
    for more in ({"protocol": "http/protobuf"}, {"service_name": "other"}):
        with pytest.raises(OtlpConfigError, match="pass it alone"):
            setup_otlp_export(config, **more)


@pytest.mark.slow
def test_an_exporter_that_cannot_start_raises_and_tracing_goes_on(tracking_uri: str) -> None:
    mlflow.set_experiment("rollback")
    os.environ["OTEL_EXPORTER_OTLP_COMPRESSION"] = "deflate"
    before = dict(os.environ)
    with pytest.raises(OtlpSetupError, match="deflate"):
        setup_otlp_export("http://127.0.0.1:4317", "bot", compression="none")
    assert dict(os.environ) == before
    trace_id = answer()
    flush_all()
    assert stored_ids("rollback") == {trace_id}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_missing_exporter_package_raises_and_tracing_goes_on(
    tracking_uri: str, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mlflow-tracing だけの環境。MLflow に任せると、トレースが全部、黙って消える。"""
    kind = "grpc" if protocol == "grpc" else "http"
    name = f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter"
    monkeypatch.setitem(sys.modules, name, None)
    mlflow.set_experiment("no exporter")
    with pytest.raises(OtlpSetupError, match="opentelemetry-exporter-otlp"):
        setup_otlp_export("http://127.0.0.1:4317", "bot", protocol)
    trace_id = answer()
    flush_all()
    assert stored_ids("no exporter") == {trace_id}


def test_no_metric_with_user_ids_as_labels(tracking_uri: str, otlp: OtlpReceiver) -> None:
    setup_otlp_export(otlp.http_endpoint, "bot", "http/protobuf")
    answer()
    flush_all()
    assert otlp.metrics == []
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://collector:4317"
    assert any("OTEL_EXPORTER_OTLP_ENDPOINT" in w for w in otlp_status().warnings)
    del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
    os.environ["OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"] = "http://collector:4318/v1/metrics"
    (warning,) = otlp_status().warnings
    assert "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT" in warning


def test_wrappers_keep_the_books_names(tracking_uri: str, otlp: OtlpReceiver) -> None:
    assert setup_otlp_via_collector("bot", otlp.grpc_endpoint).endpoint == otlp.grpc_endpoint
    assert "deployment.environment.name=production" in os.environ["OTEL_RESOURCE_ATTRIBUTES"]
    setup_otlp_via_collector("bot", otlp.grpc_endpoint, "1.2.0", "staging")  # 書籍の引数の並び
    resource = os.environ["OTEL_RESOURCE_ATTRIBUTES"]
    assert "service.version=1.2.0" in resource
    assert "deployment.environment.name=staging" in resource
    assert setup_otlp_for_grafana_tempo("bot").endpoint == "http://tempo:4317"
    assert setup_otlp_for_jaeger("bot").endpoint == "http://jaeger:4317"
    status = setup_otlp_for_datadog("bot", dd_api_key="k", dd_site="ap1.datadoghq.com")
    assert status.endpoint == "https://otlp.ap1.datadoghq.com/v1/traces"
    assert status.protocol == "http/protobuf"
    with pytest.raises(OtlpConfigError, match="DD_API_KEY"):
        setup_otlp_for_datadog("bot")


def started(program: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


@pytest.mark.slow
def test_spans_ended_before_os_exit_are_delivered_after_flush_all(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    mlflow.set_experiment("exit")  # 2 つが同時に作ると、負けた側の記録先は Default のままになる
    program = f"""
import os, sys, mlflow
from chapter8_samples.opentelemetry import flush_all, setup_otlp_export
mlflow.set_tracking_uri({tracking_uri!r})
mlflow.set_experiment("exit")
setup_otlp_export(sys.argv[1], "bot", sys.argv[2])
for n in range(20):
    with mlflow.start_span(f"s{{n}}"): pass
report = flush_all()
print(report.delivered, report.complete, flush=True)
os._exit(0)
"""
    runs = [started(program, endpoint_of(otlp, protocol), protocol) for protocol in PROTOCOLS]
    for run in runs:
        out, errors = run.communicate(timeout=90)
        assert out.split() == ["20", "True"], errors
    assert len(otlp.spans) == 40
    assert {f"tr-{span.trace_id}" for span in otlp.spans} == stored_ids("exit")


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_exit_waits_no_longer_than_the_timeout_when_nobody_answers(
    tracking_uri: str, protocol: str
) -> None:
    """送信待ちが 12 回分(1 回に 8 スパン)残っていても、期限は 1 つ分の 2 秒。"""
    program = f"""
import os, sys, time, mlflow
os.environ["OTEL_BSP_MAX_EXPORT_BATCH_SIZE"] = "8"
from chapter8_samples.opentelemetry import setup_otlp_export
mlflow.set_tracking_uri({tracking_uri!r})
mlflow.set_experiment("hang")
setup_otlp_export(sys.argv[1], "bot", {protocol!r}, timeout_seconds=2)
for n in range(96):
    with mlflow.start_span(f"s{{n}}"): pass
mlflow.flush_trace_async_logging()
print(time.time(), flush=True)
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for port in (silent.getsockname()[1], free_port()):  # 答えない相手と、いない相手
            run = started(program, f"http://127.0.0.1:{port}")
            out, errors = run.communicate(timeout=90)
            ended = time.time()
            assert run.returncode == 0, errors
            assert ended - float(out) < 16, errors
    assert len(stored_ids("hang")) == 192


@pytest.mark.slow
def test_translation_keeps_the_names_of_ordinary_spans(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    setup_otlp_export(otlp.grpc_endpoint, "bot")
    for name, kind in (("plain", "UNKNOWN"), ("load", "CHAIN"), ("search", "RETRIEVER")):
        with mlflow.start_span(name, span_type=kind):
            pass
    flush_all()
    assert [span.name for span in otlp.spans] == ["plain", "load", "search"]
    operations = [span.attributes.get("gen_ai.operation.name") for span in otlp.spans]
    assert operations == [None, None, "retrieval"]
