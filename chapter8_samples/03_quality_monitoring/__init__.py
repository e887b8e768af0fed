"""8.3 品質の監視の、本書のファイル。

公開名は ``chapter8_samples.quality_monitoring`` と同じ。
"""


def __getattr__(name: str) -> object:
    from chapter8_samples import quality_monitoring

    return getattr(quality_monitoring, name)


def __dir__() -> list[str]:
    from chapter8_samples import quality_monitoring

    return quality_monitoring.__all__
