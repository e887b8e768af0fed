"""プロセスの中の指標: 行から数えた値、MLflow に記録された値と同じになる。"""

from __future__ import annotations

import pickle
import random
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chapter8_samples.alerting.alert_config import AlertConfig
from chapter8_samples.alerting.alert_engine import AlertEngine
from chapter8_samples.alerting.alert_replay import SyntheticTraffic
from chapter8_samples.alerting.in_process_metrics import (
    InProcessMetricSource,
    Slot,
    bucket_of,
    bucket_value,
)
from chapter8_samples.alerting.metric_source import metric_source
from chapter8_samples.alerting.trace_metrics import (
    PLAIN_METRICS,
    MetricSourceError,
    RowNumbers,
    TraceRow,
    measure,
    percentile,
)

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
WINDOW = timedelta(minutes=10)
JUDGED = ("pass_rate:relevance", "thumbs_down_rate:user_feedback", "feedback_rate:user_feedback")


def fed(rows: list[TraceRow], **options: Any) -> InProcessMetricSource:
    source = InProcessMetricSource(**options)
    for row in rows:
        source.record(row)
    return source


@pytest.mark.parametrize("metric", [*PLAIN_METRICS, *JUDGED, "scorer_error_rate:relevance"])
@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_counts_are_exact_and_percentiles_within_one_percent(metric: str, weight: float) -> None:
    rows = [
        replace(row, weight=weight if row.state == "OK" else 1.0)
        for row in SyntheticTraffic(traces=2000, hours=2).rows()
    ]
    source = fed(rows)
    for minute in (20, 60, 110):
        at = START + timedelta(minutes=minute)
        end = round(at.timestamp() * 1000) + 10_000  # 区画の終わり
        low = end - 600_000
        inside = RowNumbers([row for row in rows if low <= row.at_ms < end])
        value, n, successes = measure(metric, 600, inside)
        sample = source.sample(metric, WINDOW, at)
        within = 0.01 if metric.startswith("latency_p") else 1e-9
        assert (sample.value, sample.n) == (pytest.approx(value, rel=within), n)
        assert sample.successes == pytest.approx(successes)


@given(st.lists(st.floats(0.001, 1e7), min_size=1, max_size=200), st.sampled_from([50, 95, 99]))
def test_any_percentile_is_within_one_percent(values: list[float], q: int) -> None:
    slot = Slot()
    for value in values:
        slot.add(TraceRow(trace_id="", at_ms=0, latency_ms=value))
    exact = percentile([(value, 1.0) for value in values], q)
    assert slot.latency_ms(f"p{q}") == pytest.approx(exact, rel=0.0101)


@given(st.floats(0.001, 1e9))
def test_a_bucket_stands_for_its_values(value: float) -> None:
    assert bucket_value(bucket_of(value)) == pytest.approx(value, rel=0.0101)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 600_000), st.floats(0, 1e5)),
                max_size=60))  # fmt: skip
def test_merged_workers_are_one_process(items: list[tuple[int, int, float]]) -> None:
    base = round(START.timestamp() * 1000)
    rows = [
        (worker, TraceRow(trace_id=f"t{i}", at_ms=base + at, latency_ms=ms, cost_usd=ms))
        for i, (worker, at, ms) in enumerate(items)
    ]
    alone = fed([row for _, row in rows])
    snapshots = [fed([r for w, r in rows if w == k]).snapshot() for k in range(3)]
    merged = InProcessMetricSource.merged(pickle.loads(pickle.dumps(snapshots)))
    for metric in ("trace_count", "latency_p95_ms", "cost_usd"):
        whole = alone.sample(metric, WINDOW, START + WINDOW)
        assert merged.sample(metric, WINDOW, START + WINDOW).n == whole.n
        assert merged.sample(metric, WINDOW, START + WINDOW).value == pytest.approx(whole.value)
    slowest = ("latency_p95_ms", WINDOW, START + WINDOW)
    assert merged.examples(*slowest) == alone.examples(*slowest)


