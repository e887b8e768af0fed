"""メトリクスと評価イベントの送信: エクスポーターを作り、届いたかを控える。"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from .._internals import exporter_class
from ..deadlines import run_in_time
from ..endpoint import signal_url, split_endpoint


def make_exporter(
    signal: str, endpoint: str, protocol: str, headers: Mapping[str, str] | None
) -> Any:
    """``signal`` (``metrics`` か ``logs``)を OTLP で送るエクスポーター。

    Raises:
        ValueError: 送り先か方式の誤り。
    """
    parts = split_endpoint(endpoint)
    if protocol not in ("grpc", "http/protobuf"):
        raise ValueError(f"protocol {protocol!r} is not 'grpc' or 'http/protobuf'")
    url = f"{parts.scheme}://{parts.netloc}" if protocol == "grpc" else signal_url(parts, signal)
    return exporter_class(signal, protocol)(endpoint=url, headers=dict(headers or {}))


def last_results(exporter: Any) -> Sequence[Any]:
    """最後の送信の結果を控える(``force_flush`` は、失われていても True を返す)。"""
    export, last = exporter.export, deque[Any](maxlen=1)

    def noted(*args: Any, **options: Any) -> Any:
        last.append(export(*args, **options))
        return last[0]

    exporter.export = noted
    return last


def flush_in_time(provider: Any, results: Sequence[Any], timeout_seconds: float) -> bool:
    """残りを送り、受け取られたかを返す。``timeout_seconds`` 秒で必ず戻る。"""
    (finished,) = run_in_time([provider.force_flush], timeout_seconds)
    return finished and not any(result.name == "FAILURE" for result in results)
