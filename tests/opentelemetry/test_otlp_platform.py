"""8.5.3 基盤が付けた OTEL_* は残り、引数が替えれば警告になる。送り先の誤りは、直し方が分かる。"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlflow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.opentelemetry import (
    OtlpConfigError,
    build_otlp_config,
    disable_otlp_export,
    flush_all,
    otlp_status,
    preset,
    setup_genai_metrics,
    setup_otlp_export,
    setup_otlp_via_collector,
)
from chapter8_samples.opentelemetry.endpoint import split_endpoint
from chapter8_samples.opentelemetry.export.config import format_pairs, parse_pairs

KEY = "s3cret-key"


def platform(**settings: str) -> None:
    """``TRACES_HEADERS="k=v"`` のように、OTEL_EXPORTER_OTLP_ を除いて書く。"""
    for name, value in settings.items():
        prefix = "" if name.startswith("OTEL_") else "OTEL_EXPORTER_OTLP_"
        os.environ[prefix + name] = value


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["TRACES_", ""])
def test_the_settings_of_the_platform_reach_the_receiver(
    tracking_uri: str, otlp: OtlpReceiver, tmp_path: Path, scope: str
) -> None:
    certificate = tmp_path / "ca.pem"
    certificate.write_text("")
    settings = {
        "ENDPOINT": otlp.http_endpoint if scope else otlp.http_endpoint.removesuffix("/v1/traces"),
        "PROTOCOL": "http/protobuf",
        "HEADERS": f"api-key={KEY},x-team=search%20team",
        "CERTIFICATE": str(certificate),
        "TIMEOUT": "7",
        "COMPRESSION": "deflate",
    }
    platform(**{f"{scope}{name}": value for name, value in settings.items()})
    platform(OTEL_SERVICE_NAME="from-platform", OTEL_RESOURCE_ATTRIBUTES="service.namespace=shop")
    before = dict(os.environ)
    status = setup_otlp_export()
    assert status.service_name == "from-platform" and status.protocol == "http/protobuf"
    assert not [warning for warning in status.warnings if "metric" not in warning]
    assert os.environ["OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE"] == str(certificate)
    assert os.environ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"] == "7"
    with mlflow.start_span("answer"):
        pass
    assert flush_all().complete
    headers = otlp.requests[-1].headers
    assert (headers["api-key"], headers["x-team"]) == (KEY, "search team")
    assert headers["content-encoding"] == "deflate"
    resource = otlp.spans[0].resource
    assert (resource["service.name"], resource["service.namespace"]) == ("from-platform", "shop")
    disable_otlp_export()
    assert dict(os.environ) == before


def test_an_override_by_an_argument_is_a_warning_without_the_secret(
    tracking_uri: str, otlp: OtlpReceiver, tmp_path: Path
) -> None:
    platform(
        TRACES_ENDPOINT=f"http://user:{KEY}@platform:4317?key={KEY}",
        TRACES_PROTOCOL="http/protobuf",
        TRACES_HEADERS=f"Api-Key={KEY},x-team=search",
        TRACES_TIMEOUT="7",
        OTEL_SERVICE_NAME="from-platform",
        OTEL_RESOURCE_ATTRIBUTES="service.version=1,team=search,deployment.environment.name=prod",
    )
    status = setup_otlp_export(
        otlp.grpc_endpoint,
        "bot",
        "grpc",
        mode="otlp_only",
        headers={"api-key": "mine"},
        timeout_seconds=5,
        service_version="2",
        deployment_environment="prod",
        resource_attributes={"team": "chat"},
    )
    told = "\n".join(status.warnings)
    for name in ("ENDPOINT", "PROTOCOL", "HEADERS", "TIMEOUT"):
        assert f"OTEL_EXPORTER_OTLP_TRACES_{name}" in told
    assert "service_name='bot' overrides OTEL_SERVICE_NAME='from-platform'" in told
    assert "service.version='2' overrides OTEL_RESOURCE_ATTRIBUTES service.version='1'" in told
    assert "team='chat' overrides" in told and "prod" not in told
    assert KEY not in told and "mine" not in told
    with mlflow.start_span("answer"):
        pass
    flush_all()
    headers = otlp.requests[-1].headers
    assert (headers["api-key"], headers["x-team"]) == ("mine", "search")
    assert otlp.spans[0].resource["service.name"] == "bot"


def test_the_same_value_twice_is_no_override(tracking_uri: str) -> None:
    platform(TRACES_ENDPOINT="http://c:4318/v1/traces", OTEL_SERVICE_NAME="bot")
    status = setup_otlp_export("http://c:4318", "bot", "http/protobuf", timeout_seconds=1)
    assert status.warnings == ()


def test_a_second_setup_does_not_take_the_first_for_the_platform(tracking_uri: str) -> None:
    setup_otlp_export("http://a:4317", "one", headers={"api-key": KEY}, timeout_seconds=1)
    status = setup_otlp_export("http://b:4317", "two")
    assert status.warnings == ()
    assert "OTEL_EXPORTER_OTLP_TRACES_HEADERS" not in os.environ
    assert os.environ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"] == "10"
    again = setup_otlp_export("http://b:4317", "two")
    assert again == status == otlp_status()


def test_a_config_without_headers_leaves_those_of_the_platform(
    tracking_uri: str, otlp: OtlpReceiver
) -> None:
    platform(HEADERS=f"api-key={KEY}", TRACES_COMPRESSION="gzip", TRACES_CERTIFICATE="/no/ca.pem")
    config = build_otlp_config(otlp.grpc_endpoint, "bot", mode="otlp_only", compression="none")
    gone, none = sorted(setup_otlp_export(config).warnings)
    assert "TRACES_CERTIFICATE='/no/ca.pem' does not exist" in gone
    assert "compression='none' overrides OTEL_EXPORTER_OTLP_TRACES_COMPRESSION='gzip'" in none
    assert os.environ["OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE"] == "/no/ca.pem"
    with mlflow.start_span("answer"):
        pass
    flush_all()
    assert otlp.requests[-1].headers["api-key"] == KEY
    assert "grpc-encoding" not in otlp.requests[-1].headers


def test_the_environment_name_of_the_platform_wins_over_a_default(tracking_uri: str) -> None:
    platform(OTEL_RESOURCE_ATTRIBUTES="deployment.environment.name=staging")
    assert setup_otlp_via_collector("bot", "http://127.0.0.1:4317").warnings == ()
    assert "deployment.environment.name=staging" in os.environ["OTEL_RESOURCE_ATTRIBUTES"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"TRACES_TIMEOUT": "soon"},
            "timeout_seconds 'soon' .*TRACES_TIMEOUT",
        ),
        ({"PROTOCOL": "http/json"}, r"'http/json' .*from .*OTEL_EXPORTER_OTLP_PROTOCOL"),
        ({"COMPRESSION": "zstd"}, r"compression 'zstd' .*from OTEL_EXPORTER_OTLP_COMPRESSION"),
        ({"HEADERS": "a b=s3cret"}, "header name 'a b'"),
    ],
)
def test_a_wrong_setting_of_the_platform_is_named(settings: dict[str, str], message: str) -> None:
    env = {f"OTEL_EXPORTER_OTLP_{name}": value for name, value in settings.items()}
    with pytest.raises(OtlpConfigError, match=message) as raised:
        build_otlp_config("http://c:4317", "bot", env=env)
    assert "s3cret" not in str(raised.value)


def test_nothing_given_says_what_to_write() -> None:
    with pytest.raises(OtlpConfigError, match="not a URL; write http://HOST:PORT"):
        build_otlp_config(service_name="bot", env={})
    with pytest.raises(OtlpConfigError, match="service_name is empty"):
        build_otlp_config("http://c:4317", env={})


def test_presets_keep_the_headers_of_the_platform_they_read() -> None:
    env = {"OTEL_EXPORTER_OTLP_HEADERS": "x-scope=a", "DD_API_KEY": KEY}
    assert preset("datadog", "bot", env=env).headers == {"x-scope": "a", "dd-api-key": KEY}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("  ", "is not a URL"),
        ("'http://h:4317'", 'remove "\'"'),
        ('"http://h:4317"', "no quotes"),
        ("http：//h:4317", "remove '：'"),
        ("http://h\u200b:4317", "plain ASCII"),
        ("http://${HOST}:4317", "variables expanded"),
        ("h", "no scheme"),
        ("http:/h:4317", "no scheme; write http://h:4317 "),
        ("http://h:", "no port after"),
        ("http://h:0", "no port after"),
        ("http://h:99999", "out of range.*write http://HOST:4317"),
        ("http://h:4318/v1/traces/v1/traces", "twice"),
        ("http://h:4318/http://h:4318", "twice"),
        (f"http://user:{KEY}@c:4318", "user name or a query"),
        (f"user:{KEY}@c:4318", "user name or a query"),
        (f"https://c:4318/v1/traces?key={KEY}", "user name or a query"),
        (None, "None is not a URL"),
        ("c:4318", r"has no scheme; write http://c:4318 \(plain\) or https://c:4318 \(TLS\)"),
        ("http://[::1", "Invalid IPv6"),
        ("http://a b:4317", "not an http"),
        ("http://a..b:4317", "not an http"),
        (f"http://{'a' * 64}.example.com:4317", "not an http"),
    ],
)
def test_a_malformed_endpoint_says_what_to_change_and_never_a_secret(
    endpoint: Any, message: str, protocol: str
) -> None:
    for setup in (build_otlp_config, setup_genai_metrics):
        with pytest.raises(ValueError, match=message) as raised:
            setup(endpoint, "bot", protocol)
        assert KEY not in str(raised.value)


def test_grpc_without_a_port_is_told_the_usual_one() -> None:
    with pytest.raises(OtlpConfigError, match=r"has no port.*http://h:4317"):
        build_otlp_config("http://h", "bot")
    assert build_otlp_config("https://h", "bot").endpoint == "https://h"
    assert build_otlp_config("http://h", "bot", "http/protobuf").endpoint == "http://h/v1/traces"


@pytest.mark.parametrize("blank", [" ", "\n", "\t", "\r\n", "\u3000"])
def test_blanks_around_an_endpoint_are_removed(blank: str) -> None:
    assert build_otlp_config(f"{blank}http://h:4317{blank}", "bot").endpoint == "http://h:4317"


@given(st.text())
def test_any_text_is_an_endpoint_or_a_clear_error(text: str) -> None:
    try:
        parts = split_endpoint(text)
    except ValueError as error:
        assert "endpoint" in str(error)
    else:
        assert parts.scheme in ("http", "https") and parts.hostname


@given(st.dictionaries(st.from_regex(r"[a-z.]{1,8}", fullmatch=True), st.text()))
def test_pairs_survive_the_environment_variable(pairs: dict[str, Any]) -> None:
    assert parse_pairs(format_pairs(pairs)) == pairs
