"""8.1 本番環境のトレーシングの、本書のファイル。

公開名は ``chapter8_samples.production_tracing`` と同じ。
"""


def __getattr__(name: str) -> object:
    from chapter8_samples import production_tracing

    return getattr(production_tracing, name)


def __dir__() -> list[str]:
    from chapter8_samples import production_tracing

    return production_tracing.__all__
