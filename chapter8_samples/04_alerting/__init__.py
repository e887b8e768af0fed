"""8.4 アラートとロールバックの、本書のファイル。

公開名は ``chapter8_samples.alerting`` と同じ。
"""


def __getattr__(name: str) -> object:
    from chapter8_samples import alerting

    return getattr(alerting, name)


def __dir__() -> list[str]:
    from chapter8_samples import alerting

    return alerting.__all__