def test_real_spans_are_counted_as_mlflow_records_them(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import mlflow.tracing

    # MLflow 3.17 は、まとめ送りの切れ目をまたいだトレースのコストを取りこぼすことがある
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    mlflow.set_experiment("app")
    source = InProcessMetricSource()
    mlflow.tracing.configure(span_processors=[source.span_processor()])
    try:
        for i in range(12):
            record_nested_trace(i)
    finally:
        mlflow.tracing.configure(span_processors=[])
    at, stored = datetime.now(timezone.utc), metric_source("app")
    for metric in ("trace_count", "error_rate", "cost_usd", "input_tokens", "total_tokens"):
        expected = stored.sample(metric, WINDOW, at)
        found = source.sample(metric, WINDOW, at)
        assert (found.value, found.n) == (pytest.approx(expected.value), expected.n), metric
    failed = {trace.trace_id for trace in stored_failures(stored, at)}
    assert set(source.examples("error_rate", WINDOW, at)) == failed
    assert len(failed) == 3
    latency = source.sample("latency_avg_ms", WINDOW, at).value
    assert latency == pytest.approx(stored.sample("latency_avg_ms", WINDOW, at).value, abs=20)


def record_nested_trace(i: int) -> None:
    import mlflow

    with mlflow.start_span("answer") as root:
        with mlflow.start_span("retry"):
            for attempt in range(2):
                with mlflow.start_span("llm") as call:
                    usage = {"input_tokens": 10 * i, "output_tokens": 3}
                    usage["total_tokens"] = 10 * i + 3
                    call.set_attribute("mlflow.chat.tokenUsage", usage)
                    call.set_attribute("mlflow.llm.cost", {"total_cost": 0.001 * attempt})
        if i % 2:  # 親がまとめた値を持つなら、子の分は足さない
            total = {"input_tokens": 7, "output_tokens": 7, "total_tokens": 14}
            root.set_attribute("mlflow.chat.tokenUsage", total)
        if i % 4 == 3:
            root.set_status("ERROR")


def stored_failures(stored: Any, at: datetime) -> list[TraceRow]:
    return stored.numbers(WINDOW, at).worst("error_rate")


def test_feedback_is_counted_and_a_silent_scorer_is_an_error() -> None:
    source = InProcessMetricSource(clock=lambda: (START + WINDOW).timestamp() - 20)
    for i, value in enumerate([True, True, "No", None]):
        source.record_feedback("relevance", value, trace_id=f"t{i}")
    sample = source.sample("pass_rate:relevance", WINDOW, START + WINDOW)
    assert (sample.value, sample.n) == (pytest.approx(2 / 3), 3)
    assert source.sample("scorer_error_rate:relevance", WINDOW, START + WINDOW).value == 0.25
    assert source.examples("pass_rate:relevance", WINDOW, START + WINDOW) == ["t2"]
    assert source.examples("scorer_error_rate:relevance", WINDOW, START + WINDOW) == ["t3"]
    source.record_feedback("relevance", True, at=START - timedelta(hours=1))  # 窓の外
    assert source.sample("pass_rate:relevance", WINDOW, START + WINDOW).n == 3


def test_the_ring_forgets_the_oldest_and_stays_small() -> None:
    keep = timedelta(minutes=10)
    source = InProcessMetricSource(keep=keep)
    base = round(START.timestamp() * 1000)
    for second in range(0, 3 * 3600, 5):
        source.record(TraceRow(trace_id="t", at_ms=base + second * 1000))
    assert len(source.snapshot()) == 20 * 6  # keep と余裕の 10 分
    source.record(TraceRow(trace_id="late", at_ms=base))  # 遅すぎる記録は捨てる
    assert min(source.snapshot()) > base // 10_000
    assert source.sample("trace_count", keep, START + timedelta(hours=3)).value == 118
    with pytest.raises(MetricSourceError, match=r"0:11:00 is not between 10 s and keep=0:10:00"):
        source.sample("trace_count", timedelta(minutes=11), START)


def test_a_window_below_a_slot_and_a_naive_time_are_refused() -> None:
    source = InProcessMetricSource()
    with pytest.raises(MetricSourceError, match="is not between 10 s"):
        source.sample("trace_count", timedelta(seconds=5), START)
    with pytest.raises(MetricSourceError, match="has no timezone"):
        source.sample("trace_count", WINDOW, datetime(2026, 1, 1))
    with pytest.raises(MetricSourceError, match="did you mean 'error_rate'"):
        source.sample("eror_rate", WINDOW, START)


def test_nothing_happened_is_no_data() -> None:
    source = InProcessMetricSource()
    assert source.sample("latency_p95_ms", WINDOW, START).value is None
    assert source.sample("error_rate", WINDOW, START).value is None
    assert source.sample("trace_count", WINDOW, START).value == 0


def test_no_record_is_lost_between_threads() -> None:
    source = InProcessMetricSource()
    base = round(START.timestamp() * 1000)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for i in range(2000):
            at_ms = base + rng.randrange(590_000)
            source.record(TraceRow(trace_id=f"{seed}-{i}", at_ms=at_ms, latency_ms=1.0))
            if i % 100 == 0:
                source.sample("latency_p95_ms", WINDOW, START + WINDOW)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    inside = source.snapshot()
    assert sum(slot.states()["OK"].seen for slot in inside.values()) == 8000


def test_traces_that_never_end_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from chapter8_samples.alerting import in_process_metrics

    monkeypatch.setattr(in_process_metrics, "MAX_OPEN_SPANS", 5)
    spans = in_process_metrics.OpenSpans()

    class Child:
        span_id, parent_id = "c", "p"

        def __init__(self, trace_id: str) -> None:
            self.trace_id = trace_id

        def get_attribute(self, key: str) -> dict[str, float]:
            return {"total_cost": 1.0}

    for i in range(50):
        assert spans.end(Child(f"t{i}"), lambda: 0.0) is None
    assert len(spans) == 5


def test_the_default_rules_find_the_incident_without_a_server() -> None:
    traffic = SyntheticTraffic()
    source = fed(traffic.rows(), keep=timedelta(hours=7))
    engine = AlertEngine(AlertConfig(rules=[AlertConfig.default().rules[0]]), source)
    step = timedelta(seconds=30)
    alerts = [a for i in range(30, 720) for a in engine.evaluate(traffic.start + i * step)]
    assert [a.status.value for a in alerts] == ["firing", "resolved"]
    ((began, _),) = traffic.incidents()
    assert timedelta(0) < alerts[0].starts_at - began <= timedelta(minutes=5)
    assert len(alerts[0].examples) == 3
