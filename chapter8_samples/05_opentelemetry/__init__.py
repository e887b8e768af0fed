"""8.5 OpenTelemetry との連携の、本書のファイル。

公開名は ``chapter8_samples.opentelemetry`` と同じ。
"""


def __getattr__(name: str) -> object:
    from chapter8_samples import opentelemetry

    return getattr(opentelemetry, name)


def __dir__() -> list[str]:
    from chapter8_samples import opentelemetry

    return opentelemetry.__all__
