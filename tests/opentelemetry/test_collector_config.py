"""8.5.4 otel-collector-config.yaml の構造。以前の版にあった誤りは、規則が見つける。"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from typing import Any

import yaml
from opentelemetry.semconv.resource import ResourceAttributes

from chapter8_samples.production_tracing.masking import mask_pii

from .collector_rules import load, problems
from .conftest import CONFIG
from .pii_cases import CREDENTIALS, HARMLESS, PII

TEXT = CONFIG.read_text(encoding="utf-8")
PLAIN = yaml.safe_load(TEXT)


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    """いまの設定に誤りを 1 つ入れたもの。"""
    config = copy.deepcopy(PLAIN)
    change(config)
    return json.dumps(config, ensure_ascii=False)  # JSON は YAML でもある


def test_has_no_known_mistake() -> None:
    assert problems(TEXT) == []


def _datadog(config: dict[str, Any]) -> None:
    config["exporters"]["datadog"] = {"api": {"key": "${env:DD_API_KEY}"}}


def _attributes(config: dict[str, Any]) -> None:
    action = {"key": "deployment.environment.name", "value": "production", "action": "upsert"}
    config["processors"]["attributes"] = {"actions": [action]}
    config["service"]["pipelines"]["traces/in"]["processors"].append("attributes")


def _old_names(config: dict[str, Any]) -> None:
    config["exporters"]["otlp/tempo"] = config["exporters"].pop("otlp_grpc/tempo")


def _batch(config: dict[str, Any]) -> None:
    config["processors"]["batch"] = {}
    config["service"]["pipelines"]["traces/in"]["processors"].insert(0, "batch")


def _all_interfaces(config: dict[str, Any]) -> None:
    config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] = "0.0.0.0:4317"


def _event_group(config: dict[str, Any]) -> None:
    groups = config["processors"]["transform/after"]["trace_statements"]
    groups[0]["statements"] += groups.pop()["statements"]


MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "removed telemetry key": (
        lambda c: c["service"]["telemetry"]["metrics"].update(address="127.0.0.1:8888"),
        "address was removed",
    ),
    "vendor exporter without a key": (_datadog, "api.key is empty"),
    "attributes instead of resource": (_attributes, "use the resource processor"),
    "deprecated environment attribute": (
        lambda c: c["processors"]["resource/defaults"]["attributes"][0].update(
            key="deployment.environment"
        ),
        "deployment.environment.name",
    ),
    "old exporter name": (_old_names, "use otlp_grpc"),
    "batch before memory_limiter": (_batch, "memory_limiter must be the first"),
    "prints prompts": (
        lambda c: c["exporters"]["debug"].update(verbosity="detailed"),
        "prints prompts",
    ),
    "all interfaces": (_all_interfaces, "all interfaces"),
    "resource attributes as labels": (
        lambda c: c["exporters"]["prometheus"].update(
            resource_to_telemetry_conversion={"enabled": True}
        ),
        "become labels",
    ),
    "queue in memory": (
        lambda c: c["exporters"]["otlp_http/mlflow"]["sending_queue"].pop("storage"),
        "no persistent queue",
    ),
    "storage not started": (
        lambda c: c["service"]["extensions"].remove("file_storage/queue"),
        "storage file_storage/queue is not started",
    ),
    "typo in a pipeline": (
        lambda c: c["service"]["pipelines"]["traces/in"]["processors"].append("redaction/pi"),
        "redaction/pi is not defined",
    ),
    "bare variable": (
        lambda c: c["exporters"]["otlp_http/mlflow"].update(endpoint="$MLFLOW_SERVER_URL"),
        "instead of '$MLFLOW_SERVER_URL'",
    ),
    "required variable": (
        lambda c: c["exporters"]["otlp_http/mlflow"].update(endpoint="${env:MLFLOW_SERVER_URL}"),
        "has no default",
    ),
    "span statements that run per event": (_event_group, "per event"),
}


def test_finds_every_mistake() -> None:
    for name, (change, message) in MISTAKES.items():
        found = problems(broken(change))
        assert any(message in problem for problem in found), (name, found)


def test_finds_a_duplicate_key() -> None:
    assert problems(TEXT + "\nexporters: {}\n") == ["duplicate key 'exporters'"]


def test_no_span_takes_two_ways_to_one_exporter() -> None:
    """既定でも、切り替えた後でも、1 つのスパンが同じ送信先へ 2 回行かない。"""
    pipelines = load(TEXT)["service"]["pipelines"]
    traces = {name: p for name, p in pipelines.items() if name.startswith("traces")}
    assert [name for name, p in traces.items() if "otlp" in p["receivers"]] == ["traces/in"]
    assert [name for name, p in traces.items() if "span_metrics" in p["exporters"]] == ["traces/in"]
    exporters = [item for p in traces.values() for item in p["exporters"]]
    assert len(exporters) == len(set(exporters))


def test_no_exporter_gives_up_before_its_receiver_comes_back() -> None:
    for name, settings in load(TEXT)["exporters"].items():
        if name.startswith("otlp"):
            assert settings["retry_on_failure"]["max_elapsed_time"] == "0s", name


def test_masks_before_it_cuts_and_before_anything_leaves() -> None:
    pipelines = load(TEXT)["service"]["pipelines"]
    order = pipelines["traces/in"]["processors"]
    assert order.index("redaction/pii") < order.index("transform/after")
    assert "tail_sampling" not in order  # メトリクスは間引く前の全件から


def test_sampling_rules_are_those_of_the_app() -> None:
    from chapter8_samples.production_tracing import KeepRules

    policies = {p["name"]: p for p in load(TEXT)["processors"]["tail_sampling"]["policies"]}
    rules = KeepRules()
    assert policies["slow"]["latency"]["threshold_ms"] == rules.slow_ms - 1
    key = policies["forced"]["string_attribute"]["key"]
    assert key == f"mlflow.traceTag.{rules.keep_tag}"
    assert policies["error"]["status_code"]["status_codes"] == ["ERROR"]


def test_one_table_holds_for_the_app_and_for_the_collector() -> None:
    for hide in (mask_pii().text, masked):
        for secret in PII:
            for text in (f"連絡先は {secret} です", f"連絡先は{secret}です", f"?q={secret}&x=1"):
                assert secret not in hide(text), (hide, text)
        for text, secret in CREDENTIALS.items():
            assert secret not in hide(text), (hide, text)
        for text in HARMLESS:
            assert hide(text) == text, (hide, text)


@functools.cache
def blocked_values() -> list[re.Pattern[str]]:
    """redaction/pii の規則。Collector の \\b と \\w は ASCII だけを見る。"""
    patterns = load(TEXT)["processors"]["redaction/pii"]["blocked_values"]
    return [re.compile(pattern, re.ASCII) for pattern in patterns]


def masked(text: str) -> str:
    for pattern in blocked_values():
        text = pattern.sub("****", text)
    return text


def test_masks_what_follows_an_escape_and_keeps_the_json() -> None:
    """JSON にすると、改行は n に、「は」は u306f になって、番号や鍵の直前の文字になる。"""
    for secret in PII:
        for before in ("連絡先は", "これだ", "連絡先\n", "\t", "\r\n"):
            _check_masked(secret, before)


def _check_masked(secret: str, before: str) -> None:
    plain = {"question": f"{before}{secret}\n以上", "other": 1}
    for escaped in {False, secret.isascii()}:
        once = json.dumps(plain, ensure_ascii=escaped)
        twice = json.dumps(once, ensure_ascii=escaped)
        for text, inside in ((once, masked(once)), (twice, json.loads(masked(twice)))):
            assert secret not in masked(text) and "****" in masked(text)
            assert json.loads(inside).keys() == plain.keys()


def test_resource_attribute_names_follow_the_convention() -> None:
    keys = [a["key"] for a in load(TEXT)["processors"]["resource/defaults"]["attributes"]]
    assert ResourceAttributes.SERVICE_NAMESPACE in keys
    assert "deployment.environment.name" in keys
