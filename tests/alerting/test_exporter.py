"""公開する指標: 書き出したルールが見るものだけを、Prometheus の決まりどおりの名前で。"""

from __future__ import annotations

import logging
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ports import free_port

from chapter8_samples.alerting.metrics import MetricSample, MetricSourceError, TraceRow
from chapter8_samples.alerting.metrics.exporter import FAILURES, MetricsCollector, serve_metrics
from chapter8_samples.alerting.metrics.measures import NAMED_METRICS, PLAIN_METRICS, RATE_METRICS
from chapter8_samples.alerting.rules import AlertConfig, AlertRule, BurnRateRule, Rule
from chapter8_samples.alerting.tools import RecordedTraces, to_prometheus_rules, watched_series
from chapter8_samples.alerting.tools.exports import series_of

ROOT = Path(__file__).resolve().parents[2]
AT = datetime(2026, 1, 8, tzinfo=timezone.utc)
METRICS = [
    *PLAIN_METRICS,
    *(f'{kind}:it\'s "ok"?' for kind in NAMED_METRICS),
    "slow_rate:3s",
]
SHAPES: list[dict[str, Any]] = [
    {"compare": compare, "by": by, "min_samples": count}
    for compare, by, count in product((None, "1d", "1w"), (None, "model", "tag:テナント"), (0, 30))
]
FAILURE_RATES = {*RATE_METRICS} - {"pass_rate"}


def threshold(metric: str, *, compare: str | None, **_: Any) -> float:
    if compare:
        return 2
    return 0.3 if metric.partition(":")[0] in RATE_METRICS else 5000


EVERYTHING: list[Rule] = [
    *(
        AlertRule(
            name=f"gate {metric} {by}",
            metric=metric,
            threshold=2,
            compare="1w",
            by=by,
            confidence=0.99,
        )
        for metric in METRICS
        for by in (None, "model")
        if metric.partition(":")[0] in RATE_METRICS
    ),
    *(
        AlertRule(
            name=f"{metric} {shape}",
            metric=metric,
            threshold=threshold(metric, **shape),
            no_data="alert",
            **shape,
        )
        for metric in METRICS
        for shape in SHAPES
    ),
    *(
        BurnRateRule(name=f"burn {metric}", metric=metric, min_samples=30)
        for metric in METRICS
        if metric.partition(":")[0] in FAILURE_RATES
    ),
]
SELECTOR = re.compile(r'(llm_app_\w+)(?:\{((?:[^{}"]|"(?:\\.|[^"\\])*")*)\})?')
LABEL = re.compile(r'(\w+)="((?:\\.|[^"\\])*)"')


class Constant:
    """どの指標も求められる出どころ。"""

    def __init__(self, *broken: str) -> None:
        self.broken = broken

    def sample(self, metric: str, window: timedelta, at: datetime) -> MetricSample:
        if metric in self.broken:
            raise MetricSourceError("no answer")
        value = 3000.0 if metric.endswith("_ms") else 0.5
        return MetricSample(value, 40)

    def split(
        self, metric: str, window: timedelta, at: datetime, by: str
    ) -> dict[str, MetricSample]:
        return {label: MetricSample(0.5, 7) for label in ("a", "b")}

    def examples(self, metric: str, window: timedelta, at: datetime, limit: int = 3) -> list[str]:
        return []


def collected(
    config: AlertConfig, source: Any
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    collector = MetricsCollector(watched_series(config), source, clock=lambda: AT)
    samples = [sample for family in collector.collect() for sample in family.samples]
    found = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in samples}
    assert len(found) == len(samples)  # 同じ系列を二度出すと、Prometheus は全体を捨てる
    return found


def selected(config: AlertConfig) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """書き出した式の中の、(名前, ラベル)。"""
    (group,) = to_prometheus_rules(config)["groups"]
    found: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    for rule in group["rules"]:
        for name, labels in SELECTOR.findall(rule["expr"]):
            pairs = ((k, v.replace('\\"', '"')) for k, v in LABEL.findall(labels))
            found.add((name, tuple(sorted(pairs))))
    return found


def test_names_have_base_units() -> None:
    limits = {metric: threshold(metric, compare=None) for metric in METRICS}
    rules = [AlertRule(name="a", metric=metric, threshold=limits[metric]) for metric in METRICS]
    names = {rule.metric: series_of(rule)[0].name for rule in rules}
    assert len(set(names.values())) == len(METRICS)
    assert names["trace_count"] == "llm_app_traces"
    assert names["time_to_first_chunk_p95_ms"] == "llm_app_time_to_first_chunk_p95_seconds"
    assert names["slow_rate:3s"] == "llm_app_slow_ratio"
    assert names["cost_usd_per_request"] == "llm_app_cost_usd_per_request"
    for name in names.values():
        assert re.fullmatch(r"llm_app_[a-z0-9_]+", name)
        assert not re.search(r"_(ms|rate|count)(_|$)|_total$", name)


