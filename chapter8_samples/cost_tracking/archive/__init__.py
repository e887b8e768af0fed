"""8.2 トレースを Parquet に書き出し(``parquet``)、SQL で分析する(``sql``、MLflow は要らない)。"""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """この中の import が失敗したら、追加パッケージの入れ方を示す。"""
    try:
        yield
    except ImportError as error:
        fix = f'pip install "chapter8-samples[{name}]"'
        raise ImportError(f"{error.name} is not installed; run: {fix}", name=error.name) from error
