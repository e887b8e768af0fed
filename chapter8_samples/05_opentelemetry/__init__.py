"""8.5 OpenTelemetry との連携の、本書のファイル。

公開名は ``chapter8_samples.opentelemetry`` と同じ。
"""

from chapter8_samples import opentelemetry

__all__ = opentelemetry.__all__


def __getattr__(name: str) -> object:
    return getattr(opentelemetry, name)


def __dir__() -> list[str]:
    return __all__
