"""個人情報のマスキングが、リクエストのスレッドに足す時間。

引数をそのまま返すトレース付きの関数を 100 万文字で呼び、``mask_pii`` のあるときとないときの CPU
時間を比べる(入力と出力の両方に同じ文字列が入る)。送信は別のスレッドなので、含まない。

実行::

    python tests/benchmarks/masking_cost.py --chars 1000000
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import mlflow.tracing
from bench_report import machine

from chapter8_samples.production_tracing import mask_pii

JAPANESE = (
    "返品の手続きは、マイページの注文履歴から行えます。"
    "カードで支払った 12,800 円は、2026-11-23 までに返金します。"
)
ENGLISH = "The order was shipped on Monday, and the token count of this answer is small. "


def texts(chars: int) -> dict[str, str]:
    """測る文章。下の 4 つは、実際にはない最悪のもの。"""
    rng = random.Random(8)
    digits = "".join(rng.choices("0123456789", k=chars))
    numbers = "".join(f"{rng.randrange(10 ** rng.randint(1, 12))}, " for _ in range(chars // 8))
    record = {"id": 1795460112000, "text": JAPANESE, "tokens": 12, "at": "2026-11-23T10:15:30Z"}
    found = {
        "日本語": JAPANESE * (chars // len(JAPANESE) + 1),
        "英語": ENGLISH * (chars // len(ENGLISH) + 1),
        "数字の多い文": numbers,
        "JSON": json.dumps([record] * (chars // 130 + 1), ensure_ascii=False),
        "エスケープした JSON": json.dumps([record] * (chars // 330 + 1)),
        "個人情報だけ": "090-1234-5678 taro@example.jp " * (chars // 30 + 1),
        "続いた数字": digits,
        "a@a@a@": "a@" * (chars // 2),
        "base64": base64.b64encode(rng.randbytes(chars)).decode(),
        "全角": "Ａあ０い" * (chars // 4),
    }
    return {name: text[:chars] for name, text in found.items()}


def cost(call: Callable[[str], str], text: str, rounds: int) -> float:
    """1 回の CPU 時間(秒)の中央値。"""
    taken: list[float] = []
    for _ in range(rounds):
        started = time.thread_time()
        call(text)
        taken.append(time.thread_time() - started)
    return statistics.median(taken)


def measure(chars: int, rounds: int = 3) -> dict[str, tuple[float, float]]:
    """文章ごとの (マスキングなし, あり)。100 万文字あたりの秒。"""
    call = mlflow.trace(lambda text: text, name="identity")
    result: dict[str, tuple[float, float]] = {}
    for name, text in texts(chars).items():
        pair: list[float] = []
        for processors in ([], [mask_pii()]):
            mlflow.tracing.configure(span_processors=processors)
            pair.append(cost(call, text, rounds) * 1e6 / chars)
        result[name] = (pair[0], pair[1])
    mlflow.tracing.configure(span_processors=[])
    return result


def stored_aside(chars: int) -> dict[str, tuple[float, float]]:
    """一時フォルダーに記録しながら測る。"""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        mlflow.set_tracking_uri(f"sqlite:///{folder}/masking.db")
        # 長いスパンを MLflow は成果物に置く。既定の場所は、いまのフォルダーの mlruns
        place = Path(folder, "artifacts").as_uri()
        experiment_id = mlflow.create_experiment("masking", artifact_location=place)
        mlflow.set_experiment(experiment_id=experiment_id)
        figures = measure(chars)
        mlflow.flush_trace_async_logging()
    return figures


def main() -> None:
    """表を印字する。"""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chars", type=int, default=1_000_000)
    arguments = parser.parse_args()
    print(machine())
    print("100 万文字あたりの CPU 秒(なし → あり、比)")
    for name, (plain, masked) in stored_aside(arguments.chars).items():
        print(f"  {plain:6.3f} → {masked:6.3f}  {masked / plain:6.1f}  {name}")


if __name__ == "__main__":
    main()
