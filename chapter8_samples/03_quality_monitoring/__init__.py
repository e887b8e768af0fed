"""8.3 品質の監視の、本書のファイル。

公開名は ``chapter8_samples.quality_monitoring`` と同じ。
"""

from chapter8_samples import quality_monitoring

__all__ = quality_monitoring.__all__


def __getattr__(name: str) -> object:
    return getattr(quality_monitoring, name)


def __dir__() -> list[str]:
    return __all__
