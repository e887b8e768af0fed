"""basic_setup と autologging: 設定・二重設定・やり直し・サーバー停止時のふるまい。"""

# pyright: reportPrivateUsage=false, reportPrivateImportUsage=false
from __future__ import annotations

import logging
import os
import random
import runpy
import shutil
import sys
import threading
import time
from inspect import isclass as is_class
from pathlib import Path
from typing import Any

import mlflow
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor

from chapter8_samples._lab.servers.receivers import OtlpReceiver
from chapter8_samples.production_tracing import basic_setup
from chapter8_samples.production_tracing.autologging import AUTOLOG_PROVIDERS, enable_autologging
from chapter8_samples.production_tracing.basic_setup import (
    reset_production_tracing,
    setup_production_tracing,
    tracing_status,
)
from chapter8_samples.production_tracing.delivery.environment import (
    EnvironmentPatch,
    otlp_environment,
)
from chapter8_samples.production_tracing.delivery.flush import flush_traces
from chapter8_samples.production_tracing.delivery.settings import TracingSetupError
from chapter8_samples.production_tracing.graceful_shutdown import setup_graceful_shutdown
from chapter8_samples.production_tracing.masking import mask_pii

PAGES = ("basic_setup", "graceful_shutdown")
PATCHABLE = ("mlflow.tracing", "mlflow.entities.span", "opentelemetry")
REPOSITORY = Path(__file__).resolve().parents[2]


@mlflow.trace
def answer(number: int) -> int:
    return number


@pytest.mark.slow
def test_readme_quick_start_works_in_an_empty_directory(stored: Any, tmp_path: Path) -> None:
    status = setup_production_tracing(
        experiment_name="/production/my-llm-app", service_name="my-llm-app", enable_async=True
    )
    answer(1)
    assert status.backend == "sqlite" and status.ready and not status.warnings
    assert (tmp_path / "mlflow.db").exists()
    (trace,) = stored("/production/my-llm-app")
    assert trace.info.experiment_id == status.experiment_id
    assert trace.info.tags["service.name"] == "my-llm-app"


def test_same_call_is_a_no_op_and_a_different_one_explains_itself(tracking_uri: str) -> None:
    first = setup_production_tracing("a")
    assert setup_production_tracing("a") == first
    with pytest.raises(TracingSetupError, match=r"already set up for 'a'.*reset_production"):
        setup_production_tracing("b")
    reset_production_tracing()
    assert tracing_status() is None
    assert setup_production_tracing("b").experiment_name == "b"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_page_run_as_a_script_shares_its_state(tracking_uri: str) -> None:
    """パスで実行したページは 2 つ目のモジュールになるが、設定もハンドラーも 1 つのまま。"""
    folder = REPOSITORY / "chapter8_samples" / "01_production_tracing"
    name = "chapter8_samples.production_tracing."
    for setup, shutdown in (
        [runpy.run_path(str(folder / f"{page}.py")) for page in PAGES],
        [runpy.run_module(name + page, run_name="as-a-script") for page in PAGES],
    ):
        assert setup["setup_production_tracing"]("a") == tracing_status()
        assert setup["setup_production_tracing"] is not setup_production_tracing
        reset_production_tracing()
        assert setup["tracing_status"]() is None
        handler = shutdown["setup_graceful_shutdown"](7)
        try:
            assert setup_graceful_shutdown(7) is handler
        finally:
            handler.unregister()


def test_reset_restores_environment_and_uri(
    tracking_uri: str, database_template: Path, tmp_path: Path
) -> None:
    os.environ["OTEL_RESOURCE_ATTRIBUTES"] = "team=ai,service.version=0"
    before = dict(os.environ)
    other = f"sqlite:///{shutil.copy(database_template, tmp_path / 'other.db')}"
    setup_production_tracing("a", tracking_uri=other, environment="production", service_version="2")
    answer(1)
    items = os.environ["OTEL_RESOURCE_ATTRIBUTES"].split(",")
    wanted = {
        "deployment.environment.name": "production",
        "service.version": "0",  # 利用者の値が優先
        "team": "ai",
    }
    assert wanted.items() <= dict(item.split("=") for item in items).items()
    reset_production_tracing()
    assert dict(os.environ) == before
    assert mlflow.get_tracking_uri() == tracking_uri


