"""8.5.3 OTLP の設定値とプリセット。"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.util.re import parse_env_headers

from chapter8_samples.opentelemetry import (
    OtlpConfig,
    OtlpConfigError,
    build_otlp_config,
    preset,
)
from chapter8_samples.opentelemetry.export.config import parse_pairs
from chapter8_samples.opentelemetry.export.presets import PRESETS

# どのプリセットにも足りる環境変数
KEYS = {
    "DATABRICKS_HOST": "https://dbc.cloud.databricks.com",
    "DATABRICKS_TOKEN": "dapi-s3cret",
    "DATABRICKS_UC_TABLE": "main.llm.bot_otel_spans",
    "DD_API_KEY": "dd-s3cret",
    "GRAFANA_API_TOKEN": "glc-s3cret",
    "GRAFANA_INSTANCE_ID": "123",
    "GRAFANA_ZONE": "prod-ap-northeast-0",
    "HONEYCOMB_API_KEY": "hc-s3cret",
    "LANGFUSE_PUBLIC_KEY": "pk-lf",
    "LANGFUSE_SECRET_KEY": "sk-s3cret",
    "MLFLOW_EXPERIMENT_ID": "7",
    "NEW_RELIC_LICENSE_KEY": "nr-s3cret",
}
EXPECTED = {
    "arize_phoenix": "http://127.0.0.1:4317",
    "collector": "http://127.0.0.1:4317",
    "databricks": "https://dbc.cloud.databricks.com/api/2.0/otel/v1/traces",
    "datadog": "https://otlp.datadoghq.com/v1/traces",
    "datadog_agent": "http://127.0.0.1:4317",
    "grafana_cloud": "https://otlp-gateway-prod-ap-northeast-0.grafana.net/otlp/v1/traces",
    "honeycomb": "https://api.honeycomb.io:443/v1/traces",
    "jaeger": "http://127.0.0.1:4317",
    "langfuse": "https://cloud.langfuse.com/api/public/otel/v1/traces",
    "mlflow": "http://127.0.0.1:5000/v1/traces",
    "new_relic": "https://otlp.nr-data.net:4318/v1/traces",
    "tempo": "http://127.0.0.1:4317",
}
HTTP_ONLY = {"databricks", "datadog", "grafana_cloud", "langfuse", "mlflow"}


def test_presets_build_the_documented_endpoints() -> None:
    configs = {name: preset(name, "bot", env=KEYS) for name in PRESETS}
    assert {name: config.endpoint for name, config in configs.items()} == EXPECTED
    assert {config.service_name for config in configs.values()} == {"bot"}
    assert "s3cret" not in repr(configs)
    chosen = preset("datadog", "bot", env=KEYS | {"DD_SITE": "ap1.datadoghq.com"})
    assert chosen.endpoint == "https://otlp.ap1.datadoghq.com/v1/traces"
    assert chosen.headers == {"dd-api-key": "dd-s3cret"}


def test_presets_name_the_variable_they_lack() -> None:
    for name, chosen in PRESETS.items():
        if chosen.headers or chosen.basic_auth:
            wanted = rf"{name}.* needs the environment variable [A-Z_]+"
            with pytest.raises(OtlpConfigError, match=wanted):
                preset(name, "bot", env={})
        else:
            assert preset(name, "bot", env={}).headers == {}


def test_only_receivers_that_speak_grpc_accept_it() -> None:
    for name in PRESETS:
        if name in HTTP_ONLY:
            with pytest.raises(OtlpConfigError, match="only, not 'grpc'"):
                preset(name, "bot", env=KEYS, protocol="grpc")
        else:
            assert preset(name, "bot", env=KEYS, protocol="grpc").protocol == "grpc"


def test_basic_auth_survives_the_environment_variable() -> None:
    config = preset("langfuse", "bot", env=KEYS)
    headers = parse_env_headers(config.to_env()["OTEL_EXPORTER_OTLP_TRACES_HEADERS"], liberal=True)
    scheme, _, encoded = headers["authorization"].partition(" ")
    assert (scheme, base64.b64decode(encoded)) == ("Basic", b"pk-lf:sk-s3cret")
    assert headers["x-langfuse-ingestion-version"] == "4"


def test_preset_reads_values_as_files_and_consoles_give_them() -> None:
    """末尾の改行は鍵に入れず、空白だけの値は「ない」とし、ホストの末尾の / は重ねない。"""
    given = {"DATABRICKS_HOST": "https://dbc.cloud.databricks.com/", "DATABRICKS_TOKEN": "dapi\n"}
    config = preset("databricks", "bot", env=KEYS | given)
    assert config.endpoint == EXPECTED["databricks"]
    assert config.headers["Authorization"] == "Bearer dapi"
    with pytest.raises(OtlpConfigError, match="needs the environment variable DD_API_KEY"):
        preset("datadog", "bot", env={"DD_API_KEY": " "})


def test_unknown_preset_lists_the_names() -> None:
    with pytest.raises(OtlpConfigError, match=r"'dataduck'.*datadog"):
        preset("dataduck", "bot", env=KEYS)


@pytest.mark.parametrize(
    ("endpoint", "protocol", "expected"),
    [
        ("http://c:4318", "http/protobuf", "http://c:4318/v1/traces"),
        ("http://c:4318/", "http/protobuf", "http://c:4318/v1/traces"),
        ("http://c:4318/v1/traces", "http/protobuf", "http://c:4318/v1/traces"),
        ("https://h/otlp", "http/protobuf", "https://h/otlp/v1/traces"),
        ("http://c:4317/v1/traces", "grpc", "http://c:4317"),
        ("https://[::1]:4317", "grpc", "https://[::1]:4317"),
        ("http://c.ns.svc.cluster.local.:4317", "grpc", "http://c.ns.svc.cluster.local.:4317"),
    ],
)
def test_endpoint_gets_the_path_its_protocol_needs(
    endpoint: str, protocol: str, expected: str
) -> None:
    assert build_otlp_config(endpoint, "bot", protocol).endpoint == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "both"}, "mode 'both'"),
        ({"compression": "deflate"}, "compression 'deflate'"),
        ({"timeout_seconds": 0}, "timeout_seconds 0 is wrong: .*greater than 0"),
        ({"timeout_seconds": float("nan")}, "timeout_seconds nan is wrong: "),
        ({"timeout_seconds": float("inf")}, "finite"),
        ({"timeout_seconds": "10"}, "timeout_seconds '10'"),
        ({"certificate_file": "/no/such.pem"}, "does not exist"),
        ({"headers": {"a b": "1"}}, "header name 'a b'"),
        ({"headers": {"x": "s3cret\n"}}, "value of header 'x' is not printable"),
        ({"headers": {"x": "鍵"}}, "value of header 'x' is not printable"),
        ({"headers": {"api-key": None}}, "value of header 'api-key'"),
        ({"headers": {"api-key": " "}}, "value of header 'api-key' .* empty"),
        ({"headers": {"x!key": "s3cret"}}, "'x!key' cannot be sent over grpc"),
        ({"headers": {"x-key-BIN": "s3cret"}}, "'x-key-BIN' cannot be sent over grpc"),
        ({"headers": None}, "headers is NoneType"),
        ({"service_version": 1.2}, "service_version 1.2 is wrong: .* string"),
        ({"deployment_environment": 5}, "deployment_environment 5 is wrong: .* string"),
        ({"service_namespace": ["a"]}, "service_namespace .* is wrong: .* string"),
        ({"resource_attributes": {"a=b": "1"}}, "'a=b'"),
        ({"resource_attributes": {"a": 1}}, "'a' is 1, not str"),
        ({"service_versoin": "1"}, "service_versoin.*service_version"),
    ],
)
def test_wrong_options_name_the_value_and_never_a_secret(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OtlpConfigError, match=message) as raised:
        build_otlp_config("http://c:4317", "bot", **options)
    assert "s3cret" not in str(raised.value)


def test_http_takes_header_names_that_grpc_cannot_send() -> None:
    headers = {"x!key": "1", "x-key-bin": "2"}
    env = build_otlp_config("http://c:4318", "bot", "http/protobuf", headers=headers).to_env()
    assert parse_env_headers(env["OTEL_EXPORTER_OTLP_TRACES_HEADERS"]) == headers


def test_a_config_made_by_hand_is_checked_too() -> None:
    config = build_otlp_config("http://c:4317", "bot")
    assert replace(config, protocol="http/protobuf").endpoint == "http://c:4317/v1/traces"
    for wrong in ({"mode": "both"}, {"endpoint": "c:4317"}, {"service_name": None}):
        with pytest.raises(OtlpConfigError):
            replace(config, **wrong)
    with pytest.raises(OtlpConfigError, match="no scheme"):
        OtlpConfig(endpoint="c:4317", service_name="bot")


def test_becomes_these_variables_and_never_the_generic_endpoint() -> None:
    config = build_otlp_config(
        "http://c:4318", "bot", "http/protobuf", deployment_environment="本番", headers={"k": "v"}
    )
    environment = "deployment.environment.name=%E6%9C%AC%E7%95%AA"
    assert config.to_env() == {
        "MLFLOW_ENABLE_OTEL_GENAI_SEMCONV": "true",
        "MLFLOW_ENABLE_OTLP_EXPORTER": "true",
        "MLFLOW_TRACE_ENABLE_OTLP_DUAL_EXPORT": "true",
        "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE": "",
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION": "gzip",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "k=v",
        "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "10",
        "OTEL_RESOURCE_ATTRIBUTES": f"service.namespace=llm-apps,{environment}",
        "OTEL_SERVICE_NAME": "bot",
    }


def test_resource_attributes_survive_the_environment_variable() -> None:
    values = {"team": "検索, 東京=1", "owner": "a%2Cb"}
    env = build_otlp_config("http://c:4317", "bot", resource_attributes=values).to_env("x=1,,bad")
    read = parse_pairs(env["OTEL_RESOURCE_ATTRIBUTES"])
    assert read == {"x": "1", "service.namespace": "llm-apps", **values}
