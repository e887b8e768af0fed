"""8.1 本番環境のトレーシングの、本書のファイル。

公開名は ``chapter8_samples.production_tracing`` と同じ。
"""

from chapter8_samples import production_tracing

__all__ = production_tracing.__all__


def __getattr__(name: str) -> object:
    return getattr(production_tracing, name)


def __dir__() -> list[str]:
    return __all__