@pytest.mark.slow
def test_exactly_what_the_exported_rules_name_is_published() -> None:
    config = AlertConfig(rules=EVERYTHING)
    published = collected(config, Constant())
    named = selected(config)
    by_labels = {"model", "tag_____"}
    without = {
        (name, tuple(pair for pair in labels if pair[0] not in by_labels))
        for name, labels in published
    }
    assert named == without
    assert {value for (_, labels) in published for key, value in labels if key in by_labels} == {
        "a",
        "b",
    }


@pytest.mark.slow
def test_values_are_in_the_units_of_the_name_and_ratios_have_none() -> None:
    common: dict[str, Any] = {"metric": "latency_p95_ms", "window": "5m", "min_samples": 30}
    rules = [
        AlertRule(name="plain", threshold=2000, **common),
        AlertRule(name="against last week", compare="1w", threshold=2, **common),
    ]
    config = AlertConfig(rules=rules)
    values = {name: value for (name, _), value in collected(config, Constant()).items()}
    assert values == {
        "llm_app_latency_p95_seconds": 3.0,
        "llm_app_latency_p95_seconds_samples": 40,
        "llm_app_latency_p95_seconds_vs_earlier": 1.0,
        "llm_app_latency_p95_seconds_vs_earlier_samples": 40,
        FAILURES: 0,
    }
    plain, against, _ = to_prometheus_rules(config)["groups"][0]["rules"]
    assert plain["expr"] == (
        '(llm_app_latency_p95_seconds{window="5m"} > 2) '
        'and (llm_app_latency_p95_seconds_samples{window="5m"} >= 30)'
    )
    assert against["expr"] == (
        '(llm_app_latency_p95_seconds_vs_earlier{window="5m",compare="7d"} > 2) '
        'and (llm_app_latency_p95_seconds_vs_earlier_samples{window="5m",compare="7d"} >= 30)'
    )


@pytest.mark.slow
def test_one_failed_request_at_night_is_no_incident_in_prometheus_either() -> None:
    config = AlertConfig(rules=[r for r in AlertConfig.default().rules if r.metric == "error_rate"])
    night = [TraceRow(trace_id="t", at_ms=ms(AT), state="ERROR")]
    day = [TraceRow(trace_id=f"t{i}", at_ms=ms(AT), state="ERROR") for i in range(100)]
    gates = {
        name: {value for (key, _), value in collected(config, RecordedTraces(rows)).items()
               if key == "llm_app_error_ratio_significant"}
        for name, rows in (("night", night), ("day", day))
    }  # fmt: skip
    assert gates == {"night": {0.0}, "day": {1.0}}


@pytest.mark.slow
def test_a_value_that_cannot_be_read_is_counted_and_leaves_the_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rules = [AlertRule(name="a"), AlertRule(name="b", metric="trace_count")]
    values = collected(AlertConfig(rules=rules), Constant("error_rate"))
    assert values == {("llm_app_traces", (("window", "5m"),)): 0.5, (FAILURES, ()): 1}
    assert 'llm_app_error_ratio{window="5m"} could not be read: no answer' in caplog.text


@pytest.mark.slow
def test_a_scrape_that_waits_for_another_gives_up_and_is_counted() -> None:
    """読み出しが返らない間も、読みに来たものが溜まらず、監視は気づく。"""

    class Busy:
        def acquire(self, timeout: float = -1) -> bool:
            assert 0 < timeout < 10
            return False

        __enter__ = acquire

    collector = MetricsCollector(watched_series(AlertConfig(rules=QUIET)), Constant())
    collector._lock = Busy()  # type: ignore[assignment]
    samples = [sample for family in collector.collect() for sample in family.samples]
    assert [(sample.name, sample.value) for sample in samples] == [(FAILURES, 1)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("promtool") is None, reason="apt install prometheus")
