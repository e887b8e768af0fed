"""8.4 アラートとロールバックの、本書のファイル。

公開名は ``chapter8_samples.alerting`` と同じ。
"""

from chapter8_samples import alerting

__all__ = alerting.__all__


def __getattr__(name: str) -> object:
    return getattr(alerting, name)


def __dir__() -> list[str]:
    return __all__