def test_setup_replaces_nothing_of_mlflow_or_opentelemetry(tracking_uri: str) -> None:
    def everything() -> dict[tuple[str, str], object]:
        answer(0)
        owners = dict[str, Any]()
        for module in [m for n, m in sys.modules.items() if n.startswith(PATCHABLE)]:
            owners[module.__name__] = module
            owners |= {f"{module.__name__}:{n}": c for n, c in vars(module).items() if is_class(c)}
        return {
            (place, name): value
            for place, owner in owners.items()
            for name, value in vars(owner).items()
            if callable(value)
        }

    mlflow.set_experiment("before")
    before = everything()
    setup_production_tracing("a", span_processors=[mask_pii()])
    after = everything()
    assert [key for key, value in before.items() if after.get(key) is not value] == []


def test_status_shows_what_waits_and_what_was_lost(tracking_uri: str) -> None:
    os.environ["MLFLOW_ASYNC_TRACE_LOGGING_MAX_INTERVAL_MILLIS"] = "60000"
    setup_production_tracing("a")

    def counts() -> tuple[int, int, int]:
        status = tracing_status()
        assert status is not None
        return status.backlog, status.dropped, status.spooled

    assert counts() == (0, 0, 0)
    for number in range(3):
        answer(number)
    assert counts() == (3, 0, 0)
    assert flush_traces(60).ok
    assert counts() == (0, 0, 0)
    assert "backlog=0" in repr(tracing_status())


def test_user_environment_wins_and_is_reported(tracking_uri: str) -> None:
    os.environ["MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE"] = "77"
    status = setup_production_tracing("a")
    assert os.environ["MLFLOW_ASYNC_TRACE_LOGGING_MAX_QUEUE_SIZE"] == "77"
    assert any("MAX_QUEUE_SIZE=77" in warning for warning in status.warnings)


def test_service_name_in_the_users_resource_attributes_wins(tracking_uri: str, stored: Any) -> None:
    os.environ["OTEL_RESOURCE_ATTRIBUTES"] = "team=ai, service.name=users-own"
    status = setup_production_tracing("a", "my-llm-app")
    answer(1)
    (trace,) = stored("a")
    assert trace.info.tags["service.name"] == "users-own"
    assert "OTEL_SERVICE_NAME" not in os.environ
    assert any("service.name=users-own" in warning for warning in status.warnings)


def test_secrets_in_urls_and_headers_are_never_shown(
    free_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "pa55word"
    os.environ["OTEL_EXPORTER_OTLP_TRACES_HEADERS"] = f"authorization={secret}"
    uri = f"http://app:{secret}@127.0.0.1:{free_port}"
    shown: list[object] = []
    with pytest.raises(TracingSetupError) as caught:
        setup_production_tracing("a", tracking_uri=f"postgresql://app:{secret}@db/mlflow")
    shown.append(caught.value)
    with pytest.raises(TracingSetupError) as caught:
        setup_production_tracing("a", tracking_uri=uri, strict=True)
    shown.append(caught.value)
    shown.append(setup_production_tracing("a", tracking_uri=uri))
    assert mlflow.get_tracking_uri() == uri
    with pytest.raises(TracingSetupError) as caught:
        setup_production_tracing("b")
    patch = EnvironmentPatch()
    patch.set(otlp_environment(uri, "1"))
    shown += [caught.value, patch.warnings]
    patch.restore()
    assert secret not in caplog.text + repr(shown)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"USERNAME": "app", "PASSWORD": "p=ss, 鍵"}, "Basic YXBwOnA9c3MsIOmNtQ=="),
        ({"TOKEN": "t0k=n,x"}, "Bearer t0k=n,x"),
        ({"HOME": "app:p=ss, 鍵"}, "Basic YXBwOnA9c3MsIOmNtQ=="),  # ~/.mlflow/credentials
        ({}, None),
    ],
)
def test_otlp_carries_the_credentials_of_mlflow(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], wanted: str | None, tmp_path: Path
) -> None:
    if account := given.pop("HOME", None):
        user, password = account.split(":")
        lines = f"[mlflow]\nmlflow_tracking_username={user}\nmlflow_tracking_password={password}\n"
        (tmp_path / ".mlflow").mkdir()
        (tmp_path / ".mlflow" / "credentials").write_text(lines, encoding="utf-8")
        monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in given.items():
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", value)
    patch = EnvironmentPatch()
    with OtlpReceiver() as receiver:
        patch.set(otlp_environment(receiver.http_endpoint, "12"))
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter()))
        provider.get_tracer("t").start_span("s").end()
        provider.shutdown()
        headers = receiver.requests[0].headers
    patch.restore()
    assert (headers.get("authorization"), headers["x-mlflow-experiment-id"]) == (wanted, "12")


