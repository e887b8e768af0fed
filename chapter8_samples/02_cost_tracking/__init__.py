"""8.2 コストとトークンの追跡の、本書のファイル。

公開名は ``chapter8_samples.cost_tracking`` と同じ。
"""

from chapter8_samples import cost_tracking

__all__ = cost_tracking.__all__


def __getattr__(name: str) -> object:
    return getattr(cost_tracking, name)


def __dir__() -> list[str]:
    return __all__