def test_promtool_finds_nothing_to_complain_about() -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(MetricsCollector(watched_series(AlertConfig(rules=EVERYTHING)), Constant()))
    done = subprocess.run(
        ["promtool", "check", "metrics", "--extended"],
        input=generate_latest(registry),
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == b""


FIRES: list[Rule] = [
    AlertRule(name="errors", threshold=0.05, min_samples=20, severity="critical"),
    AlertRule(name="ungrounded", metric="pass_rate:groundedness", op="<", threshold=0.8),
    AlertRule(name="votes_stopped", metric="pass_rate:user_thumbs", op="<", threshold=0.1,
              no_data="alert"),
    BurnRateRule(name="budget", metric="fail_rate:groundedness", factor=14.4),
    AlertRule(name="by_model", by="model", threshold=0.5),
    AlertRule(name="traffic", metric="trace_count", compare="1h", op="<", threshold=0.1),
]  # fmt: skip
QUIET: list[Rule] = [AlertRule(name="fast_enough", metric="latency_p95_ms", threshold=2000)]


def bad_hour(now: datetime) -> Iterator[TraceRow]:
    """1 時間前の 5 分に 2,000 件、いまの 5 分に 100 件。いまは、失敗と根拠のない回答が多い。"""
    for second in range(3700, 4000):
        for i in range(10):
            yield TraceRow(trace_id=f"o{second}{i}", at_ms=ms(now) - second * 1000, latency_ms=900)
    for i in range(100):
        failed = i % 4 == 0
        yield TraceRow(
            trace_id=f"t{i}",
            at_ms=ms(now) - i * 2000,
            state="ERROR" if failed else "OK",
            latency_ms=900,
            assessments=(("groundedness", "no" if i % 2 else "yes"),),
            tags={"cost.by_model": f'{{"{"bad" if failed else "good"}": [1, 10, 10, "0.01"]}}'},
        )


def ms(at: datetime) -> int:
    return round(at.timestamp() * 1000)


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[str, Any]]:
    """(Prometheus の URL, 公開しているサーバー)。"""
    now = datetime.now(timezone.utc)
    config = AlertConfig(rules=FIRES + QUIET, evaluation_failure_for="1s")
    traces = RecordedTraces(list(bad_hour(now)))
    collector = MetricsCollector(watched_series(config), traces, clock=lambda: now)
    port, own = free_port(), free_port()
    server = serve_metrics(collector, port=port)
    target = {"job_name": "app", "static_configs": [{"targets": [f"127.0.0.1:{port}"]}]}
    settings = {
        "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [target],
    }
    rules = to_prometheus_rules(config, interval="500ms")
    for name, data in (("prometheus.yml", settings), ("rules.yml", rules)):
        (tmp_path / name).write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    command = ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data"]
    log = (tmp_path / "log").open("w")
    with subprocess.Popen(
        [*command, f"--web.listen-address=127.0.0.1:{own}"], cwd=tmp_path, stdout=log, stderr=log
    ) as process:
        try:
            yield f"http://127.0.0.1:{own}", server
        finally:
            process.terminate()
            server.shutdown()
            log.close()


def firing(url: str) -> dict[str, dict[str, str]]:
    try:
        answer = requests.get(f"{url}/api/v1/alerts", timeout=5).json()
    except (requests.ConnectionError, ValueError):  # まだ起動していない
        return {}
    alerts = [alert for alert in answer["data"]["alerts"] if alert["state"] == "firing"]
    return {alert["labels"]["alertname"]: alert["labels"] for alert in alerts}


def wait_for(url: str, names: set[str]) -> dict[str, dict[str, str]]:
    deadline = time.monotonic() + 60
    while not names <= firing(url).keys():
        assert time.monotonic() < deadline, f"only {sorted(firing(url))} fired"
        time.sleep(0.2)
    return firing(url)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_the_command_publishes_the_rules_of_the_file(tracking_uri: str, tmp_path: Path) -> None:
    import mlflow

    mlflow.set_experiment("app")
    for failed in (True, False):
        with mlflow.start_span("answer") as span:
            span.set_status("ERROR" if failed else "OK")
    mlflow.flush_trace_async_logging()
    rules = [{"name": "errors", "metric": "error_rate", "window": "1h", "threshold": 0.1}]
    config = {"experiment": "app", "offset": "0s", "rules": rules}
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "chapter8_samples.alerting", "serve-metrics"]
    command += [str(tmp_path / "alerts.yaml"), "--tracking-uri", tracking_uri]
    with subprocess.Popen(
        [*command, "--port", str(free_port())], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        text = requests.get(process.stdout.readline().strip(), timeout=60).text
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert 'llm_app_error_ratio{window="1h"} 0.5\n' in text
    assert "llm_app_read_failures_total 0.0\n" in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="apt install prometheus")
def test_a_real_prometheus_scrapes_it_and_the_exported_rules_fire(
    prometheus: tuple[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    url, server = prometheus
    found = wait_for(url, {rule.name for rule in FIRES})
    assert found.keys() == {rule.name for rule in FIRES}
    assert found["errors"]["severity"] == "critical"
    assert found["ungrounded"]["assessment"] == "groundedness"
    assert found["by_model"]["model"] == "bad"
    server.shutdown()
    server.server_close()
    assert "alert_evaluation_failed" in wait_for(url, {"alert_evaluation_failed"})
    assert "could not be read" not in caplog.text
