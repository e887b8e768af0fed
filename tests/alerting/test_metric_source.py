"""指標: SQLite でもサーバーでも、手で数えた値と同じになる。"""

from __future__ import annotations

import json
import random
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from statistics import quantiles
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.entities import TraceInfo, TraceLocation, TraceState
from ports import free_port

from chapter8_samples._lab.servers.receivers import Answer, WebhookReceiver
from chapter8_samples.alerting.alert_config import AlertConfig, setup_alerting
from chapter8_samples.alerting.delivery import NotificationConfigError
from chapter8_samples.alerting.engine import AlertEngine
from chapter8_samples.alerting.metrics.labels import split_rows
from chapter8_samples.alerting.metrics.measures import (
    MetricSourceError,
    RowNumbers,
    TraceRow,
    measure,
    metric_problem,
    percentile,
)
from chapter8_samples.alerting.metrics.source import (
    EndpointMissingError,
    ServerMetricSource,
    TraceSearch,
    hide_password,
    metric_source,
    query_metrics,
    to_ms,
    to_row,
)
from chapter8_samples.alerting.rules import AlertRule
from chapter8_samples.alerting.tools.backtest import RecordedTraces

START = datetime(2026, 1, 1, 9, 0, tzinfo=timezone.utc)
WINDOW = timedelta(minutes=10)
AT = START + WINDOW


@dataclass(frozen=True)
class Request:
    second: float
    latency_ms: int
    failed: bool
    cost: float
    tokens: int
    verdict: bool | None
    thumb: bool | None
    first_chunk_ms: float | None
    model: str
    tenant: str | None

    @property
    def tags(self) -> dict[str, str]:
        """8.2 が書くタグ、使ったプロンプト、アプリのタグ。"""
        prompts = [{"name": "bot", "version": "2" if self.failed else "1"}]
        usage = [1, self.tokens, 7, str(self.cost)]
        found = {"cost.by_model": json.dumps({self.model: usage, "judge": [1, 1, 1, None]})}
        found["mlflow.linkedPrompts"] = json.dumps(prompts)
        return found | ({"tenant": self.tenant} if self.tenant else {})

    @property
    def metadata(self) -> dict[str, str]:
        """8.1 の ``traced_stream`` が書くメタデータ。"""
        first = self.first_chunk_ms
        return {} if first is None else {"stream.time_to_first_chunk_ms": str(first)}


def traffic(count: int, seed: int = 3) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request(
            second=rng.uniform(-120, 720),  # 窓の外にも
            latency_ms=int(rng.lognormvariate(6.5, 0.6)),
            failed=rng.random() < 0.15,
            cost=round(rng.uniform(0.0001, 0.02), 6),
            tokens=rng.randint(50, 900),
            verdict=rng.random() < 0.8 if rng.random() < 0.7 else None,
            thumb=rng.random() < 0.6 if rng.random() < 0.3 else None,
            first_chunk_ms=round(rng.lognormvariate(5, 0.5), 1) if rng.random() < 0.6 else None,
            model=rng.choice(["small", "large"]),
            tenant=rng.choice(["a", "b", None]),
        )
        for _ in range(count)
    ]


def record(requests: list[Request]) -> None:
    import mlflow
    from mlflow.entities import AssessmentError

    traces: list[str] = []
    for request in requests:
        began = round((START.timestamp() + request.second) * 1e9)
        span: Any = mlflow.start_span_no_context(
            "answer", start_time_ns=began, tags=request.tags, metadata=request.metadata
        )
        usage = {"input_tokens": request.tokens, "output_tokens": 7}
        usage["total_tokens"] = request.tokens + 7
        span.set_attribute("mlflow.chat.tokenUsage", usage)
        cost = {"input_cost": 0.0, "output_cost": request.cost, "total_cost": request.cost}
        span.set_attribute("mlflow.llm.cost", cost)
        if request.failed:
            span.set_status("ERROR")
        span.end(end_time_ns=began + request.latency_ms * 1_000_000)
        traces.append(span.trace_id)
    mlflow.flush_trace_async_logging()
    for request, trace in zip(requests, traces, strict=True):
        if request.verdict is not None:
            mlflow.log_feedback(trace_id=trace, name="relevance", value=request.verdict)
        elif request.failed:
            error = AssessmentError(error_code="TIMEOUT", error_message="judge timed out")
            mlflow.log_feedback(trace_id=trace, name="relevance", error=error)
        if request.thumb is not None:
            thumb = "yes" if request.thumb else "no"
            mlflow.log_feedback(trace_id=trace, name="it's ok?", value=thumb)


