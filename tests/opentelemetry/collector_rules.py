"""Collector の設定の誤りを、Collector なしで見つける規則(テスト用)。"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

COMPONENTS = ("receivers", "processors", "exporters", "connectors", "extensions")
SIGNALS = ("traces", "metrics", "logs")
# 旧名は別名として残っているが、起動時に警告が出る(いつ消えてもおかしくない)
RENAMED = {
    "otlp": "otlp_grpc",
    "otlphttp": "otlp_http",
    "logging": "debug",
    "resourcedetection": "resource_detection",
    "spanmetrics": "span_metrics",
    "batch": "sending_queue.batch of the exporters",
}
ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")


class _UniqueKeys(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """PyYAML は重複したキーを黙って後勝ちにするが、Collector は拒む。"""


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.YAMLError(f"duplicate key {key!r}")
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def load(text: str) -> dict[str, Any]:
    """環境変数が 1 つもないときの設定。値の ``${env:X:-既定}`` を Collector と同じに展開する。"""
    expanded = _expand(yaml.load(text, _UniqueKeys))
    assert isinstance(expanded, dict)
    return expanded


def _expand(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _expand(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_expand(value) for value in node]
    if isinstance(node, str) and ENV.search(node):
        text = ENV.sub(lambda found: found[2] or "", node)
        return yaml.safe_load(text) if ENV.fullmatch(node) else text
    return node


def problems(text: str) -> list[str]:
    """見つかった誤り。なければ空。"""
    try:
        raw, config = yaml.load(text, _UniqueKeys), load(text)
    except yaml.YAMLError as error:
        return [str(error)]
    checks = (_sections, _names, _pipelines, _connectors, _extensions, _queues, _values)
    found = [problem for check in checks for problem in check(config)]
    return found + list(_substitutions(raw))


def _kind(component: str) -> str:
    return component.split("/")[0]


def _pipelines_of(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, list[str]]]]:
    yield from config["service"]["pipelines"].items()


def _used(config: dict[str, Any], role: str) -> set[str]:
    return {name for _, pipeline in _pipelines_of(config) for name in pipeline.get(role) or []}


def _sections(config: dict[str, Any]) -> Iterator[str]:
    for section in set(config) - {*COMPONENTS, "service"}:
        yield f"unknown section {section}"
    if "address" in config["service"].get("telemetry", {}).get("metrics", {}):
        yield "service.telemetry.metrics.address was removed in 0.128; use readers"


def _names(config: dict[str, Any]) -> Iterator[str]:
    for section in ("processors", "exporters", "connectors"):
        for name in config.get(section) or {}:
            if _kind(name) in RENAMED:
                yield f"{section}.{name}: use {RENAMED[_kind(name)]}"


def _pipelines(config: dict[str, Any]) -> Iterator[str]:
    connectors = set(config.get("connectors") or {})
    for name, pipeline in _pipelines_of(config):
        if _kind(name) not in SIGNALS:
            yield f"{name}: not a signal"
        for role in ("receivers", "processors", "exporters"):
            known = set(config.get(role) or {}) | (connectors if role != "processors" else set())
            for item in pipeline.get(role) or []:
                if item not in known:
                    yield f"{name}: {item} is not defined in {role}"
            if role != "processors" and not pipeline.get(role):
                yield f"{name}: needs {role}"
        from_outside = not set(pipeline.get("receivers") or []) <= connectors
        first = [_kind(item) for item in pipeline.get("processors") or []][:1]
        if from_outside and first != ["memory_limiter"]:
            yield f"{name}: memory_limiter must be the first processor"


def _connectors(config: dict[str, Any]) -> Iterator[str]:
    entered, left = _used(config, "exporters"), _used(config, "receivers")
    for name in config.get("connectors") or {}:
        if name not in entered or name not in left:
            yield f"connector {name} must end one pipeline and start another"
    for name in set(config.get("processors") or {}) - _used(config, "processors"):
        yield f"processors.{name} is used by no pipeline"


def _extensions(config: dict[str, Any]) -> Iterator[str]:
    started, defined = (
        set(config["service"].get("extensions") or []),
        config.get("extensions") or {},
    )
    for name in started ^ set(defined):
        yield f"extension {name} must be both defined and started"
    for name, settings in (config.get("exporters") or {}).items():
        storage = ((settings or {}).get("sending_queue") or {}).get("storage")
        if storage and storage not in started:
            yield f"exporters.{name}: storage {storage} is not started"


def _queues(config: dict[str, Any]) -> Iterator[str]:
    for name, settings in (config.get("exporters") or {}).items():
        if not _kind(name).startswith("otlp"):
            continue
        queue = (settings or {}).get("sending_queue") or {}
        batch = queue.get("batch") or {}
        if not queue.get("storage"):
            yield f"exporters.{name}: no persistent queue; a restart loses spans"
        if not batch.get("min_size", 0) <= batch.get("max_size", 0) <= queue.get("queue_size", 0):
            yield f"exporters.{name}: needs min_size <= max_size <= queue_size"


def _values(config: dict[str, Any]) -> Iterator[str]:
    for name, settings in (config.get("exporters") or {}).items():
        settings = settings or {}
        if _kind(name) == "datadog" and not (settings.get("api") or {}).get("key"):
            yield f"exporters.{name}: api.key is empty without the variable; the collector stops"
        if settings.get("verbosity") == "detailed":
            yield f"exporters.{name}: detailed prints prompts"
        if (settings.get("resource_to_telemetry_conversion") or {}).get("enabled"):
            yield f"exporters.{name}: resource attributes become labels"
    for path, value in _leaves(config):
        if isinstance(value, str) and value.startswith("0.0.0.0"):
            yield f"{path}: listens on all interfaces"
        if value == "deployment.environment":
            yield f"{path}: the attribute is deployment.environment.name"
        if path.startswith("processors.attributes") and value == "deployment.environment.name":
            yield f"{path}: a resource attribute; use the resource processor"
    for name, settings in (config.get("processors") or {}).items():
        for group in (settings or {}).get("trace_statements") or []:
            statements = group["statements"] if isinstance(group, dict) else [group]
            if len({"spanevent." in line for line in statements}) > 1:
                yield f"processors.{name}: a spanevent statement turns the whole group per event"


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, path)
    else:
        yield path, node


def _substitutions(raw: dict[str, Any]) -> Iterator[str]:
    for path, value in _leaves(raw):
        if not isinstance(value, str) or path.startswith("processors.redaction"):
            continue
        if re.search(r"\$(?:[A-Za-z_]|\{(?!env:))", value):
            yield f"{path}: write ${{env:NAME:-default}} instead of {value!r}"
        for name, default in ENV.findall(value):
            if not default:
                yield f"{path}: {name} has no default; the value is empty when it is unset"
