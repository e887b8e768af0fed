"""テールサンプリングを、別プロセスの実際のアプリケーションの形で確かめる。"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlflow
import pytest

pytestmark = pytest.mark.slow

SAMPLER = """
from chapter8_samples.production_tracing.sampling_strategies import ConditionalSampler
from chapter8_samples.production_tracing.basic_setup import setup_production_tracing
import contextlib, json

def report(sampler, **more):
    flushed = flush_traces(60)
    print(json.dumps({"kept": sampler.kept, "dropped": sampler.dropped,
                      "open": len(sampler._open), "lost": [flushed.error, flushed.undelivered],
                      **more}))
"""
REQUESTS = """
def request(number):
    with contextlib.suppress(TimeoutError), mlflow.start_span("request"):
        work(number)
        if number % 10 == 0:
            raise TimeoutError("provider")
"""


def result(program: Any, body: str, **environment: str) -> dict[str, Any]:
    code, out, err = program.run(SAMPLER + body, timeout=120, **environment)
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def rules_of(traces: list[Any]) -> Counter[str]:
    return Counter(trace.info.trace_metadata["sampling.rule"] for trace in traces)


def assert_exactly_the_kept_ones(traces: list[Any], report: dict[str, Any], spans: int) -> None:
    assert len(traces) == report["kept"] and report["open"] == 0
    assert report["lost"] == [None, 0]  # 間引いたものは、失ったものではない
    for trace in traces:
        ids = {span.span_id for span in trace.data.spans}
        assert len(ids) == spans
        assert all(span.parent_id is None or span.parent_id in ids for span in trace.data.spans)
        assert "IN_PROGRESS" not in str(trace.info.state)


OWN_PROVIDER = """
from opentelemetry import trace as otel
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
own = InMemorySpanExporter()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(own))
otel.set_tracer_provider(provider)
"""


@pytest.mark.parametrize("owner", ["mlflow", "application"])
def test_global_provider(program: Any, stored: Any, owner: str) -> None:
    """グローバルのプロバイダーを共有しても、MLflow の分だけを選び、他の送信先には触れない。"""
    body = (OWN_PROVIDER if owner == "application" else "own = None\n") + REQUESTS
    body += (
        "request(1)\nsampler = ConditionalSampler(0.3).install()\n"
        "for number in range(60): request(number)\n"
        "report(sampler, own=len(own.get_finished_spans()) if own else None)\n"
    )
    report = result(program, body, MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false")
    assert report["kept"] + report["dropped"] == 60 and report["dropped"] > 10
    assert report["own"] == (122 if owner == "application" else None)
    traces = stored("child")
    before = [t for t in traces if "sampling.rule" not in t.info.trace_metadata]
    assert len(before) == 1  # 取り付ける前のもの
    kept = [trace for trace in traces if trace not in before]
    assert rules_of(kept)["error"] == 6
    assert_exactly_the_kept_ones(kept, report, spans=2)


def test_the_ratio_of_the_applications_own_sampler_is_part_of_the_weight(
    program: Any, stored: Any
) -> None:
    body = OWN_PROVIDER.replace(
        "TracerProvider()", "TracerProvider(sampler=ParentBased(TraceIdRatioBased(0.5)))"
    )
    body = (
        "from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased\n"
        + body
        + REQUESTS
        + "sampler = ConditionalSampler(0.3).install()\n"
        "for number in range(100): request(number)\nreport(sampler)\n"
    )
    report = result(program, body, MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false")
    assert report["kept"] + report["dropped"] == 100
    traces = stored("child")
    assert rules_of(traces)["error"] < 10  # エラーも、先頭で半分捨てられている
    assert_exactly_the_kept_ones(traces, report, spans=2)
    weights = {
        (trace.info.trace_metadata["sampling.rule"], trace.info.trace_metadata["sampling.weight"])
        for trace in traces
    }
    assert weights <= {("error", "2.0"), ("rest", repr(1 / (0.3 * 0.5)))} and weights


def test_global_provider_over_a_server(
    program: Any, stored: Any, tmp_path: Path, mlflow_server_url: str
) -> None:
    name = "tail-global-server"
    body = REQUESTS + (
        f"setup_production_tracing({name!r})\nsampler = ConditionalSampler(0.3).install()\n"
        "for number in range(40): request(number)\nreport(sampler)\n"
    )
    program.uri = mlflow_server_url
    report = result(program, body, MLFLOW_USE_DEFAULT_TRACER_PROVIDER="false")
    assert report["kept"] + report["dropped"] == 40
    mlflow.set_tracking_uri(mlflow_server_url)
    assert_exactly_the_kept_ones(stored(name), report, spans=2)


@pytest.mark.parametrize("own_provider", ["true", "false"])
def test_autologged_openai_calls(
    program: Any, stored: Any, stub_llm: Any, own_provider: str
) -> None:
    # httpx が先: MLflow の書き出しのスレッド(litellm があれば)と同時に初めて読み込むと、
    # openai 3.57 の呼び出しが失敗する
    body = (
        "import httpx, asyncio, openai\n"
        "from chapter8_samples.production_tracing.basic_setup import enable_autologging\n"
        "print(enable_autologging(['openai']))\n"
        "client, aclient = openai.OpenAI(max_retries=0), openai.AsyncOpenAI(max_retries=0)\n"
        "ask = dict(model='gpt-4o-mini', messages=[{'role': 'user', 'content': 'q'}])\n"
        "def chat(number):\n"
        "    with contextlib.suppress(ValueError), mlflow.start_span('chat'):\n"
        "        client.chat.completions.create(**ask)\n"
        "        if number % 5 == 0: raise ValueError(number)\n"
        "async def achat(number):\n"
        "    with mlflow.start_span('achat'):\n"
        "        await aclient.chat.completions.create(**ask)\n"
        "async def many():\n"
        "    await asyncio.gather(*(achat(number) for number in range(15)))\n"
        "sampler = ConditionalSampler(0.4).install()\n"
        "for number in range(15): chat(number)\n"
        "asyncio.run(many())\nreport(sampler)\n"
    )
    report = result(program, body, MLFLOW_USE_DEFAULT_TRACER_PROVIDER=own_provider)
    assert len(stub_llm.requests) == 30
    assert report["kept"] + report["dropped"] == 30 and report["dropped"] > 2
    traces = stored("child")
    assert rules_of(traces)["error"] == 3
    assert_exactly_the_kept_ones(traces, report, spans=2)
    assert all(trace.info.token_usage for trace in traces)


def test_every_error_is_kept_at_200_requests_per_second(program: Any, stored: Any) -> None:
    """毎秒 200 件を 3 秒、エラー 2%、残りは 5%。"""
    body = (
        "setup_production_tracing('child')\n"
        "sampler = ConditionalSampler(0.05, slow_ms=60_000).install()\n"
        "def request(number):\n"
        "    with contextlib.suppress(TimeoutError), mlflow.start_span('request'):\n"
        "        work(number)\n"
        "        if number % 50 == 0: raise TimeoutError('provider')\n"
        "started = time.monotonic()\n"
        "def client(first):\n"
        "    for number in range(first, 600, 4):\n"
        "        time.sleep(max(0.0, started + number / 200 - time.monotonic()))\n"
        "        request(number)\n"
        "threads = [threading.Thread(target=client, args=(first,)) for first in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "report(sampler, seconds=time.monotonic() - started)\n"
    )
    report = result(program, body)
    assert report["kept"] + report["dropped"] == 600
    assert report["seconds"] < 60
    traces = stored("child")
    assert rules_of(traces)["error"] == 12
    assert rules_of(traces)["rest"] < 80  # 588 件の 5% は 29 件
    assert_exactly_the_kept_ones(traces, report, spans=2)
    assert sum("ERROR" in str(trace.info.state) for trace in traces) == 12
