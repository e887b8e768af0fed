"""8.1.4 呼び出し側の時間を縮める(basic_setup.py が使う)。

MLflow はスパンを作るたびに、変わらない 4 つのもの(tracer、関数の引数の定義、JSON の変換器、
接続先の種類)を求め直す。一度求めたものを覚えておけば、記録の中身を変えずに、トレース 1 件の時間が
2 割ほど、ヘッドサンプリングで記録しない呼び出しでは半分ほど減る。

実行::

    $ python chapter8_samples/01_production_tracing/call_overhead.py
    トレース 1 件の呼び出し側の時間(中央値)
      MLflow の既定   ... us
      値を覚える      ... us
    記録した入力・出力・スパン数: 同じ

Databricks でも同じ。MLflow の非公開の名前を使うのは ``_PLACES`` の 4 か所だけ(MLflow 3.17 で確認)。
名前が変わったときは、その 1 つを警告を出してやめ、MLflow の動作のままにする。
"""

from __future__ import annotations

import functools
import inspect
import logging
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import mlflow

logger = logging.getLogger(__name__)

Function = Callable[..., Any]
_lock = threading.Lock()
_originals: dict[tuple[str, str], Function] = {}


def trim_call_overhead() -> bool:
    """変わらない値を覚えるようにする。2 回目は何もしない。

    Returns:
        4 か所すべてを置き換えられたか。``False`` なら、残りは MLflow の動作のまま。
    """
    with _lock:
        for (module, name), remember in _PLACES.items():
            if (module, name) not in _originals:
                _replace(module, name, remember)
        return len(_originals) == len(_PLACES)


def restore_call_overhead() -> None:
    """MLflow の元の関数に戻す。"""
    with _lock:
        for (module, name), original in _originals.items():
            setattr(import_module(module), name, original)
        _originals.clear()


def _replace(module: str, name: str, remember: Callable[[Function], Function]) -> None:
    target = import_module(module)
    original = getattr(target, name, None)
    if not callable(original):
        version = mlflow.__version__
        logger.warning("MLflow %s has no %s.%s; update this file", version, module, name)
        return
    _originals[module, name] = original
    setattr(target, name, remember(original))


def _remember_tracer(original: Function) -> Function:
    """OpenTelemetry の tracer は、プロバイダーが同じなら使い回してよい。"""
    mlflow_provider = import_module("mlflow.tracing.provider").provider
    known: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def get_tracer(module_name: str) -> Any:
        provider = mlflow_provider.get()
        tracer = None if provider is None else known.get(provider)
        if tracer is None:  # 初回と、MLflow がプロバイダーを作り直した後
            tracer = original(module_name)
            known[mlflow_provider.get()] = tracer
        return tracer

    return get_tracer


class _Described:
    """引数の定義を調べ終えた関数。``inspect.signature`` は ``__signature__`` をそのまま返す。"""

    def __init__(self, function: FunctionType) -> None:
        self.__name__ = function.__name__
        self.__signature__ = inspect.signature(function)

    def __call__(self) -> None:
        """``inspect.signature`` は呼べるものだけを受け付ける。"""


def _remember_signature(original: Function) -> Function:
    """``@mlflow.trace`` は、記録しない呼び出しでも引数の定義を調べる。"""
    known: WeakKeyDictionary[Function, _Described] = WeakKeyDictionary()

    def capture(function: Function, args: Any, kwargs: Any) -> Any:
        if not isinstance(function, FunctionType):  # クラスのインスタンスなどは MLflow に任せる
            return original(function, args, kwargs)
        described = known.get(function)
        if described is None:
            try:
                described = known[function] = _Described(function)
            except Exception:  # 調べられない関数は、MLflow が警告を出して先へ進む
                return original(function, args, kwargs)
        return original(described, args, kwargs)

    return capture


def _remember_encoder(original: Function) -> Function:
    """値を JSON にする変換器は状態を持たないので、使い回してよい。"""
    encode = import_module("mlflow.tracing.utils").TraceJSONEncoder(ensure_ascii=False).encode

    def dump(value: Any) -> str:
        try:
            return encode(value)
        except (ValueError, TypeError):  # JSON にできない値は、MLflow が repr で書く
            return original(value)

    return dump


_PLACES: Mapping[tuple[str, str], Callable[[Function], Function]] = {
    ("mlflow.tracing.provider", "_get_tracer"): _remember_tracer,
    ("mlflow.tracing.fluent", "capture_function_input_args"): _remember_signature,
    ("mlflow.entities.span", "dump_span_attribute_value"): _remember_encoder,
    ("mlflow.utils.uri", "is_databricks_uri"): functools.lru_cache(maxsize=64),
}


def main() -> None:
    """置き換える前と後で、同じ呼び出しの時間と、記録の中身を比べる。"""
    from chapter8_samples import _lab

    with _lab.sample("ch8-call-overhead"):
        before = _measure()
        trim_call_overhead()
        after = _measure()
        restore_call_overhead()
    print("トレース 1 件の呼び出し側の時間(中央値)")
    print(f"  MLflow の既定   {before[0]:.0f} us")
    print(f"  値を覚える      {after[0]:.0f} us")
    print(f"記録した入力・出力・スパン数: {'同じ' if before[1] == after[1] else '違う'}")


def _measure(calls: int = 60) -> tuple[float, tuple[Any, ...]]:
    """1 件の時間(中央値、マイクロ秒)と、最後のトレースの中身。"""
    times: list[float] = []
    for number in range(calls):
        started = time.perf_counter_ns()
        _answer("返品の期限は?", top_k=number % 5)
        times.append((time.perf_counter_ns() - started) / 1000)
    mlflow.flush_trace_async_logging()
    trace_id = mlflow.get_last_active_trace_id()
    trace = mlflow.get_trace(trace_id) if trace_id else None
    if trace is None:
        raise RuntimeError(f"trace {trace_id!r} was not stored")
    root = trace.data.spans[0]
    return statistics.median(times), (root.inputs, root.outputs, len(trace.data.spans))


@mlflow.trace(name="answer")
def _answer(question: str, *, top_k: int) -> str:
    return f"{question} -> 上位 {top_k} 件"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # インストールなしでも動くように
    main()