def test_processors_that_others_have_registered_are_kept(tracking_uri: str) -> None:
    seen: list[str] = []
    mlflow.tracing.configure(span_processors=[lambda span: seen.append(span.name)])
    setup_production_tracing("kept", tracking_uri=tracking_uri)
    with mlflow.start_span("answer"):
        pass
    assert seen == ["answer"]


def test_same_masking_twice_is_the_same_setup(tracking_uri: str) -> None:
    first = setup_production_tracing("a", span_processors=[mask_pii()])
    assert setup_production_tracing("a", span_processors=[mask_pii()]) == first
    with pytest.raises(TracingSetupError, match=r"different setup \({'service_name': 'other'}\)"):
        setup_production_tracing("a", "other", span_processors=[mask_pii()])


@pytest.mark.parametrize(
    "bad",
    [
        {"experiment_name": " "},
        {"service_name": ""},
        {"export_profile": "fast"},
        {"probe_timeout_seconds": 0},
        {"probe_timeout_seconds": float("nan")},
        {"deployment_region": "a,b"},
        {"service_version": "a=b"},
        {"experiment_name": None},
        {"service_name": 8},
        {"tracking_uri": Path("mlflow.db")},
        {"export_profile": ["burst"]},
        {"probe_timeout_seconds": "2"},
        {"retry_seconds": float("inf")},
        {"service_version": 1.2},
        {"span_processors": ["mask_pii"]},
    ],
)
def test_bad_values_are_refused_before_anything_changes(bad: dict[str, Any]) -> None:
    before = dict(os.environ)
    with pytest.raises(ValueError, match=r"must"):
        setup_production_tracing(**{"experiment_name": "a", **bad})  # pyright: ignore
    assert dict(os.environ) == before and tracing_status() is None


def test_unsupported_uri_and_otlp_without_server(tracking_uri: str) -> None:
    with pytest.raises(TracingSetupError, match="not supported"):
        setup_production_tracing("a", tracking_uri="file:///tmp/x")
    before = dict(os.environ)
    with pytest.raises(TracingSetupError, match="needs an MLflow server"):
        setup_production_tracing("a", export_profile="otlp")
    assert tracing_status() is None
    assert {k: v for k, v in os.environ.items() if k.startswith("OTEL")} == {
        k: v for k, v in before.items() if k.startswith("OTEL")
    }


def test_unreachable_server_never_blocks_a_request(free_port: int) -> None:
    started = time.monotonic()
    status = setup_production_tracing(
        "a", tracking_uri=f"http://127.0.0.1:{free_port}", probe_timeout_seconds=1
    )
    assert not status.ready and "refused" in status.warnings[0]
    before = time.monotonic()
    assert [answer(number) for number in range(50)] == list(range(50))
    assert time.monotonic() - before < 1
    assert time.monotonic() - started < 10


def test_unreachable_server_is_an_error_when_strict(free_port: int) -> None:
    with pytest.raises(TracingSetupError, match="refused"):
        setup_production_tracing("a", tracking_uri=f"http://127.0.0.1:{free_port}", strict=True)
    assert tracing_status() is None
    assert not mlflow.is_tracking_uri_set()


@pytest.mark.slow
def test_forked_worker_keeps_reconnecting(program: Any, free_port: int) -> None:
    """サーバーの停止中に fork したワーカー(gunicorn の --preload など)も、後で記録を始める。"""
    body = f"""
from chapter8_samples.production_tracing.basic_setup import *
setup_production_tracing("a", tracking_uri="http://127.0.0.1:{free_port}", retry_seconds=300)
setup_graceful_shutdown(5)
if os.fork() == 0:
    names = [thread.name for thread in threading.enumerate()]
    print("trace-reconnect" in names, work(7), mlflow.get_last_active_trace_id())
    reset_production_tracing()
    sys.stdout.flush()
    os._exit(0)
print(os.wait()[1])
"""
    code, out, error = program.run(body)
    assert (code, out) == (0, "True 7 None\n0\n"), error


