"""追加パッケージ(pyarrow、duckdb、pyspark)は、使うときに読み込む。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingDependencyError(ImportError):
    """SQL 用の追加パッケージが入っていない。"""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """この中の import が失敗したら、入れ方を示す ``MissingDependencyError`` にする。"""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(
            f'{error.name} is not installed; run: pip install "chapter8-samples[{name}]"'
        ) from error
