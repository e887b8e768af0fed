"""MLflow の動作を変える環境変数を、しばらくの間だけ真にする。"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def switched_on(name: str) -> Iterator[None]:
    """``with`` の間、環境変数 ``name`` を ``true`` にする。"""
    before = os.environ.get(name)
    os.environ[name] = "true"
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before
