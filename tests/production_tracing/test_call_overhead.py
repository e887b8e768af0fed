"""call_overhead: 覚えた値を使っても、記録の中身は MLflow の既定と変わらない。"""

# pyright: reportPrivateUsage=false
from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import mlflow.entities.span as span
import mlflow.tracing.fluent as fluent
import mlflow.tracing.provider as provider
import mlflow.utils.uri as uri
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.tracing.utils import TraceJSONEncoder
from pydantic import BaseModel

from chapter8_samples.production_tracing import call_overhead, setup_production_tracing
from chapter8_samples.production_tracing.basic_setup import reset_production_tracing
from chapter8_samples.production_tracing.call_overhead import (
    restore_call_overhead,
    trim_call_overhead,
)

Stored = Callable[..., Any]


@pytest.fixture
def trimmed() -> Iterator[None]:
    assert trim_call_overhead()
    yield
    restore_call_overhead()


def test_private_names_of_mlflow() -> None:
    """非公開の名前の契約。ここが落ちたら call_overhead.py を直す。"""
    assert list(inspect.signature(provider._get_tracer).parameters) == ["module_name"]
    captured = inspect.signature(fluent.capture_function_input_args)
    assert list(captured.parameters) == ["func", "args", "kwargs"]
    assert list(inspect.signature(uri.is_databricks_uri).parameters) == ["uri"]
    assert hasattr(provider.provider, "get")
    assert list(inspect.signature(span.dump_span_attribute_value).parameters) == ["value"]
    assert TraceJSONEncoder(ensure_ascii=False).encode("値") == '"値"'


def test_a_name_that_is_gone_is_reported_and_the_others_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(uri, "is_databricks_uri")
    with caplog.at_level(logging.WARNING):
        assert trim_call_overhead() is False
    assert "has no mlflow.utils.uri.is_databricks_uri" in caplog.text
    restore_call_overhead()


def test_setup_trims_and_reset_restores(tracking_uri: str) -> None:
    before = provider._get_tracer
    setup_production_tracing("trim", tracking_uri=tracking_uri)
    assert provider._get_tracer is not before
    reset_production_tracing()
    assert provider._get_tracer is before


@pytest.mark.usefixtures("trimmed")
def test_tracer_is_asked_once_per_provider(
    tracking_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.sdk.trace import TracerProvider

    asked: list[str] = []
    original = TracerProvider.get_tracer

    def counting(self: TracerProvider, name: str, *args: Any, **kwargs: Any) -> Any:
        asked.append(name)
        return original(self, name, *args, **kwargs)

    monkeypatch.setattr(TracerProvider, "get_tracer", counting)
    mlflow.set_experiment("first")
    for _ in range(5):
        with mlflow.start_span("a"):
            pass
    assert len(asked) == 1
    mlflow.set_experiment("second")  # プロバイダーを作り直す
    with mlflow.start_span("b"):
        pass
    mlflow.flush_trace_async_logging()
    assert 2 <= len(asked) <= 3
    assert [trace.info.experiment_id for trace in _traces("second")] == [_id("second")]
    assert len(_traces("first")) == 5


@pytest.mark.usefixtures("trimmed")
def test_disable_and_enable_are_obeyed(tracking_uri: str) -> None:
    mlflow.set_experiment("switch")
    for number in range(3):
        (mlflow.tracing.disable if number == 1 else mlflow.tracing.enable)()
        with mlflow.start_span(f"span {number}"):
            pass
    mlflow.flush_trace_async_logging()
    names = {trace.info.tags["mlflow.traceName"] for trace in _traces("switch")}
    assert names == {"span 0", "span 2"}


def _traces(name: str) -> list[Any]:
    found: Any = mlflow.search_traces(locations=[_id(name)], return_type="list")
    return list(found)


def _id(name: str) -> str:
    experiment = mlflow.get_experiment_by_name(name)
    assert experiment is not None
    return experiment.experiment_id


class Service:
    def method(self, question: str, *, top_k: int = 3) -> None: ...

    @classmethod
    def build(cls, name: str) -> None: ...

    def __call__(self, question: str) -> None: ...

    __hash__ = None  # type: ignore[assignment]  # 覚える辞書の鍵にできない


def plain(first: int, second: int = 2, *rest: int, **named: int) -> None: ...


@functools.wraps(plain)
def wrapped(*args: Any, **kwargs: Any) -> None: ...


def broken() -> None: ...


broken.__signature__ = "not a signature"  # type: ignore[attr-defined]

FUNCTIONS: tuple[Callable[..., Any], ...] = (
    plain,
    wrapped,
    broken,
    Service.method,
    Service().method,
    Service.build,
    Service(),
    functools.partial(plain, 1),
    lambda question, top_k=1: None,
    print,
)


@given(
    function=st.sampled_from(FUNCTIONS),
    args=st.lists(st.integers(), max_size=4),
    kwargs=st.dictionaries(st.sampled_from(["second", "top_k", "question", "other"]), st.none()),
)
def test_captured_arguments_are_those_of_mlflow(
    function: Callable[..., Any], args: list[int], kwargs: dict[str, None]
) -> None:
    """引数が合わない呼び出しも、調べられない関数も、例外にせず MLflow と同じ値を返す。"""
    original = fluent.capture_function_input_args
    remembered = call_overhead._remember_signature(original)
    values = [_captured(capture, function, args, kwargs) for capture in (original, remembered) * 2]
    assert values[0] == values[1] == values[3]


def _captured(capture: Any, function: Any, args: Any, kwargs: Any) -> Any:
    try:
        return capture(function, tuple(args), kwargs)
    except AttributeError as error:  # MLflow の警告は __name__ を読む(partial にはない)
        return str(error)


class Answer(BaseModel):
    text: str


LOOP: list[Any] = []
LOOP.append(LOOP)
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
ODD = st.sampled_from([LOOP, Answer(text="返品"), {frozenset("鍵"): 1}, object, b"bytes", {1, 2}])
JSON_LIKE = st.recursive(
    PLAIN | ODD,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON_LIKE)
def test_attributes_are_written_as_mlflow_writes_them(value: Any) -> None:
    original = span.dump_span_attribute_value
    assert call_overhead._remember_encoder(original)(value) == original(value)


def test_a_function_is_not_kept_alive() -> None:
    import gc
    import weakref

    remembered = call_overhead._remember_signature(fluent.capture_function_input_args)

    def local(value: int) -> None: ...

    assert remembered(local, (1,), {}) == {"value": 1}
    ghost = weakref.ref(local)
    del local
    gc.collect()
    assert ghost() is None