def truth(requests: list[Request]) -> dict[str, float]:
    inside = [r for r in requests if 0 < round(r.second * 1000) <= 600_000]
    latency = [float(r.latency_ms) for r in inside]
    cuts = quantiles(latency, n=100, method="inclusive")
    judged = [r.verdict for r in inside if r.verdict is not None]
    broken = sum(r.verdict is None and r.failed for r in inside)
    thumbs = [r.thumb for r in inside if r.thumb is not None]
    cost = sum(r.cost for r in inside)
    first = [r.first_chunk_ms for r in inside if r.first_chunk_ms is not None]
    middle = sorted(latency)[len(latency) // 2]
    return {
        "trace_count": len(inside),
        "error_rate": sum(r.failed for r in inside) / len(inside),
        "latency_p50_ms": cuts[49],
        "latency_p95_ms": cuts[94],
        "latency_p99_ms": cuts[98],
        "time_to_first_chunk_p95_ms": quantiles(first, n=100, method="inclusive")[94],
        "slow_rate:1.2s": sum(value > 1200 for value in latency) / len(latency),
        f"slow_rate:{middle - 0.3:.1f}ms": sum(v >= middle for v in latency) / len(latency),
        "cost_usd": cost,
        "cost_usd_per_hour": cost * 6,
        "cost_usd_per_request": cost / len(inside),
        "input_tokens": sum(r.tokens for r in inside),
        "total_tokens_per_request": sum(r.tokens + 7 for r in inside) / len(inside),
        "pass_rate:relevance": sum(judged) / len(judged),
        "fail_rate:relevance": 1 - sum(judged) / len(judged),
        "scorer_error_rate:relevance": broken / (broken + len(judged)),
        "thumbs_down_rate:it's ok?": thumbs.count(False) / len(thumbs),
        "assessment_count:relevance": broken + len(judged),
    }


def truth_by(requests: list[Request]) -> dict[tuple[str, str, str], float]:
    """(指標, by, ラベル) -> 値。"""
    inside = [r for r in requests if 0 < round(r.second * 1000) <= 600_000]
    groups = {
        ("model", "small"): [r for r in inside if r.model == "small"],
        ("model", "large"): [r for r in inside if r.model == "large"],
        ("model", "judge"): inside,
        ("tag:tenant", "a"): [r for r in inside if r.tenant == "a"],
        ("tag:tenant", "b"): [r for r in inside if r.tenant == "b"],
        ("tag:tenant", "unknown"): [r for r in inside if r.tenant is None],
        ("prompt_version", "bot/1"): [r for r in inside if not r.failed],
        ("prompt_version", "bot/2"): [r for r in inside if r.failed],
    }
    found: dict[tuple[str, str, str], float] = {}
    for (by, label), group in groups.items():
        found["error_rate", by, label] = sum(r.failed for r in group) / len(group)
        found["cost_usd", by, label] = sum(r.cost for r in group) if label != "judge" else 0
        found["trace_count", by, label] = len(group)
    return found


def assert_split(source: Any, requests: list[Request]) -> None:
    expected = truth_by(requests)
    for metric, by in {(metric, by) for metric, by, _ in expected}:
        samples = source.split(metric, WINDOW, AT, by)
        assert samples.keys() == {x for m, b, x in expected if (m, b) == (metric, by)}
        for label, sample in samples.items():
            assert sample.value == pytest.approx(expected[metric, by, label], rel=1e-9), label


def assert_true(source: Any, requests: list[Request]) -> None:
    for metric, expected in truth(requests).items():
        sample = source.sample(metric, WINDOW, AT)
        assert sample.value == pytest.approx(expected, rel=1e-9), metric
        if sample.successes is not None:
            assert sample.successes / sample.n == pytest.approx(expected, rel=1e-9), metric


def as_row(request: Request, index: int) -> TraceRow:
    """保存先を通さずに作った行。"""
    judged = "true" if request.verdict else "false"
    judged = ("error" if request.failed else "") if request.verdict is None else judged
    thumb = {None: "", True: "yes", False: "no"}[request.thumb]
    verdicts = {"relevance": judged, "it's ok?": thumb}
    return TraceRow(
        trace_id=f"tr-{index}",
        at_ms=round((START.timestamp() + request.second) * 1000),
        state="ERROR" if request.failed else "OK",
        latency_ms=request.latency_ms,
        tokens={"input_tokens": request.tokens, "total_tokens": request.tokens + 7},
        cost_usd=request.cost,
        first_chunk_ms=request.first_chunk_ms,
        tags=request.tags,
        assessments=tuple((name, value) for name, value in verdicts.items() if value),
    )


def test_rows_are_counted_like_a_human() -> None:
    requests = traffic(120)
    rows = [as_row(request, index) for index, request in enumerate(requests)]
    assert_true(RecordedTraces(rows), requests)
    assert_split(RecordedTraces(rows), requests)


@pytest.mark.parametrize(
    "metric", ["trace_count", "assessment_count:tone", "cost_usd", "total_tokens"]
)
def test_none_at_all_reads_the_same_from_the_state_file(metric: str) -> None:
    value = measure(metric, 60.0, RowNumbers([])).value
    assert json.dumps(value) == "0.0"  # 0 なら、読み直すと 0.0 になり、Webhook の ID が変わる


def test_a_label_with_too_many_values_is_refused() -> None:
    rows = [TraceRow(trace_id=f"t{i}", at_ms=i, tags={"user": f"u{i}"}) for i in range(51)]
    source = RecordedTraces(rows)
    at = datetime.fromtimestamp(1, timezone.utc)
    with pytest.raises(MetricSourceError, match="by 'tag:user' has 51 values; use a label with"):
        source.split("error_rate", WINDOW, at, "tag:user")
    with pytest.raises(MetricSourceError, match="by 'modle' is not model, prompt_version or tag:"):
        source.split("error_rate", WINDOW, at, "modle")


@given(st.text() | st.sampled_from(['{"a": 1}', "[]", '[{"name": 1}]', '{"m": [1, 2, 3, "x"]}']))
def test_a_tag_that_something_else_wrote_does_not_stop_the_others(text: str) -> None:
    tags = {"cost.by_model": text, "mlflow.linkedPrompts": text}
    row = TraceRow(trace_id="t", at_ms=0, tags=tags)
    for by in ("model", "prompt_version"):
        ((label, (found,)),) = split_rows([row], by).items()
        assert label and found.trace_id == "t"


def test_a_thinned_trace_counts_as_often_as_it_stands_for() -> None:
    rows = [TraceRow(trace_id=f"t{i}", at_ms=i, weight=10.0) for i in range(7)]
    rows.append(TraceRow(trace_id="t7", at_ms=7, state="ERROR"))
    rate = measure("error_rate", 60, RowNumbers(rows))
    assert (rate.value, rate.n, rate.successes) == pytest.approx((1 / 71, 8, 8 / 71))
    assert measure("trace_count", 60, RowNumbers(rows)).value == 71


@pytest.fixture
def experiment(request: pytest.FixtureRequest) -> Iterator[str]:
    import mlflow

    name = f"metrics-{uuid.uuid4().hex[:8]}"
    yield mlflow.set_experiment(name).name


@pytest.mark.slow
def test_sqlite_counts_like_a_human(tracking_uri: str, experiment: str) -> None:
    requests = traffic(120)
    record(requests)
    source = metric_source(experiment)
    assert type(source) is TraceSearch
    assert_true(source, requests)
    assert_split(source, requests)
    assert len(source.examples("error_rate", WINDOW, AT)) == 3


@pytest.mark.slow
def test_the_server_and_the_search_agree_with_the_truth(
    mlflow_server_url: str, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    requests = traffic(60)
    record(requests)
    source = metric_source(experiment)
    assert isinstance(source, ServerMetricSource)
    assert_true(source, requests)
    assert "search_traces instead" not in caplog.text
    assert_split(source, requests)
    assert_true(TraceSearch(experiment), requests)
    empty = source.sample("latency_p95_ms", WINDOW, AT + timedelta(days=9))
    assert (empty.value, empty.n) == (None, 0)
    assert source.sample("cost_usd_per_hour", WINDOW, AT + timedelta(days=9)).value == 0.0
    assert source.sample("error_rate", WINDOW, AT + timedelta(days=9)).value is None


@pytest.mark.slow
def test_the_default_rules_ask_for_each_metric_and_window_once(
    mlflow_server_url: str, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = traffic(60)
    record(requests)
    asked: list[str] = []

    def counted(uri: str, body: Any) -> Any:
        asked.append(json.dumps(body))
        return query_metrics(uri, body)

    monkeypatch.setattr(sys.modules[query_metrics.__module__], "query_metrics", counted)
    engine = AlertEngine(replace(AlertConfig.default(), offset="0s"), metric_source(experiment))
    engine.evaluate(AT)
    assert engine.failures == {}
    assert len(asked) == len({*asked}) <= 18
    truth = RecordedTraces([as_row(request, index) for index, request in enumerate(requests)])
    for rule in engine.config.rules:
        ((metric, window),) = rule.queries()
        found, expected = engine.last_samples()[rule.name], truth.sample(metric, window, AT)
        assert found.n == expected.n
        assert found.value == (expected.value and pytest.approx(expected.value, rel=1e-9))


@pytest.mark.slow
def test_thinned_traces_are_weighted_on_a_server_too(
    mlflow_server_url: str, experiment: str
) -> None:
    import mlflow

    for failed, weight in ((True, "1.0"), (False, "9.0")):
        with mlflow.start_span("answer") as span:
            mlflow.update_current_trace(metadata={"sampling.weight": weight})
            if failed:
                span.set_status("ERROR")
    mlflow.flush_trace_async_logging()
    now = datetime.now(timezone.utc)
    sample = metric_source(experiment).sample("error_rate", WINDOW, now)
    assert (sample.value, sample.n) == (pytest.approx(0.1), 2)
    assert metric_source(experiment).sample("trace_count", WINDOW, now).value == 10


@pytest.mark.slow
def test_an_overridden_feedback_counts_once(mlflow_server_url: str, experiment: str) -> None:
    import mlflow

    with mlflow.start_span("answer") as span:
        pass
    mlflow.flush_trace_async_logging()
    first: Any = mlflow.log_feedback(trace_id=span.trace_id, name="relevance", value=False)
    mlflow.override_feedback(trace_id=span.trace_id, assessment_id=first.assessment_id, value=True)
    now = datetime.now(timezone.utc)
    for source in (metric_source(experiment), TraceSearch(experiment)):
        sample = source.sample("pass_rate:relevance", WINDOW, now)
        assert (sample.value, sample.n) == (1.0, 1)


def test_an_experiment_that_is_not_there_is_no_silence(tracking_uri: str) -> None:
    import mlflow

    mlflow.delete_experiment(mlflow.create_experiment("gone"))
    for name, problem in (("nobody", "'nobody' does not exist"), ("gone", "'gone' is deleted")):
        with pytest.raises(MetricSourceError, match=f"experiment {problem}"):
            metric_source(name)


def advance_clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    later = time.monotonic() + seconds
    module = sys.modules[TraceSearch.__module__]
    monkeypatch.setattr(module, "monotonic", lambda: later, raising=False)


class Served(ServerMetricSource):
    """検索では 1 件のトレースが見つかる。それが間引いたものなら、間引きを探しても見つかる。"""

    def __init__(self, url: str, row: TraceRow) -> None:
        self.row, self.searched = row, list[str]()
        super().__init__("app", url)

    def _find(self) -> None:
        self._id, self._find_again_at = "1", float("inf")

    def rows(
        self, start_ms: int, end_ms: int, where: str = "", limit: int | None = None
    ) -> list[TraceRow]:
        self.searched.append(where)
        return [] if where and self.row.weight == 1 else [self.row]


def counted(traces: int) -> Answer:
    point = {"dimensions": {"trace_status": "OK"}, "values": {"COUNT": traces}}
    return Answer(body=json.dumps({"data_points": [point]}).encode())


def test_a_missing_endpoint_is_replaced_by_the_search_until_it_is_there(
    webhooks: WebhookReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    source = Served(webhooks.url, TraceRow(trace_id="t", at_ms=to_ms(AT)))
    webhooks.script(404, 404, counted(7), 403)
    assert source.sample("trace_count", WINDOW, AT).value == 1
    assert source.sample("error_rate", WINDOW, AT).value == 0
    assert caplog.text.count("search_traces instead") == 1
    assert source.sample("trace_count", WINDOW, AT).value == 7  # サーバーを入れ替える間だけの 404
    with pytest.raises(MetricSourceError, match="answered 403"):
        source.sample("trace_count", WINDOW, AT + WINDOW)


def test_a_short_window_is_part_of_the_long_one_that_was_searched(
    webhooks: WebhookReceiver,
) -> None:
    source = Served(webhooks.url, TraceRow(trace_id="t", at_ms=to_ms(AT) - 300_000, weight=9))
    webhooks.script(counted(7))
    assert source.sample("trace_count", WINDOW, AT).value == 9
    assert source.sample("trace_count", WINDOW / 10, AT).value == 7  # 間引きの始まる前か終わった後
    assert source.split("trace_count", WINDOW / 10, AT, "model") == {}
    assert len(source.searched) == 2
    assert source.sample("trace_count", WINDOW * 2, AT).value == 9
    assert len(source.searched) == 4  # もっと長い期間は、読み直す


def test_an_experiment_that_was_made_anew_is_followed(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    client: Any = mlflow.MlflowClient()
    old = client.create_experiment("app")
    search = TraceSearch("app")
    client.rename_experiment(old, "app-old")
    new = client.create_experiment("app")
    assert search.experiment_id == old  # 毎回は引かない
    advance_clock(monkeypatch, 601)
    assert search.experiment_id == new
    client.delete_experiment(new)
    advance_clock(monkeypatch, 1202)
    with pytest.raises(MetricSourceError, match="experiment 'app' is deleted"):
        search.rows(0, 1)


def test_a_search_asks_first_whether_the_server_is_there(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow の再試行に任せると、落ちたサーバーを 4 分待つ。"""
    import mlflow

    mlflow.set_experiment("app")
    search, asked = TraceSearch("app"), list[str]()
    search.tracking_uri = "http://mlflow.example"

    def down(uri: str, endpoint: str, *_: Any) -> None:
        asked.append(endpoint)
        raise MetricSourceError("cannot read traces: refused")

    monkeypatch.setattr(sys.modules[TraceSearch.__module__], "_rest", down)
    with pytest.raises(MetricSourceError, match="refused"):
        search.rows(0, 1)
    assert asked == ["/health"]


def test_a_database_that_is_down_is_a_source_that_cannot_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def down(_: str) -> None:
        raise OSError("cannot connect to postgresql://app:pw@db/mlflow")

    monkeypatch.setattr("mlflow.tracing.client.TracingClient", down)
    with pytest.raises(MetricSourceError, match=r"postgresql://\*\*\*@db/mlflow"):
        TraceSearch("app", "postgresql://app:pw@db/mlflow")


@pytest.mark.parametrize(
    ("metric", "hint"),
    [
        ("eror_rate", "did you mean 'error_rate'"),
        ("pass_rate", "write pass_rate:<assessment name>"),
        ("error_rate:x", "unknown metric"),
        ("pass_rate:", "unknown metric"),
        ("slow_rate", "'' is not a limit; write slow_rate:3s"),
        ("slow_rate:fast", "'fast' is not a limit"),
        ("slow_rat:3s", "did you mean 'slow_rate'"),
        ("", "known: trace_count"),
    ],
)
def test_a_misspelt_metric_gets_a_hint(metric: str, hint: str) -> None:
    assert hint in metric_problem(metric)
    with pytest.raises(MetricSourceError, match=hint):
        measure(metric, 60, RowNumbers([]))


def test_a_scorer_without_pass_and_fail_is_refused() -> None:
    row = TraceRow(trace_id="t", at_ms=0, assessments=(("tone", "friendly"),))
    with pytest.raises(MetricSourceError, match=r"needs yes/no values, found \['friendly'\]"):
        measure("pass_rate:tone", 60, RowNumbers([row]))


def test_a_time_without_a_zone_is_refused(tracking_uri: str) -> None:
    import mlflow

    mlflow.set_experiment("naive")
    with pytest.raises(MetricSourceError, match="has no timezone"):
        metric_source("naive").sample("trace_count", WINDOW, datetime(2026, 1, 1))


@given(st.text() | st.sampled_from(["0", "-1", "nan", "inf", "1e309", "", "10", " 2.5 "]))
def test_a_broken_weight_counts_as_one_trace(text: str) -> None:
    place = TraceLocation.from_experiment_id("1")
    info = TraceInfo("tr-1", place, 0, TraceState.OK, trace_metadata={"sampling.weight": text})
    weight = to_row(info).weight
    assert 0 < weight < float("inf")
    assert weight == 1.0 or weight == float(text)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 9)), min_size=2, max_size=30))
def test_a_weight_is_as_good_as_that_many_copies(pairs: list[tuple[float, int]]) -> None:
    copies = [value for value, weight in pairs for _ in range(weight)]
    cuts = quantiles(copies, n=100, method="inclusive")
    for q in (50, 95, 99):
        assert percentile(pairs, q) == pytest.approx(cuts[q - 1], rel=1e-9, abs=1e-9)


def test_the_receivers_of_the_configuration_are_notified(
    tracking_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    mlflow.create_experiment("app")
    quiet = AlertRule(name="quiet", metric="trace_count", op="<", threshold=1, no_data="alert")
    rules, receivers = [quiet], {"ops": {"type": "console"}}
    setup_alerting("app", AlertConfig(rules=rules, receivers=receivers)).evaluate()
    assert "quiet" in capsys.readouterr().out
    secret = {"ops": {"type": "slack", "url_env": "CH8_UNSET_URL"}}
    with pytest.raises(NotificationConfigError, match=r"CH8_UNSET_URL \(receiver ops\)"):
        setup_alerting("app", AlertConfig(rules=rules, receivers=secret))


@pytest.mark.slow
def test_a_window_too_large_to_read_completely_is_logged(
    tracking_uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    mlflow.set_experiment("app")
    for _ in range(3):
        with mlflow.start_span("answer"):
            pass
    mlflow.flush_trace_async_logging()
    search, now = TraceSearch("app"), to_ms(datetime.now(timezone.utc) + timedelta(minutes=1))
    assert len(search.rows(0, now)) == 3 and "newest" not in caplog.text
    monkeypatch.setattr(sys.modules[TraceSearch.__module__], "MAX_TRACES", 2)
    assert len(search.rows(0, now)) == 2
    assert "read only the newest 2 traces" in caplog.text


def test_a_password_in_the_tracking_uri_reaches_no_message_and_no_link(
    tracking_uri: str, webhooks: WebhookReceiver
) -> None:
    import mlflow

    mlflow.set_experiment("app")
    search = TraceSearch("app")
    search.tracking_uri = "https://app:p%40ss@mlflow.example/"
    assert search.trace_url("tr-1").startswith("https://mlflow.example/#/experiments/")
    secret = webhooks.url.replace("//", "//app:p%40ss@")
    webhooks.script(404)
    with pytest.raises(EndpointMissingError) as missing:
        query_metrics(secret, {})
    with pytest.raises(MetricSourceError) as unreachable:
        TraceSearch("app", f"http://app:p%40ss@127.0.0.1:{free_port()}")
    for message in (str(missing.value), str(unreachable.value)):
        assert "p%40ss" not in message and "***@127.0.0.1" in message
    hidden = hide_password("failed at postgresql://app:p@ss@db:5432/mlflow?x=1 and http://h/a@b")
    assert hidden == "failed at postgresql://***@db:5432/mlflow?x=1 and http://h/a@b"
