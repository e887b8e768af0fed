"""8.5.4 本物の Collector で otel-collector-config.yaml を動かす。"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.entities import SpanEvent
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Status, StatusCode
from ports import free_port
from relay import relay
from samples import ROOT, run_as_reader

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import flush_all, setup_otlp_export

from .conftest import CONFIG, Collector, wait_until
from .pii_cases import CREDENTIALS, HARMLESS, PII

# 初回は Collector を作る(2 コアで 5 分ほど)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
# 送信先が 30 秒落ちる、1 分間送り続ける、という長さで試すには CHAPTER8_FULL_COLLECTOR=1
SCALE = 1.0 if os.environ.get("CHAPTER8_FULL_COLLECTOR") == "1" else 0.2


def vendor(otlp: OtlpReceiver, pipeline: str = "ALL", **settings: str) -> dict[str, str]:
    """受信側 1 つへ、全件(ALL)か標本(SAMPLED)を送る設定。"""
    return {
        f"COLLECTOR_EXPORTERS_{pipeline}": "[otlp_http/vendor]",
        "VENDOR_TRACES_URL": otlp.http_endpoint,
        **settings,
    }


class PlainApp:
    """MLflow を使わない OpenTelemetry のアプリ。開始と終了の時刻を自由に決められる。"""

    def __init__(self, endpoint: str) -> None:
        self.provider = TracerProvider(resource=Resource.create({"service.name": "plain"}))
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=30)
        self.provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=65536))
        self.tracer = self.provider.get_tracer("plain")

    def trace(
        self,
        name: str,
        attributes: dict[str, Any] | None = None,
        *,
        ms: float = 10,
        error: bool = False,
    ) -> str:
        now = time.time_ns()
        root = self.tracer.start_span(name, start_time=now, attributes=attributes)
        if error:
            root.set_status(Status(StatusCode.ERROR, "failed"))
        root.end(now + int(ms * 1e6))
        return f"{root.get_span_context().trace_id:032x}"

    def flush(self) -> None:
        self.provider.force_flush()


def test_validates_without_any_environment_variable(collector_binary: Path) -> None:
    command = [str(collector_binary), "validate", f"--config={CONFIG}"]
    run = subprocess.run(command, env={"HOME": "/tmp"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "deprecated" not in run.stderr + run.stdout


def test_starts_without_warnings(collector: Callable[..., Collector]) -> None:
    running = collector()
    running.stop()
    log = running.log.read_text()
    bad = [
        line for line in log.splitlines() if re.search(r"\t(warn|error)\t|deprecat|rewrite", line)
    ]
    assert bad == []


def test_a_port_taken_by_somebody_else_is_chosen_again(
    collector_binary: Path, tmp_path: Path
) -> None:
    running = Collector(collector_binary, tmp_path, {})
    with socket.create_server(("127.0.0.1", running.ports["GRPC"])):
        taken = dict(running.ports)
        running.start()
    running.stop()
    assert not set(taken.values()) & set(running.ports.values())


def test_traces_reach_an_mlflow_server_and_a_second_sink_without_personal_data(
    mlflow_server_url: str, otlp: OtlpReceiver, collector: Callable[..., Collector]
) -> None:
    experiment = mlflow.set_experiment("through-the-collector").experiment_id
    running = collector(
        COLLECTOR_EXPORTERS_ALL="[otlp_http/mlflow, otlp_http/vendor]",
        VENDOR_TRACES_URL=otlp.http_endpoint,
        MLFLOW_SERVER_URL=mlflow_server_url,
        MLFLOW_EXPERIMENT_ID=experiment,
    )
    setup_otlp_export(running.grpc_endpoint, "bot", mode="otlp_only", genai_semconv=False)
    made = [_leaky_trace(text) for text in (*PII, *CREDENTIALS)]
    with mlflow.start_span("harmless") as harmless:
        harmless.set_attribute("texts", list(HARMLESS))
    made.append(harmless.trace_id)
    assert flush_all().complete
    everything = 2 * len(made) - 1
    wait_until(lambda: len(otlp.spans) >= everything, 30, lambda: running.log.read_text()[-2000:])
    wait_until(lambda: _stored_spans(experiment) >= everything, 30)
    stored = _stored(experiment)
    assert {trace.info.trace_id for trace in stored} == set(made)
    assert {f"tr-{span.trace_id}" for span in otlp.spans} == set(made)
    at_sink = json.dumps([vars(span) for span in otlp.spans], default=vars, ensure_ascii=False)
    at_mlflow = json.dumps([trace.to_dict() for trace in stored], ensure_ascii=False)
    for text in (*PII, *CREDENTIALS.values()):
        assert text not in at_sink, text
        assert text not in at_mlflow, text
    (kept,) = (span for span in otlp.spans if span.name == "harmless")
    assert json.loads(kept.attributes["texts"]) == list(HARMLESS)
    assert "お問い合わせ" in at_sink and "お問い合わせ" in at_mlflow
    stored = [trace for trace in stored if trace.info.trace_id != harmless.trace_id]
    assert {trace.info.tags["release"] for trace in stored} == {"v1"}
    # 伏せた後も JSON のまま(文字列に崩れていない)
    assert all(set(trace.data.spans[0].inputs) == {"question", "lines"} for trace in stored)


def test_the_traces_of_a_sample_reach_an_mlflow_server(
    mlflow_server_url: str, otlp: OtlpReceiver, collector: Callable[..., Collector], tmp_path: Path
) -> None:
    experiment = mlflow.set_experiment("a-sample-through-the-collector").experiment_id
    running = collector(
        COLLECTOR_EXPORTERS_ALL="[otlp_http/mlflow, otlp_http/vendor]",
        VENDOR_TRACES_URL=otlp.http_endpoint,
        MLFLOW_SERVER_URL=mlflow_server_url,
        MLFLOW_EXPERIMENT_ID=experiment,
    )
    command = ["-m", "chapter8_samples.opentelemetry", "send", "--endpoint", running.grpc_endpoint]
    offline = {"PYTHONPATH": str(ROOT), "MLFLOW_MODEL_CATALOG_URI": ""}
    run = run_as_reader(command, tmp_path, environment=offline)
    assert "OTLP に届いたスパン 6、失われたスパン 0" in run.stdout, run.stderr
    wait_until(lambda: len(otlp.spans) >= 6 and _stored_spans(experiment) >= 6, 30)
    at_sink = {f"tr-{span.trace_id}" for span in otlp.spans}
    assert {trace.info.trace_id for trace in _stored(experiment)} == at_sink
    assert (len(at_sink), len(otlp.spans), _stored_spans(experiment)) == (3, 6, 6)


def _leaky_trace(text: str) -> str:
    """入力、属性、イベント、例外の文面、スパン名、秘密らしい名前の属性に ``text`` を入れる。"""
    with mlflow.start_span("answer", span_type="AGENT") as root:
        root.set_inputs(
            {"question": f"お問い合わせ: {text}です", "lines": f"連絡先\n{text}\n{text}\t以上"}
        )
        root.add_event(SpanEvent(f"found {text}", attributes={"note": text}))
        root.set_attribute("api_key", "plain-secret")
        root.set_attribute("list", ["a", f"連絡先は{text}まで"])
        mlflow.update_current_trace(tags={"release": "v1"})
        with pytest.raises(ValueError), mlflow.start_span(f"lookup {text}"):
            raise ValueError(f"利用者 {text} がありません")
    return root.trace_id


def _stored(experiment: str) -> list[Any]:
    found: Any = mlflow.search_traces(locations=[experiment], return_type="list")
    return found


def _stored_spans(experiment: str) -> int:
    return sum(len(trace.data.spans) for trace in _stored(experiment))


def test_secret_looking_attributes_are_masked_whole(
    otlp: OtlpReceiver, collector: Callable[..., Collector]
) -> None:
    app = PlainApp(collector(**vendor(otlp)).http_endpoint)
    app.trace("login", {"db.password": "hunter2", "gen_ai.usage.input_tokens": 41})
    app.flush()
    (span,) = otlp.wait_for(spans=1, timeout_seconds=20)
    assert span.attributes["db.password"] == "****"
    assert span.attributes["gen_ai.usage.input_tokens"] == 41
    assert not any(name.startswith("ch8.") for name in span.attributes)
    assert span.resource["deployment.environment.name"] == "development"
    assert span.resource["service.name"] == "plain"
    assert "host.name" in span.resource


def test_long_values_are_cut_between_characters(
    otlp: OtlpReceiver, collector: Callable[..., Collector]
) -> None:
    app = PlainApp(collector(**vendor(otlp)).http_endpoint)
    text, cut = "あ" * 20_000, "あ" * (16384 // 3)
    with app.tracer.start_as_current_span("long", attributes={"prompt": text}) as made:
        made.add_event("answer", {"text": text})
        made.set_status(Status(StatusCode.ERROR, text))
    app.flush()
    (span,) = otlp.wait_for(spans=1, timeout_seconds=20)
    assert span.attributes["prompt"] == span.events[0].attributes["text"] == cut
    assert (span.name, span.events[0].name, span.status_message) == ("long", "answer", cut)
    assert span.events[0].attributes.keys() == {"text"}


def test_keeps_what_the_app_would_keep_and_drops_the_rest(
    otlp: OtlpReceiver, collector: Callable[..., Collector]
) -> None:
    settings = vendor(otlp, "SAMPLED", SAMPLING_PERCENTAGE="0", SAMPLING_VIP_USERS="[vip-1, vip-2]")
    running = collector(**settings)
    app = PlainApp(running.http_endpoint)
    kept = {
        app.trace("error", error=True),
        app.trace("slow", ms=5000),
        app.trace("forced", {"mlflow.traceTag.sampling.keep": "true"}),
        app.trace("vip", {"user.id": "vip-2"}),
        app.trace("weighted", {"sampling.weight": 10.0}),
    }
    for _ in range(50):
        app.trace("normal", {"user.id": "someone"}, ms=4900)
    app.flush()
    assert _sampled_of(running, 55) == 5
    wait_until(lambda: len(otlp.spans) >= 5, 30, lambda: [span.name for span in otlp.spans])
    assert {span.trace_id for span in otlp.spans} == kept


def _sampled_of(running: Collector, traces: int) -> int:
    """全件の決定が済むまで待ち、残すと決めた件数を返す(Collector 自身のメトリクスから)。"""
    line = r"_global_count_traces_sampled\S*?{[^}]*decision=\"(\w+)\"[^}]*} (\d+)"
    decided: dict[str, int] = {}

    def done() -> bool:
        found = re.findall(line, running.telemetry())
        decided.update({decision: int(count) for decision, count in found})
        return sum(decided.values()) >= traces

    wait_until(done, 30, lambda: decided)
    assert sum(decided.values()) == traces
    return decided.get("sampled", 0)


def test_samples_the_rest_at_the_given_rate(
    otlp: OtlpReceiver, collector: Callable[..., Collector]
) -> None:
    running = collector(**vendor(otlp, "SAMPLED", SAMPLING_PERCENTAGE="20"))
    app = PlainApp(running.http_endpoint)
    for _ in range(2000):
        app.trace("normal")
    app.flush()
    sampled = _sampled_of(running, 2000)
    assert 320 <= sampled <= 480  # 400 +- 4.5 標準偏差
    wait_until(lambda: len(otlp.spans) >= sampled, 30, lambda: len(otlp.spans))
    assert len({span.trace_id for span in otlp.spans}) == len(otlp.spans) == sampled


def test_span_metrics_count_each_span_once_and_prometheus_reads_them(
    otlp: OtlpReceiver, collector: Callable[..., Collector], tmp_path: Path
) -> None:
    settings = vendor(otlp, "SAMPLED", SAMPLING_PERCENTAGE="0", COLLECTOR_METRICS_INTERVAL="1s")
    running = collector(**settings)
    app = PlainApp(running.http_endpoint)
    for _ in range(20):
        app.trace("chat gpt-4o-mini", {"gen_ai.request.model": "gpt-4o-mini", "user.id": "u"})
    app.flush()
    app = PlainApp(running.http_endpoint)  # 再起動したプロセス
    for _ in range(20):
        app.trace("chat gpt-4o-mini", {"gen_ai.request.model": "gpt-4o-mini", "user.id": "u"})
    app.trace("chat gpt-4o-mini", {"gen_ai.request.model": "gpt-4o-mini"}, error=True)
    app.flush()
    wait_until(lambda: re.search(r"calls_total\{.*\} 40", running.metrics()), 20)
    page = running.metrics()
    calls = [
        line for line in page.splitlines() if line.startswith("traces_span_metrics_calls_total")
    ]
    assert sorted(float(line.split("}")[1].split()[0]) for line in calls) == [1.0, 40.0]
    assert all('gen_ai_request_model="gpt-4o-mini"' in line for line in calls)
    assert not any(re.search(r"user_id|[{,](service_)?instance(_id)?=", line) for line in calls)
    _read_with_prometheus(running, tmp_path)


def test_labels_of_the_apps_own_metrics_are_masked_too(
    collector: Callable[..., Collector],
) -> None:
    running = collector()
    exporter = OTLPMetricExporter(endpoint=running.http_endpoint.replace("traces", "metrics"))
    provider = MeterProvider(metric_readers=[PeriodicExportingMetricReader(exporter)])
    counter = provider.get_meter("app").create_counter("answers")
    counter.add(3, {"contact": "taro.yamada@example.co.jp", "model": "gpt-4o-mini"})
    provider.shutdown()
    wait_until(lambda: "answers_total{" in running.metrics(), 20)
    (line,) = [text for text in running.metrics().splitlines() if text.startswith("answers_total{")]
    assert 'contact="****"' in line and 'model="gpt-4o-mini"' in line and line.endswith(" 3")


def _read_with_prometheus(running: Collector, home: Path) -> None:
    """本物の Prometheus に読ませる(Debian のパッケージ)。"""
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("needs prometheus (Debian package) for the last step")
    target, port = f"127.0.0.1:{running.ports['PROMETHEUS']}", free_port()
    scrape = {
        "job_name": "collector",
        "scrape_interval": "1s",
        "static_configs": [{"targets": [target]}],
    }
    (home / "prometheus.yml").write_text(json.dumps({"scrape_configs": [scrape]}))
    flags = [f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/tsdb"]
    flags += [f"--web.listen-address=127.0.0.1:{port}"]
    query = "sum(traces_span_metrics_calls_total)"

    def answer() -> list[Any]:
        try:
            url = f"http://127.0.0.1:{port}/api/v1/query?query={query}"
            with urllib.request.urlopen(url) as page:
                found: list[Any] = json.load(page)["data"]["result"]
                return found
        except OSError:
            return []

    with (home / "prometheus.log").open("wb") as log:
        process = subprocess.Popen([prometheus, *flags], stderr=log)
    try:
        wait_until(answer, 30, lambda: (home / "prometheus.log").read_text()[-1000:])
        assert answer()[0]["value"][1] == "41"
    finally:
        process.terminate()
        process.wait(20)


def test_an_outage_with_a_killed_collector_loses_nothing(
    otlp: OtlpReceiver, collector: Callable[..., Collector]
) -> None:
    """送信先が落ち、その間に Collector が kill -9 され、アプリは送り続けても、全部届く。"""
    port = free_port()
    settings = vendor(otlp) | {"VENDOR_TRACES_URL": f"http://127.0.0.1:{port}/v1/traces"}
    running = collector(**settings)
    app, started = PlainApp(running.http_endpoint), time.monotonic()
    made = _steadily(app, per_second=100, until=started + 10 * SCALE)
    running.stop(signal.SIGKILL)
    made |= _steadily(app, per_second=100, until=started + 13 * SCALE)  # Collector も居ない間
    running.start()
    # 再起動に何秒かかっても、同じ数を送る
    made |= _steadily(app, per_second=100, until=time.monotonic() + 17 * SCALE)
    assert len(made) >= 2500 * SCALE
    assert otlp.spans == []
    with relay(port, otlp.http_endpoint):
        app.flush()
        wait_until(lambda: {span.trace_id for span in otlp.spans} >= made, 45)
    assert {span.trace_id for span in otlp.spans} == made


def _steadily(
    app: PlainApp,
    *,
    per_second: int,
    until: float,
    attributes: dict[str, Any] | None = None,
    each_step: Callable[[], object] = lambda: None,
) -> set[str]:
    """``until`` まで、0.1 秒ごとに少しずつトレースを作る。機械が遅れても、数は減らさない。"""
    made, begun = set[str](), time.monotonic()

    def catch_up(now: float) -> None:
        while len(made) < (now - begun) * per_second:
            made.add(app.trace("steady", attributes))

    while (now := time.monotonic()) < until:
        catch_up(now)
        each_step()
        time.sleep(0.1)
    catch_up(until)
    return made


def test_memory_stays_below_the_limit_at_200_spans_a_second(
    otlp: OtlpReceiver, collector: Callable[..., Collector]
) -> None:
    """毎秒 200 スパン(1 つ 4 KB)を送り続ける。受け取りを断られることもない。"""
    running = collector(**vendor(otlp))
    app, resident = PlainApp(running.http_endpoint), list[float]()
    made = _steadily(
        app,
        per_second=200,
        until=time.monotonic() + 60 * SCALE,
        attributes={"prompt": "返品したい。" * 220},
        each_step=lambda: resident.append(running.resident_mib()),
    )
    app.flush()
    wait_until(lambda: len(otlp.spans) >= len(made), 30)
    assert len(made) > 11_900 * SCALE
    assert {span.trace_id for span in otlp.spans} == made and len(otlp.spans) == len(made)
    assert max(resident) < 512
    assert not re.search(r"data refused|Memory usage is above", running.log.read_text())
