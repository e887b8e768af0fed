"""高くつくもの(環境、サーバー、シナリオの 1 回)をファイルの中で共有する。"""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): pytest-xdist の同じ worker で動かす")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist が印を読むより先に
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
