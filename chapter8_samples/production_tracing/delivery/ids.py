"""8.1.4 重ならないトレース ID。

OpenTelemetry の既定は ``random`` で ID を作るので、アプリが ``random.seed(42)`` を呼ぶと、
起動のたびに同じ ID になり、前のトレースを上書きする。MLflow の
``MLFLOW_TRACE_USE_ISOLATED_RANDOM_ID_GENERATOR`` は、3.17 では終了時に例外を残す。
"""

from __future__ import annotations

import os

from opentelemetry.sdk.trace.id_generator import IdGenerator

from .._internals import use_id_generator


class SystemRandomIds(IdGenerator):
    """OS の乱数による ID。``random.seed()`` も fork も影響しない。"""

    def generate_span_id(self) -> int:
        """0 でない 64 ビットの値。"""
        return int.from_bytes(os.urandom(8), "big") or 1

    def generate_trace_id(self) -> int:
        """0 でない 128 ビットの値。"""
        return int.from_bytes(os.urandom(16), "big") or 1

    def is_trace_id_random(self) -> bool:
        """W3C の random フラグを立てる。"""
        return True


def use_system_random_ids() -> None:
    """MLflow のプロバイダーの ID を OS の乱数で作る(アプリと共有するプロバイダーは変えない)。"""
    shared = os.environ.get("MLFLOW_USE_DEFAULT_TRACER_PROVIDER", "").lower() in ("false", "0")
    if not shared:
        use_id_generator(SystemRandomIds())
