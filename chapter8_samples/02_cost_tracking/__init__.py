"""8.2 コストとトークンの追跡の、本書のファイル。

公開名は ``chapter8_samples.cost_tracking`` と同じ。
"""


def __getattr__(name: str) -> object:
    from chapter8_samples import cost_tracking

    return getattr(cost_tracking, name)


def __dir__() -> list[str]:
    from chapter8_samples import cost_tracking

    return cost_tracking.__all__