@pytest.mark.slow
def test_otlp_profile_sends_a_burst_to_the_server(mlflow_server_url: str) -> None:
    from chapter8_samples.production_tracing.delivery.flush import flush_traces
    from chapter8_samples.production_tracing.metadata_tagging import (
        RequestContext,
        add_trace_metadata,
        find_traces,
    )

    setup_production_tracing("otlp-profile", tracking_uri=mlflow_server_url, export_profile="otlp")

    @mlflow.trace
    def chat() -> None:
        assert add_trace_metadata(
            RequestContext(user_id="u", session_id="s", environment="prod", request_id="r-1")
        )

    for _ in range(300):
        chat()
    assert flush_traces(60).ok
    found = find_traces(user="u", session="s", environment="prod", max_results=500)
    assert len(found) == 300
    assert {str(trace.info.state) for trace in found} == {"OK"}


@pytest.mark.slow
def test_no_request_to_the_server_per_traced_call(mlflow_server_url: str, stored: Any) -> None:
    """環境変数だけで設定すると 1 トレースごとに 1 往復待つ。設定後はそれがない。"""
    import requests

    assert setup_production_tracing("no-get", tracking_uri=mlflow_server_url).backend == "server"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
    answer(0)
    calls: list[str] = []
    original = requests.Session.request

    def spy(self: Any, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            calls.append(url)
        return original(self, method, url, *args, **kwargs)

    requests.Session.request = spy  # type: ignore[method-assign]
    try:
        for number in range(20):
            answer(number)
    finally:
        requests.Session.request = original  # type: ignore[method-assign]
    assert calls == []
    assert len(stored("no-get")) == 21


def test_early_traces_do_not_leave_the_small_buffer(tracking_uri: str) -> None:
    from mlflow.tracing.trace_manager import InMemoryTraceManager

    mlflow.set_experiment("early")
    answer(1)
    assert InMemoryTraceManager.get_instance()._traces.maxsize == 1000
    setup_production_tracing("a")
    answer(1)
    assert InMemoryTraceManager.get_instance()._traces.maxsize == 20000


def test_ids_do_not_repeat_when_the_app_seeds_random(tracking_uri: str) -> None:
    setup_production_tracing("a")
    ids = set[str | None]()
    for _ in range(3):
        random.seed(42)
        answer(1)
        ids.add(mlflow.get_last_active_trace_id())
    assert len(ids) == 3


@pytest.mark.slow
def test_ids_do_not_repeat_in_forked_workers(program: Any) -> None:
    """fork した子どうしでも、子がそれぞれ ``random.seed`` を呼んでも、同じ ID を作らない。"""
    body = """
from chapter8_samples.production_tracing.basic_setup import *
import random
setup_production_tracing("a")
setup_graceful_shutdown(5)
for _ in range(2):
    if os.fork() == 0:
        random.seed(42)
        work(1)
        print(mlflow.get_last_active_trace_id(), flush=True)
        os._exit(0)
    os.wait()
"""
    code, out, error = program.run(body)
    assert code == 0, error
    assert len(set(out.split())) == 2


@pytest.mark.slow
def test_autologging_names(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"unknown providers \['opneai'\].*'openai'"):
        enable_autologging(["opneai"])
    caplog.set_level(logging.WARNING)
    assert enable_autologging(["openai", "strands"]) == ["openai"]
    assert "strands" in caplog.text
    mlflow.openai.autolog(disable=True)


def test_every_autologging_module_exists() -> None:
    root = Path(mlflow.__file__).parent
    for flavor in set(AUTOLOG_PROVIDERS) - {"langgraph"}:  # LangChain が兼ねる
        assert (root / flavor / "__init__.py").exists() or (root / f"{flavor}.py").exists(), flavor


@pytest.mark.slow
def test_exit_is_silent(program: Any) -> None:
    """MLflow の ID 生成器の __del__ が終了時に残す誤り(まれに終了を止める)が出ない。"""
    body = (
        "from chapter8_samples.production_tracing.basic_setup import setup_production_tracing\n"
        "setup_production_tracing('a')\n"
        "with mlflow.start_span('x'): pass\n"
    )
    code, _, error = program.run(body)
    assert code == 0 and "Exception ignored" not in error


def test_autologging_is_reachable_from_the_books_listing() -> None:
    assert basic_setup.enable_autologging is enable_autologging
