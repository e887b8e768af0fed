"""書き出し: 本物の promtool が受け取る。アラートは、本物の Alertmanager が受け取る。"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ports import free_port

from chapter8_samples._lab.servers.receivers import WebhookReceiver
from chapter8_samples.alerting.delivery import (
    Alert,
    AlertmanagerNotificationHandler,
    AlertSeverity,
    AlertStatus,
)
from chapter8_samples.alerting.rules import (
    AlertConfig,
    AlertConfigError,
    AlertRule,
    BurnRateRule,
)
from chapter8_samples.alerting.tools.exports import (
    expression,
    to_databricks_alert,
    to_prometheus_rules,
)

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (apt install prometheus)"
)
needs_alertmanager = pytest.mark.skipif(
    shutil.which("prometheus-alertmanager") is None,
    reason="Alertmanager is not installed (apt install prometheus-alertmanager)",
)

CONFIG = AlertConfig(
    labels={"service": "bot"},
    rules=[
        AlertRule(
            name="LLMHighErrorRate",
            threshold=0.05,
            clear_threshold=0.03,
            confidence=0.95,
            for_="2m",
            keep_firing_for="5m",
            min_samples=20,
            severity=AlertSeverity.CRITICAL.value,
            runbook_url="https://runbooks.example/errors",
        ),
        AlertRule(name="LLMNoTraffic", metric="trace_count", window="10m", op="<", threshold=1,
                  for_="10m", no_data="alert"),
        AlertRule(name="LLMQuality", metric='pass_rate:a "b"', window="1h", op="<", threshold=0.8,
                  min_samples=30, summary="{{ 合格率 }}"),
        BurnRateRule(name="LLMBudget", objective=0.99, factor=14.4, severity="critical"),
    ],
)  # fmt: skip


def series(name: str, values: str) -> dict[str, str]:
    return {"series": f"llm_app_{name}", "values": values}


def firing(severity: str, window: str, **annotations: str) -> list[dict[str, Any]]:
    labels = {"severity": severity, "service": "bot", "window": window}
    return [{"exp_labels": labels, "exp_annotations": annotations}]


@pytest.mark.slow
@needs_promtool
def test_promtool_accepts_the_rules_and_their_behaviour(tmp_path: Path) -> None:
    write = lambda name, data: (tmp_path / name).write_text(  # noqa: E731
        yaml.safe_dump(data, allow_unicode=True), encoding="utf-8"
    )
    write("rules.yml", to_prometheus_rules(CONFIG))
    write("default.yml", to_prometheus_rules(AlertConfig.default()))
    errors = firing(
        "critical",
        "5m",
        summary="LLMHighErrorRate",
        value="0.2",
        runbook_url="https://runbooks.example/errors",
        not_exported="clear_threshold",
    )
    at = lambda moment, name, alerts: {  # noqa: E731
        "eval_time": moment, "alertname": name, "exp_alerts": alerts
    }  # fmt: skip
    high = [
        series('error_ratio{window="5m"}', "0.01x9 0.2x9 0.01x30"),
        series('error_ratio_samples{window="5m"}', "100x60"),
        series('error_ratio_significant{window="5m",rule="LLMHighErrorRate"}', "0x9 1x60"),
        series('traces{window="10m"}', "100x60"),
        series("read_failures_total", "0x9 1x50"),
    ]
    few = [
        series('error_ratio{window="5m"}', "0.5x40"),
        series('error_ratio_samples{window="5m"}', "3x40"),
    ]
    burn = [
        series('error_ratio{window="1h"}', "0.2x40"),
        series('error_ratio{window="5m"}', "0.2x20 0.0x20"),
    ]
    budget = firing("critical", "1h", summary="LLMBudget", value="0.2")
    traffic = firing("warning", "10m", summary="LLMNoTraffic", value="1")
    labels = {"severity": "critical", "service": "bot"}
    watchdog = {"summary": "alert rules could not be read"}
    blind = [{"exp_labels": labels, "exp_annotations": watchdog | {"value": "1"}}]
    cases = [
        (high, [at("6m", "LLMHighErrorRate", []), at("8m", "LLMHighErrorRate", errors),
                at("14m", "LLMHighErrorRate", errors), at("16m", "LLMHighErrorRate", []),
                at("16m", "LLMNoTraffic", []), at("4m", "alert_evaluation_failed", []),
                at("8m", "alert_evaluation_failed", blind)]),
        (few, [at("10m", "LLMHighErrorRate", []), at("15m", "LLMNoTraffic", traffic),
               at("15m", "alert_evaluation_failed", blind)]),
        (burn, [at("5m", "LLMBudget", budget), at("12m", "LLMBudget", [])]),
    ]  # fmt: skip
    tests = [{"interval": "30s", "input_series": s, "alert_rule_test": c} for s, c in cases]
    write("test.yml", {"rule_files": ["rules.yml"], "evaluation_interval": "30s", "tests": tests})
    for command in (["check", "rules", "rules.yml", "default.yml"], ["test", "rules", "test.yml"]):
        done = subprocess.run(
            ["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_become_these_expressions() -> None:
    expressions = {rule.name: expression(rule) for rule in AlertConfig.default().rules}
    wanted = {
        "high_error_rate": '(llm_app_error_ratio{window="5m"} > 0.05) and ignoring(rule) '
        '(llm_app_error_ratio_significant{window="5m",rule="high_error_rate"} == 1)',
        "slow_p95": '(llm_app_latency_p95_seconds{window="10m"} > 10) '
        'and (llm_app_latency_p95_seconds_samples{window="10m"} >= 30)',
        "no_traffic": 'llm_app_traces{window="1h"} < 1',
        "thumbs_down_rising": "(llm_app_thumbs_down_ratio_vs_earlier"
        '{window="1h",compare="1d",assessment="user_thumbs"} > 1.3) and ignoring(rule) '
        "(llm_app_thumbs_down_ratio_vs_earlier_significant"
        '{window="1h",compare="1d",rule="thumbs_down_rising",assessment="user_thumbs"} == 1)',
        "traffic_drop": '(llm_app_traces_vs_earlier{window="10m",compare="7d"} < 0.05) '
        'and (llm_app_traces_vs_earlier_samples{window="10m",compare="7d"} >= 100)',
    }
    assert {name: expressions[name] for name in wanted} == wanted
    assert expression(CONFIG.rules[2]).startswith(
        '(llm_app_pass_ratio{window="1h",assessment="a \\"b\\""} < 0.8)'
    )
    assert expression(BurnRateRule(name="b", min_samples=30, no_data="alert")) == (
        '(((llm_app_error_ratio{window="1h"} > 0.144) and on() '
        '(llm_app_error_ratio{window="5m"} > 0.144)) '
        'and (llm_app_error_ratio_samples{window="1h"} >= 30)) '
        'or absent(llm_app_error_ratio{window="1h"})'
    )


@pytest.fixture
def alertmanager(tmp_path: Path, webhooks: WebhookReceiver) -> Iterator[str]:
    config = {
        "route": {
            "receiver": "ops",
            "group_by": ["alertname", "service"],
            "group_wait": "100ms",
            "group_interval": "300ms",
            "routes": [{"receiver": "page", "matchers": ['severity="critical"']}],
        },
        "receivers": [
            {"name": "ops", "webhook_configs": [{"url": f"{webhooks.url}/ops"}]},
            {"name": "page", "webhook_configs": [{"url": f"{webhooks.url}/page"}]},
        ],
        "inhibit_rules": [
            {
                "source_matchers": ['severity="critical"'],
                "target_matchers": ['severity="warning"'],
                "equal": ["service"],
            }
        ],
    }
    (tmp_path / "am.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus-alertmanager", "--config.file=am.yml", "--storage.path=data"]
    command += [f"--web.listen-address={address}", "--cluster.listen-address="]
    log = (tmp_path / "am.log").open("w")
    with subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log) as process:
        try:
            wait_until_ready(f"http://{address}", process)
            yield f"http://{address}"
        finally:
            process.terminate()
            log.close()


def wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, "Alertmanager did not start"
        try:
            if requests.get(f"{url}/-/ready", timeout=1).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.05)
    raise TimeoutError("Alertmanager is not ready")


@pytest.mark.slow
@needs_alertmanager
def test_a_live_alertmanager_takes_four_posts_as_one_and_hears_the_end(
    alertmanager: str, webhooks: WebhookReceiver
) -> None:
    handler = AlertmanagerNotificationHandler(alertmanager)
    labels = {"service": "bot"}
    page = Alert(name="errors", severity=AlertSeverity.CRITICAL, labels=labels, summary="多い")
    warn = Alert(name="slow", labels=labels)
    for alert in (page, page, page, page, warn):  # 警告は、重大なものが続く間は知らされない
        assert handler.send(alert).ok
    first = webhooks.wait_for(1, timeout_seconds=10)
    now = datetime.now(timezone.utc)
    handler.send(Alert(name="errors", severity=AlertSeverity.CRITICAL, labels=labels,
                       status=AlertStatus.RESOLVED, starts_at=page.starts_at,
                       ends_at=now - timedelta(milliseconds=1)))  # fmt: skip
    handler.send(warn)
    rest = webhooks.wait_for(3, timeout_seconds=15)[1:]
    heard = lambda hooks: sorted(  # noqa: E731
        (h.path, h.json["status"], h.json["groupLabels"]["alertname"]) for h in hooks
    )
    assert heard(first) == [("/page", "firing", "errors")]
    assert heard(rest) == [("/ops", "firing", "slow"), ("/page", "resolved", "errors")]


def test_a_rule_becomes_a_databricks_alert() -> None:
    pytest.importorskip("databricks.sdk", reason="databricks-sdk is not installed")
    rule = AlertRule(name="slow", metric="latency_p95_ms", window="10m", threshold=3000)
    query = "SELECT percentile_approx(execution_duration_ms, 0.95) AS value FROM traces"
    made = to_databricks_alert(rule, query=query, warehouse_id="w1", destination_ids=["d1"])
    body = made.as_dict()
    assert body["evaluation"]["comparison_operator"] == "GREATER_THAN"
    assert body["evaluation"]["threshold"] == {"value": {"double_value": 3000.0}}
    assert body["evaluation"]["empty_result_state"] == "UNKNOWN"
    assert body["evaluation"]["notification"]["subscriptions"] == [{"destination_id": "d1"}]
    with pytest.raises(AlertConfigError, match="burn rates need two queries"):
        to_databricks_alert(BurnRateRule(name="b"), query="", warehouse_id="")
    with pytest.raises(AlertConfigError, match="destination_ids must be a list, got 'd1'"):
        to_databricks_alert(rule, query=query, warehouse_id="w1", destination_ids="d1")


def test_labels_and_texts_prometheus_would_refuse_are_made_acceptable() -> None:
    rule = AlertRule(name="a", labels={"team-name": "{{ ml }}"}, runbook_url="https://x/{{y}}")
    config = AlertConfig(rules=[rule], labels={"環境": "prod"})
    exported, *_ = to_prometheus_rules(config)["groups"][0]["rules"]
    assert exported["labels"] == {"__": "prod", "team_name": "{ { ml }}", "severity": "warning"}
    assert exported["annotations"]["runbook_url"] == "https://x/{ {y}}"
    (sent,) = AlertmanagerNotificationHandler("http://am").payload(
        Alert(name="a", labels={"team-name": "ml", "1": "x"})
    )
    assert sent["labels"] == {"team_name": "ml", "_1": "x", "alertname": "a", "severity": "warning"}
