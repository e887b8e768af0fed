"""sampling と sampling_strategies: 残すと決めたものだけが、欠けずに保存される。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import os
import random
import signal
import statistics
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import mlflow
import mlflow.tracing.provider as provider_module
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry.sdk.trace import ReadableSpan, SynchronousMultiSpanProcessor
from opentelemetry.trace import SpanContext, TraceFlags

from chapter8_samples.production_tracing import sampling as tail_sampling
from chapter8_samples.production_tracing.metadata_tagging import incoming_trace, run_with_context
from chapter8_samples.production_tracing.policies import Decision, TraceSummary
from chapter8_samples.production_tracing.sampling import TailSampler, unit_hash
from chapter8_samples.production_tracing.sampling_strategies import (
    AdaptiveRate,
    AdaptiveSampler,
    ConditionalSampler,
    KeepRules,
    ProbabilisticSampler,
    weighted_estimates,
)


def half(summary: TraceSummary) -> Decision:
    if summary.is_error:
        return Decision(1.0, "error")
    return Decision(0.5, "rest")


@mlflow.trace(span_type="LLM")
def llm(number: int) -> int:
    return number


@mlflow.trace
def plain(number: int) -> int:
    return llm(number)


@mlflow.trace
def handled_error(number: int) -> int:
    with contextlib.suppress(ZeroDivisionError):
        broken(number)
    return number


@mlflow.trace
def broken(number: int) -> float:
    return number / 0


@mlflow.trace
async def gathered(number: int) -> int:
    async def one(index: int) -> int:
        return llm(index)

    return sum(await asyncio.gather(*(one(index) for index in range(3))))


@mlflow.trace
def streamed(number: int) -> Any:
    for index in range(2):
        llm(index)
        yield index


@mlflow.trace
def threaded(number: int) -> int:
    with ThreadPoolExecutor(2) as pool:
        return sum(run_with_context(pool, llm, i).result() for i in range(2))


SHAPES: list[tuple[Callable[[int], Any], int]] = [
    (plain, 2),
    (handled_error, 2),
    (lambda number: asyncio.run(gathered(number)), 4),
    (lambda number: list(streamed(number)), 3),
    (threaded, 3),
]


def make_traces(count: int) -> None:
    for number in range(count):
        SHAPES[number % len(SHAPES)][0](number)


@pytest.mark.slow
@pytest.mark.parametrize("use_async", ["true", "false"])
def test_exactly_the_kept_traces_are_stored_with_all_children(
    collected: Any, monkeypatch: pytest.MonkeyPatch, use_async: str
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", use_async)
    mlflow.set_experiment("tail")
    sampler = TailSampler(half).install()
    make_traces(60)
    traces = collected()
    assert sampler.kept == len(traces) and sampler.kept + sampler.dropped == 60
    assert rules(traces)["error"] == 12 and sampler.dropped > 5
    expected = {"plain": 2, "handled_error": 2, "gathered": 4, "streamed": 3, "threaded": 3}
    for trace in traces:
        ids = {span.span_id for span in trace.data.spans}
        assert len(ids) == expected[trace.data.spans[0].name if len(ids) == 1 else _root(trace)]
        assert all(span.parent_id is None or span.parent_id in ids for span in trace.data.spans)
        assert "IN_PROGRESS" not in str(trace.info.state)
        probability = float(trace.info.trace_metadata["sampling.probability"])
        assert float(trace.info.trace_metadata["sampling.weight"]) == 1 / probability
    assert not sampler._open
    manager = InMemoryTraceManager.get_instance()
    assert not manager._traces and not manager._otel_id_to_mlflow_trace_id


def rules(traces: list[Any]) -> Counter[str]:
    return Counter(trace.info.trace_metadata["sampling.rule"] for trace in traces)


def _root(trace: Any) -> str:
    return next(span.name for span in trace.data.spans if span.parent_id is None)


@pytest.mark.slow
def test_over_a_server(mlflow_server_url: str, stored: Any) -> None:
    mlflow.set_experiment("tail-server")
    sampler = TailSampler(half).install()
    make_traces(30)
    assert len(stored("tail-server")) == sampler.kept


@pytest.mark.slow
def test_dual_export_asks_once_and_the_weight_reaches_otlp(
    tracking_uri: str, stored: Any, otlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", otlp.http_endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    monkeypatch.setenv("MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT", "true")
    mlflow.set_experiment("tail-dual")
    asked: list[str] = []

    def policy(summary: TraceSummary) -> Decision:
        asked.append(summary.trace_id)
        return half(summary)

    sampler = TailSampler(policy).install()
    make_traces(30)
    traces = stored("tail-dual")
    provider: Any = mlflow.tracing.get_bridged_tracer_provider()
    provider.force_flush()
    assert len(asked) == len(set(asked)) == 30
    kept = {trace.info.trace_id for trace in traces}
    otlp.wait_for(spans=sum(len(trace.data.spans) for trace in traces))
    roots = [span for span in otlp.spans if not span.parent_span_id]
    assert {f"tr-{span.trace_id}" for span in roots} == kept
    assert len(otlp.spans) == sum(len(trace.data.spans) for trace in traces)
    weights = {t.info.trace_id: t.info.trace_metadata["sampling.weight"] for t in traces}
    # 8.5 の設定を済ませたプロセスでは、重みは数値で届く
    sent = {f"tr-{s.trace_id}": float(s.attributes["sampling.weight"]) for s in roots}
    assert sent == {trace_id: float(weights[trace_id]) for trace_id in sent}
    assert sampler.kept == len(traces)


@pytest.mark.slow
def test_survives_every_way_the_provider_is_rebuilt(tracking_uri: str, stored: Any) -> None:
    mlflow.set_experiment("first")
    sampler = TailSampler(lambda _summary: Decision(0.0, "none")).install()
    for rebuild in (
        lambda: mlflow.set_experiment("second"),
        lambda: mlflow.tracing.reset(),
        lambda: (mlflow.tracing.disable(), mlflow.tracing.enable()),
    ):
        rebuild()
        plain(1)
    assert sampler.dropped == 3
    sampler.uninstall()
    plain(1)
    assert len(stored("second")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rebuild", ["set_experiment", "enable"])
def test_uninstall_gives_back_every_trace_after_a_rebuild(
    tracking_uri: str, stored: Any, rebuild: str
) -> None:
    mlflow.set_experiment("before")
    if rebuild == "enable":
        mlflow.tracing.disable()
    sampler = ProbabilisticSampler(0.0).install()
    mlflow.tracing.enable()
    mlflow.set_experiment("after")
    plain(1)
    assert sampler.dropped == 1
    sampler.uninstall()
    plain(2)
    plain(3)
    assert len(stored("after")) == 2


def test_a_policy_that_fails_or_returns_no_decision_keeps_and_counts(
    collected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mlflow.set_experiment("no decision")
    answers: list[Any] = [None, 0.5, (1.0, "rule")]
    for answer in answers:
        sampler = TailSampler(lambda _summary, answer=answer: answer).install()
        plain(1)
        assert f"policy returned {answer!r}; return a Decision" in caplog.text
        sampler.uninstall()
    TailSampler(lambda _summary: 1 / 0).install()  # type: ignore[arg-type,return-value]
    plain(1)
    assert rules(collected()) == {"policy_error": 4}


@pytest.mark.slow
@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_late_child_follows_the_decision(
    tracking_uri: str, stored: Any, probability: float
) -> None:
    mlflow.set_experiment("late")
    sampler = TailSampler(lambda _summary: Decision(probability, "fixed")).install()
    root = mlflow.start_span_no_context("root")
    late = mlflow.start_span_no_context("late", parent_span=root)
    root.end()
    late.end()
    with mlflow.start_span("next"):  # 遅れた子を待つトレースは、次の送信のときに保存される
        pass
    traces = {trace.data.spans[0].name: trace for trace in stored("late")}
    assert len(traces) == (2 if probability else 0)
    if probability:
        assert sorted(len(trace.data.spans) for trace in traces.values()) == [1, 2]
    assert not sampler._open


@pytest.mark.slow
def test_open_traces_are_bounded_and_evicted_ones_are_kept(
    tracking_uri: str, stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail_sampling, "MAX_OPEN_TRACES", 3)
    mlflow.set_experiment("bounded")
    sampler = TailSampler(lambda _s: Decision(0.0, "none")).install()
    roots = [mlflow.start_span_no_context(f"root{index}") for index in range(6)]
    for root in roots:
        mlflow.start_span_no_context("child", parent_span=root).end()
    assert len(sampler._open) == 3
    for root in roots:
        root.end()
    traces = stored("bounded")
    assert rules(traces) == {"evicted": 3} and (sampler.kept, sampler.dropped) == (3, 3)
    assert {len(trace.data.spans) for trace in traces} == {2}


def test_only_one_sampler_at_a_time(tracking_uri: str) -> None:
    first = TailSampler(half).install()
    assert first.install() is first
    with pytest.raises(RuntimeError, match="uninstall"):
        ProbabilisticSampler(0.5).install()
    first.uninstall()
    first.uninstall()
    with pytest.raises(ValueError, match="within"):
        ProbabilisticSampler(1.1)


@pytest.mark.slow
def test_concurrent_requests_count_exactly(collected: Any) -> None:
    mlflow.set_experiment("threads")
    sampler = TailSampler(half).install()
    threads = [threading.Thread(target=make_traces, args=(20,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sampler.kept + sampler.dropped == 160
    assert len(collected()) == sampler.kept


@pytest.mark.slow
def test_joined_traces_are_not_decided_here(tracking_uri: str, stored: Any) -> None:
    mlflow.set_experiment("remote")
    with mlflow.start_span("caller"):
        headers = mlflow.tracing.get_tracing_context_headers_for_http_request()
    stored("remote")
    sampler = TailSampler(lambda _summary: Decision(0.0, "none")).install()
    with incoming_trace(headers, join_caller=True):
        plain(1)
    (trace,) = stored("remote")
    assert {span.name for span in trace.data.spans} == {"caller", "plain", "llm"}
    assert sampler.dropped == 0


@pytest.mark.parametrize("flags", ["00", "01"])
def test_an_own_trace_is_decided_here_whatever_traceparent_came_in(
    collected: Any, flags: str
) -> None:
    mlflow.set_experiment("own")
    sampler = TailSampler(half).install()
    for number in range(30):
        with incoming_trace({"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-{flags}"}):
            plain(number)
    traces = collected()
    assert sampler.kept + sampler.dropped == 30 and not sampler._open
    assert len(traces) == sampler.kept and 0 < sampler.kept < 30
    assert {len(trace.data.spans) for trace in traces} == {2}


def test_a_tracer_taken_before_install_is_sampled_too(collected: Any) -> None:
    """OpenTelemetry の計装は、MLflow のプロバイダーから作った tracer を持ち続ける。"""
    mlflow.set_experiment("bridged")
    tracer = mlflow.tracing.get_bridged_tracer_provider().get_tracer("instrumentor")
    sampler = TailSampler(lambda _summary: Decision(0.0, "none")).install()
    with tracer.start_as_current_span("bridged"):
        pass
    assert sampler.dropped == 1 and not collected()
    sampler.uninstall()
    with tracer.start_as_current_span("bridged"):
        pass
    assert len(collected()) == 1


def test_a_trace_open_at_install_is_stored_whole(collected: Any) -> None:
    mlflow.set_experiment("open")
    root = mlflow.start_span_no_context("root")
    early = mlflow.start_span_no_context("early", parent_span=root)
    sampler = TailSampler(lambda _summary: Decision(0.0, "none")).install()
    mlflow.start_span_no_context("later", parent_span=root).end()
    early.end()
    root.end()
    (trace,) = collected()
    assert len(trace.data.spans) == 3
    assert sampler.dropped == 0 and not sampler._open


def test_uninstall_leaves_mlflow_as_it_was(tracking_uri: str) -> None:
    mlflow.set_experiment("as it was")
    plain(1)
    provider: Any = mlflow.tracing.get_bridged_tracer_provider()
    tracer = provider.get_tracer("mine")

    def state() -> list[Any]:
        pipeline = provider._active_span_processor
        processors = pipeline._span_processors
        module = {k: v for k, v in vars(provider_module).items() if callable(v)}
        return [
            *(type(pipeline), processors, [dict(vars(p)) for p in processors]),
            *(provider.sampler, tracer.sampler, tracer.span_processor is pipeline, module),
        ]

    before = state()
    assert before[0] is SynchronousMultiSpanProcessor
    sampler = ProbabilisticSampler(0.5).install()
    changed = {name for name, value in before[-1].items() if state()[-1][name] is not value}
    assert changed == {"_initialize_tracer_provider"} and state()[1:3] == before[1:3]
    sampler.uninstall()
    assert state() == before


def test_a_moved_internal_is_named_and_nothing_stays_attached(
    collected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow.set_experiment("moved")
    plain(1)
    with monkeypatch.context() as patch:
        patch.delattr(provider_module, "_initialize_tracer_provider")
        with pytest.raises(AttributeError, match="_initialize_tracer_provider"):
            ProbabilisticSampler(0.0).install()
    plain(2)
    assert len(collected()) == 2


# ---- MLflow なしで、仕組みだけを試す ----


def a_span(trace_id: int, number: int, *, flags: int = 1) -> Any:
    """``number`` が 0 ならルート。"""
    context = SpanContext(trace_id, number + 1, is_remote=False, trace_flags=TraceFlags(flags))
    parent = SpanContext(trace_id, 1, is_remote=False) if number else None
    return ReadableSpan("span", context=context, parent=parent, start_time=1, end_time=2)


@settings(max_examples=50)
@given(st.permutations([(trace, number) for trace in range(1, 5) for number in range(4)]))
def test_whatever_ends_first_a_trace_is_sent_whole_or_not_at_all(
    order: list[tuple[int, int]],
) -> None:
    sampler = TailSampler(lambda trace: Decision(float(trace.trace_id.endswith("3")), "third"))
    sent: list[ReadableSpan] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tail_sampling, "MAX_OPEN_TRACES", 3)
        for trace_id in range(1, 5):  # 4 つめが始まると、1 つめはあふれて残る
            sampler.span_started(a_span(trace_id, 0))
    for trace_id, number in order:
        sampler.span_ended(a_span(trace_id, number), sent.append)
    ids = [(span.context.trace_id, span.context.span_id) for span in sent]
    assert sorted(ids) == [(trace_id, span) for trace_id in (1, 3) for span in (1, 2, 3, 4)]
    assert (sampler.kept, sampler.dropped) == (2, 2) and not sampler._open


def test_uninstall_sends_what_it_holds(tracking_uri: str) -> None:
    sampler = TailSampler(lambda _trace: Decision(0.0, "none")).install()
    sent: list[ReadableSpan] = []
    sampler.span_started(a_span(1, 0))
    sampler.span_ended(a_span(1, 1), sent.append)
    assert not sent
    sampler.uninstall()
    sampler.span_ended(a_span(1, 0), sent.append)
    assert [span.context.span_id for span in sent] == [2, 1]


def test_a_span_that_is_recorded_but_not_sampled_is_not_counted() -> None:
    """アプリ自身のプロバイダーには、計測のためだけに記録するサンプラー(``RECORD_ONLY``)もある。"""
    sampler, sent = TailSampler(lambda _trace: Decision(0.0, "none")), list[ReadableSpan]()
    sampler.span_started(a_span(1, 0, flags=0))
    sampler.span_ended(a_span(1, 0, flags=0), sent.append)
    assert len(sent) == 1 and sampler.dropped == 0


def test_a_trace_evicted_while_the_policy_thinks_is_sent_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tail_sampling, "MAX_OPEN_TRACES", 1)
    roots = [a_span(1, 0), a_span(2, 0)]

    def policy(_trace: TraceSummary) -> Decision:
        sampler.span_started(roots[1])
        return Decision(0.0, "none")

    sampler = TailSampler(policy)
    sent: list[ReadableSpan] = []
    sampler.span_started(roots[0])
    sampler.span_ended(a_span(1, 1), sent.append)
    sampler.span_ended(roots[0], sent.append)
    assert len(sent) == 2 and dict(sent[1].attributes or {})["sampling.rule"] == "evicted"


# ---- 規則 ----


@pytest.mark.slow
def test_rules(tracking_uri: str, stored: Any) -> None:
    mlflow.set_experiment("rules")
    sampler = ConditionalSampler(0.0, slow_ms=60_000, vip_users=["boss"]).install()
    plain(1)
    with mlflow.start_span("vip"):
        mlflow.update_current_trace(user="boss")
    with mlflow.start_span("forced"):
        mlflow.update_current_trace(tags={"sampling.keep": "true"})
    with mlflow.start_span("state"):
        mlflow.update_current_trace(state="ERROR")
    handled_error(1)
    start = mlflow.start_span_no_context("slow", start_time_ns=1_700_000_000_000_000_000)
    start.end(end_time_ns=1_700_000_061_000_000_000)
    assert {_root(t): t.info.trace_metadata["sampling.rule"] for t in stored("rules")} == {
        "vip": "vip",
        "forced": "forced",
        "state": "error",
        "handled_error": "error",
        "slow": "slow",
    }
    assert sampler.dropped == 1


def test_one_vip_written_as_a_string_is_refused() -> None:
    with pytest.raises(ValueError, match="vip_users='alice' must be a list of user ids"):
        ConditionalSampler(0.1, vip_users="alice")
    assert KeepRules(vip_users=["alice"]).vip_users == {"alice"}


@pytest.mark.slow
def test_head_sampling_records_the_weight_and_respects_overrides(collected: Any) -> None:
    mlflow.set_experiment("head")
    sampler = ProbabilisticSampler(0.3).install()

    @mlflow.trace(sampling_ratio_override=1.0)
    def always() -> None: ...

    for number in range(100):
        plain(number)
    always()
    traces = collected()
    weights = {_root(trace): trace.info.trace_metadata["sampling.weight"] for trace in traces}
    assert float(weights["plain"]) == pytest.approx(1 / 0.3) and weights["always"] == "1.0"
    assert {len(t.data.spans) for t in traces if _root(t) == "plain"} == {2}
    assert sampler.kept == len(traces) and sampler.kept + sampler.dropped == 101
    kept = len(traces)
    sampler.uninstall()
    for number in range(20):
        plain(number)
    assert len(collected()) == kept + 20


@pytest.mark.slow
def test_ratio_in_the_environment_is_part_of_the_weight(
    collected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", "0.5")
    mlflow.set_experiment("environment")
    sampler = ConditionalSampler(0.5).install()

    @mlflow.trace(sampling_ratio_override=1.0)
    def always() -> None: ...

    for rebuild in ("first", "second"):
        for number in range(60):
            plain(number)
            always()
        traces = collected()
        weights = {_root(trace): set[str]() for trace in traces}
        for trace in traces:
            weights[_root(trace)].add(trace.info.trace_metadata["sampling.weight"])
        assert weights == {"plain": {"4.0"}, "always": {"2.0"}}, rebuild
        mlflow.tracing.reset()
    assert sampler.kept + sampler.dropped == 240 and sampler.kept == len(traces)
    sampler.uninstall()
    plain(1)
    provider: Any = mlflow.tracing.get_bridged_tracer_provider()
    assert type(provider.sampler._root).__name__ == "_MlflowSampler"


# ---- 推定 ----


@given(st.text(max_size=40))
def test_unit_hash_is_a_fraction(trace_id: str) -> None:
    assert 0.0 <= unit_hash(trace_id) < 1.0
    assert unit_hash(trace_id) == unit_hash(trace_id)


def fake(weight: float | None, error: bool, cost: float | None) -> Any:
    metadata = {} if weight is None else {"sampling.weight": repr(weight)}
    info = SimpleNamespace(
        trace_metadata=metadata,
        tags={},
        state="ERROR" if error else "OK",
        cost=None if cost is None else {"total_cost": cost},
    )
    return SimpleNamespace(info=info)


def test_estimates_of_a_census_are_exact() -> None:
    found = weighted_estimates([fake(None, index < 2, 0.5) for index in range(10)])
    assert (found.count, found.error_rate, found.total_cost_usd) == (10, 0.2, 5.0)
    assert (found.count_se, found.error_rate_se, found.total_cost_usd_se) == (0, 0, 0)
    assert (found.mean_cost_usd, found.unpriced_traces) == (0.5, 0)


def test_unknown_cost_is_counted_not_zero() -> None:
    found = weighted_estimates([fake(2.0, False, None), fake(2.0, True, 1.0)])
    assert (found.unpriced_traces, found.mean_cost_usd, found.total_cost_usd) == (1, 1.0, 2.0)
    empty = weighted_estimates([])
    assert empty.count == 0 and empty.error_rate is None and empty.mean_cost_usd is None


def simulate(
    seed: int, rest: Callable[[], float], clock: list[float], size: int
) -> dict[str, float]:
    """1 回の運用: 負荷の急増と一緒にエラーが増える。"""
    rng = random.Random(seed)
    errors, cost_total, kept = 0, 0.0, []
    for index in range(size):
        spike = 0.3 * size < index < 0.6 * size
        clock[0] += rng.expovariate(100 if spike else 30)
        error = rng.random() < (0.05 if spike else 0.01)
        slow = rng.random() < 0.03
        cost = rng.lognormvariate(-6, 1) * (3 if slow else 1) * (0.2 if error else 1)
        errors += error
        cost_total += cost
        probability = 1.0 if error or slow else rest()
        if rng.random() < probability:
            kept.append(fake(1 / probability, error, cost))
    found = weighted_estimates(kept)
    return {
        "error_rate": (found.error_rate or 0) / (errors / size) - 1,
        "count": found.count / size - 1,
        "total": found.total_cost_usd / cost_total - 1,
        "mean": (found.mean_cost_usd or 0) / (cost_total / size) - 1,
        "z": (found.count - size) / found.count_se,
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_weights_are_unbiased(kind: str) -> None:
    """30 回 x 100,000 リクエストで、偏りが 1% 以内(かつ標準誤差の 3 倍以内)。"""
    runs = []
    for seed in range(30):
        clock = [0.0]
        adaptive = AdaptiveRate(600, clock=lambda clock=clock: clock[0])
        rest = adaptive if kind == "adaptive" else lambda: 0.05
        runs.append(simulate(seed, rest, clock, 100_000))
    for name in ("error_rate", "count", "total", "mean"):
        values = [run[name] for run in runs]
        bias = statistics.mean(values)
        error = statistics.stdev(values) / math.sqrt(len(values))
        print(f"{kind} {name}: {bias:+.3%} (s.e. {error:.3%})")
        assert abs(bias) <= 0.01 and abs(bias) <= 3 * error + 0.001
    # 標準誤差も正しい: z の散らばりは 1 に近い
    assert 0.5 < statistics.stdev(run["z"] for run in runs) < 1.6


@pytest.mark.slow
def test_adaptive_follows_the_load() -> None:
    clock, rng = [0.0], random.Random(1)
    rate = AdaptiveRate(60, clock=lambda: clock[0])
    kept, arrived, now = [0] * 31, [0] * 31, 0.0
    for seconds, per_minute in ((300, 100), (600, 6000), (600, 300), (300, 20)):
        end = now + seconds
        while (now := now + rng.expovariate(per_minute / 60)) < end:
            clock[0] = now
            arrived[int(now // 60)] += 1
            kept[int(now // 60)] += rng.random() < rate()
        now = end
    errors = [abs(k - min(60, n)) for k, n in zip(kept[:30], arrived[:30], strict=True)]
    assert kept[5] <= 2 * 60
    assert statistics.mean(errors) <= 10


@pytest.mark.slow
def test_adaptive_sampler_end_to_end(collected: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # トレース ID は毎回変わり、推定値はおよそ 120 回に 1 回、標準誤差の 4 倍より外れる
    draws = itertools.count()
    monkeypatch.setattr(tail_sampling, "unit_hash", lambda _id: unit_hash(str(next(draws))))
    mlflow.set_experiment("adaptive")
    ticks = iter(range(10_000))
    sampler = AdaptiveSampler(60, clock=lambda: next(ticks) * 0.1).install()
    for number in range(100):  # 毎分 600 件
        plain(number)
    traces = collected()
    assert len(traces) == sampler.kept < 60
    found = weighted_estimates(traces)
    assert abs(found.count - 100) < 4 * found.count_se
    with pytest.raises(ValueError, match="must be > 0"):
        AdaptiveRate(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="only on POSIX: fork")
def test_a_fork_while_another_thread_decides_leaves_the_child_working(tracking_uri: str) -> None:
    mlflow.set_experiment("tail")
    sampler = TailSampler(half).install()
    llm(1)
    with sampler._lock:  # 別のスレッドが判断している間のフォーク
        child = os.fork()
        if child == 0:
            sampler.span_started(a_span(1, 0))
            os._exit(sampler.kept + sampler.dropped)
    code: list[int] = []
    waiting = threading.Thread(target=lambda: code.append(os.waitpid(child, 0)[1]), daemon=True)
    waiting.start()
    waiting.join(20)
    if not code:
        os.kill(child, signal.SIGKILL)
    assert code == [0]  # 子は、親の件数を自分のものとして数えない
    assert sampler.kept + sampler.dropped == 1
